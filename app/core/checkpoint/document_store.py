"""Puts generation documents on the remote store, where the first one of a generation stands."""

from app.core.base.errors import OwnershipLost
from app.core.checkpoint.generation_document import (
    GenerationDocument,
    decode_document,
    encode_document,
)
from app.core.formats.crc64 import crc64
from app.core.stores.remote.protocol import BytesBody, RemoteStore


async def store_document(remote: RemoteStore, document: GenerationDocument, *, key: str) -> None:
    """An equal one that is there already is success: a retry. Raises OwnershipLost if another is
    there: someone else published (I17).
    """
    data = encode_document(document)
    if await remote.put_if_absent(key, BytesBody(data=data, crc64=crc64(data))) is not None:
        return
    stored = decode_document(await remote.get_blob(key), key=key)
    if not stored.says_the_same_as(document):
        raise OwnershipLost(f"Another process published this generation: {key}")
