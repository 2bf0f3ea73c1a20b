"""The snapshot document: what the bucket says of one snapshot, so that `recover` pins it again.

Plain JSON under `snapshots/{tenant}/{database}/{name}/meta-{hash}.json`, where `hash` is the
SHA-256 of its bytes: the same row always gives the same object.
"""

import hashlib

import msgspec

from app.core.base.errors import CorruptBlob
from app.core.formats.crc64 import crc64
from app.core.formats.json_document import decode_json_document
from app.core.stores.manifest.records import BlobRef, DatabaseRecord, SnapshotRecord
from app.core.stores.remote.keys import snapshot_meta_key

FORMAT = "bop-snapshot"
VERSION = 1


class SnapshotDocument(msgspec.Struct, frozen=True, kw_only=True):
    format: str = FORMAT
    version: int = VERSION
    tenant: str
    database: str
    db_id: int
    name: str
    generation: int
    last_lsn: int
    page_count: int
    created_at_us: int


def encode_snapshot(database: DatabaseRecord, row: SnapshotRecord) -> bytes:
    return msgspec.json.encode(
        SnapshotDocument(
            tenant=database.tenant,
            database=database.name,
            db_id=row.db_id,
            name=row.name,
            generation=row.generation,
            last_lsn=row.last_lsn,
            page_count=row.page_count,
            created_at_us=row.created_at_us,
        )
    )


def with_document(database: DatabaseRecord, row: SnapshotRecord) -> SnapshotRecord:
    """The row with its document's key and checksums: known before anything is written."""
    data = encode_snapshot(database, row)
    digest = hashlib.sha256(data).digest()
    key = snapshot_meta_key(
        tenant=database.tenant, database=database.name, name=row.name, sha256_hex=digest.hex()
    )
    document = BlobRef(key=key, sha256=digest, crc64=crc64(data), bytes=len(data))
    return msgspec.structs.replace(row, document=document)


_decoder = msgspec.json.Decoder(SnapshotDocument)


def decode_snapshot(data: bytes, *, key: str) -> SnapshotDocument:
    """Raises CorruptBlob, or FormatFromFuture for a newer version."""
    document = decode_json_document(
        data, _decoder, document_format=FORMAT, version_max=VERSION, key=key
    )
    if not key.endswith(f"/meta-{hashlib.sha256(data).hexdigest()}.json"):
        raise CorruptBlob("Not the snapshot document of its key.", key=key)
    return document


def restored_snapshot(document: SnapshotDocument, *, data: bytes, key: str) -> SnapshotRecord:
    """The row that the document was written from."""
    return SnapshotRecord(
        db_id=document.db_id,
        name=document.name,
        generation=document.generation,
        last_lsn=document.last_lsn,
        page_count=document.page_count,
        created_at_us=document.created_at_us,
        document=BlobRef(
            key=key, sha256=hashlib.sha256(data).digest(), crc64=crc64(data), bytes=len(data)
        ),
        document_stored=True,
    )
