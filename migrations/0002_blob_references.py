"""Two indexes over the rows of chunks and deltas: who names a blob, and which rows are over."""

from hashlib import sha256
from struct import Struct

import msgspec

from app.core.stores.manifest.ledger import MigrationTransaction

_PLACE = Struct(">QQQ").pack  # db_id, chunk_id, generation
_ENDED = Struct(">QQQQB").pack  # db_id, superseded_at, chunk_id, generation, 1 for a delta
_DB_ID, _CHUNK_ID, _GENERATION = 1, 2, 3
_CHUNK_BLOB, _CHUNK_SUPERSEDED_AT = 4, 15
_DELTA_BLOB, _DELTA_BASE_KEY, _DELTA_SUPERSEDED_AT = 5, 6, 14
_KEY = 0


def apply(transaction: MigrationTransaction) -> None:
    for _, raw in transaction.scan("chunk_catalog"):
        row = msgspec.msgpack.decode(raw)
        if row[_CHUNK_BLOB] is not None:
            _name(transaction, row[_CHUNK_BLOB][_KEY], b"c", row)
        _end(transaction, row, _CHUNK_SUPERSEDED_AT, is_delta=False)
    for _, raw in transaction.scan("chunk_delta_index"):
        row = msgspec.msgpack.decode(raw)
        _name(transaction, row[_DELTA_BLOB][_KEY], b"d", row)
        if row[_DELTA_BASE_KEY]:
            _name(transaction, row[_DELTA_BASE_KEY], b"b", row)
        _end(transaction, row, _DELTA_SUPERSEDED_AT, is_delta=True)


def _name(transaction: MigrationTransaction, key: str, kind: bytes, row: list[object]) -> None:
    place = _PLACE(row[_DB_ID], row[_CHUNK_ID], row[_GENERATION])
    digest = sha256(key.encode()).digest()[:16]
    transaction.put("blob_reference_index", digest + kind + place, b"")


def _end(
    transaction: MigrationTransaction, row: list[object], field: int, *, is_delta: bool
) -> None:
    ended = row[field] if len(row) > field else None
    if ended is not None:
        key = _ENDED(row[_DB_ID], ended, row[_CHUNK_ID], row[_GENERATION], is_delta)
        transaction.put("superseded_index", key, b"")
