"""JSON documents in the bucket: whose they are is looked at before the rest is read.

Decoders are made when modules are loaded, here and elsewhere, and not where something is decoded:
a struct's first one fills in what all of them use, and who decodes meanwhile in another thread may
find it half filled in, and crashes the process.
"""

from typing import TypeVar

import msgspec

from app.core.base.errors import CorruptBlob, FormatFromFuture

D = TypeVar("D", bound=msgspec.Struct)


class _Head(msgspec.Struct, frozen=True, kw_only=True):
    """What every document of ours begins with, in any version."""

    format: str = ""
    version: int = 0


_decode_head = msgspec.json.Decoder(_Head).decode


def decode_json_document(
    data: bytes,
    decoder: msgspec.json.Decoder[D],
    *,
    document_format: str,
    version_max: int,
    key: str,
) -> D:
    """Raises CorruptBlob, or FormatFromFuture for a newer version."""
    try:
        head = _decode_head(data)
        if head.format == document_format and head.version > version_max:
            raise FormatFromFuture(f"A {document_format} document is of a newer version.", key=key)
        if head.format == document_format:
            return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptBlob(f"A {document_format} document cannot be read.", key=key) from error
    raise CorruptBlob(f"Not a {document_format} document.", key=key)
