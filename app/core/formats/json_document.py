"""JSON documents in the bucket: whose they are is looked at before the rest is read."""

from typing import TypeVar

import msgspec

from app.core.base.errors import CorruptBlob, FormatFromFuture

D = TypeVar("D", bound=msgspec.Struct)


class _Head(msgspec.Struct, frozen=True, kw_only=True):
    """What every document of ours begins with, in any version."""

    format: str = ""
    version: int = 0


def decode_json_document(
    data: bytes, into: type[D], *, document_format: str, version_max: int, key: str
) -> D:
    """Raises CorruptBlob, or FormatFromFuture for a newer version."""
    try:
        head = msgspec.json.decode(data, type=_Head)
        if head.format == document_format and head.version > version_max:
            raise FormatFromFuture(f"A {document_format} document is of a newer version.", key=key)
        if head.format == document_format:
            return msgspec.json.decode(data, type=into)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptBlob(f"A {document_format} document cannot be read.", key=key) from error
    raise CorruptBlob(f"Not a {document_format} document.", key=key)
