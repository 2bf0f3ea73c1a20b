"""Puts generation documents on the remote store, where the first one of a generation stands."""

from collections.abc import Sequence
from dataclasses import dataclass

from app.core.base.errors import OwnershipLost
from app.core.checkpoint.generation_document import (
    GenerationDocument,
    build_document,
    decode_document,
    encode_document,
)
from app.core.formats.crc64 import crc64
from app.core.stores.manifest.records import (
    ChunkDeltaRecord,
    ChunkRecord,
    DatabaseRecord,
    GenerationRecord,
)
from app.core.stores.remote.protocol import BytesBody, RemoteStore


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyDocument:
    """A document and the object that it becomes."""

    key: str
    document: GenerationDocument
    data: bytes


def make_document(
    database: DatabaseRecord,
    generation: GenerationRecord,
    chunks: Sequence[ChunkRecord],
    deltas: Sequence[ChunkDeltaRecord],
) -> ReadyDocument:
    """Pure. Its time grows with the chunks: it belongs in a thread."""
    document = build_document(database, generation, chunks, deltas)
    return ReadyDocument(
        key=generation.document_key, document=document, data=encode_document(document)
    )


async def store_document(remote: RemoteStore, ready: ReadyDocument) -> None:
    """An equal one that is there already is success: a retry. Raises OwnershipLost if another is
    there: someone else published (I17).
    """
    key, data = ready.key, ready.data
    if await remote.put_if_absent(key, BytesBody(data=data, crc64=crc64(data))) is not None:
        return
    stored = decode_document(await remote.get_blob(key), key=key)
    if not stored.says_the_same_as(ready.document):
        raise OwnershipLost(f"Another process published this generation: {key}")
