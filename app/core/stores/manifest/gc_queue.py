"""The queue of blobs that are to go: retired, doomed, forgotten; and taken back.

Invariants: I8: a doomed key cannot be published; a key is doomed only while no row names it.
A key is in the queue at most once.
"""

import msgspec

from app.core.stores.manifest.errors import KeyDoomed, MissingRow, WrongState
from app.core.stores.manifest.records import GcRecord
from app.core.stores.manifest.rows import StagedRows
from app.core.stores.manifest.tables import (
    BLOB_REFERENCES,
    GC_KEYS,
    GC_QUEUE,
    GC_SEQUENCE,
    SCHEMA,
    blob_key,
    blob_reference_prefix,
    gc_row_key,
    number_key,
    number_of,
)

replace = msgspec.structs.replace


def is_doomed(rows: StagedRows, key: str) -> bool:
    found = _find(rows, key)
    return found is not None and found[1].doomed


def retire(rows: StagedRows, row: GcRecord) -> None:
    """Queues the blob (`row.sequence` is given here). One that waits already is at most doomed
    now; its time stays.
    """
    found = _find(rows, row.key)
    if found is not None:
        position, known = found
        if row.doomed and not known.doomed:
            _put(rows, replace(known, doomed=True, eligible_at_us=row.eligible_at_us), position)
        return
    _put(rows, row, None)


def claim_blob(rows: StagedRows, key: str) -> None:
    """A row names the key: a retired one leaves the queue, a doomed one is refused (I8)."""
    found = _find(rows, key)
    if found is None:
        return
    position, row = found
    if row.doomed:
        raise KeyDoomed(key=key)
    _delete(rows, key, position)


def doom(rows: StagedRows, key: str, *, eligible_at_us: int | None) -> bool:
    """From now on no row may name the key. False, and out of the queue, where one does."""
    position, row = _require(rows, key)
    if rows.scan(BLOB_REFERENCES, blob_reference_prefix(key)):
        _delete(rows, key, position)
        return False
    at = row.eligible_at_us if eligible_at_us is None else eligible_at_us
    _put(rows, replace(row, doomed=True, eligible_at_us=at), position)
    return True


def forget(rows: StagedRows, key: str) -> None:
    position, row = _require(rows, key)
    if not row.doomed:
        raise WrongState("A blob is doomed before it is forgotten.", key=key)
    _delete(rows, key, position)


def _find(rows: StagedRows, key: str) -> tuple[bytes, GcRecord] | None:
    position = rows.get(GC_KEYS, blob_key(key))
    row = None if position is None else rows.get(GC_QUEUE, position)
    return None if position is None or row is None else (position, row)


def _require(rows: StagedRows, key: str) -> tuple[bytes, GcRecord]:
    found = _find(rows, key)
    if found is None:
        raise MissingRow("The blob is not retired.", key=key)
    return found


def _put(rows: StagedRows, row: GcRecord, position: bytes | None) -> None:
    """In the place of `position`, if there is one."""
    if position is not None:
        rows.delete(GC_QUEUE, position)
    raw = rows.get(SCHEMA, GC_SEQUENCE)
    sequence = 1 if raw is None else number_of(raw) + 1
    rows.put(SCHEMA, GC_SEQUENCE, number_key(sequence))
    position = gc_row_key(row.eligible_at_us, sequence)
    rows.put(GC_QUEUE, position, replace(row, sequence=sequence))
    rows.put(GC_KEYS, blob_key(row.key), position)


def _delete(rows: StagedRows, key: str, position: bytes) -> None:
    rows.delete(GC_QUEUE, position)
    rows.delete(GC_KEYS, blob_key(key))
