"""What follows from the catalogue's rows: two indexes, and the retirement of blobs.

Both indexes are kept here, from what a batch did to the rows, whichever op did it, so that no op
can forget them: `blob_reference_index` says which rows name a blob (as their own, or as the base
that a delta is encoded against), `superseded_index` which rows of a database are no longer valid,
by the generation in which they ended.

Invariants: I8: a blob whose last row goes is retired and doomed in that very commit, and so is the
document of a generation or a snapshot whose row goes. While any row names a blob, it is not.
"""

from collections.abc import Iterator
from typing import NamedTuple

from app.core.stores.manifest.context import BatchContext
from app.core.stores.manifest.gc_queue import claim_blob, retire
from app.core.stores.manifest.records import ChunkDeltaRecord, ChunkRecord, GcRecord
from app.core.stores.manifest.rows import StagedRows
from app.core.stores.manifest.tables import (
    BLOB_REFERENCES,
    CHUNKS,
    DELTAS,
    GENERATIONS,
    SNAPSHOTS,
    SUPERSEDED,
    blob_reference_key,
    blob_reference_prefix,
    superseded_key,
)

Row = ChunkRecord | ChunkDeltaRecord


class _Named(NamedTuple):
    bytes: int
    db_id: int


def follow_rows(rows: StagedRows, context: BatchContext) -> tuple[int, int]:
    """Behind the ops of a batch. Returns how many objects it retired, and their bytes."""
    retired = retired_bytes = 0
    for key, generation in rows.touched(GENERATIONS).items():
        before = rows.original(GENERATIONS, key)
        if generation is None and before is not None:
            _retire(rows, before.document_key, _Named(0, before.db_id), context)
            retired += 1
    for key, snapshot in rows.touched(SNAPSHOTS).items():
        gone = rows.original(SNAPSHOTS, key)
        if snapshot is None and gone is not None and gone.document is not None:
            _retire(rows, gone.document.key, _Named(gone.document.bytes, gone.db_id), context)
            retired, retired_bytes = retired + 1, retired_bytes + gone.document.bytes
        elif snapshot is not None and gone is None and snapshot.document is not None:
            claim_blob(rows, snapshot.document.key)
    unnamed: dict[str, _Named] = {}
    for key, chunk in rows.touched(CHUNKS).items():
        _follow(rows, rows.original(CHUNKS, key), chunk, unnamed)
    for key, delta in rows.touched(DELTAS).items():
        _follow(rows, rows.original(DELTAS, key), delta, unnamed)
    for blob_key, named in unnamed.items():
        if not is_referenced(rows, blob_key):
            _retire(rows, blob_key, named, context)
            retired, retired_bytes = retired + 1, retired_bytes + named.bytes
    return retired, retired_bytes


def is_referenced(rows: StagedRows, blob_key: str) -> bool:
    return bool(rows.scan(BLOB_REFERENCES, blob_reference_prefix(blob_key)))


def index_entries(row: Row) -> Iterator[tuple[str, bytes]]:
    """The entries of both indexes that a row has: (table name, key)."""
    for reference in _references(row):
        yield BLOB_REFERENCES.name, reference
    if (superseded := _superseded(row)) is not None:
        yield SUPERSEDED.name, superseded


def _follow(
    rows: StagedRows, before: Row | None, after: Row | None, unnamed: dict[str, _Named]
) -> None:
    had = dict.fromkeys(() if before is None else _references(before))
    has = dict.fromkeys(() if after is None else _references(after))
    for gone in had.keys() - has.keys():
        rows.delete(BLOB_REFERENCES, gone)
    for new in has.keys() - had.keys():
        rows.put(BLOB_REFERENCES, new, b"")
    if before is not None and had.keys() - has.keys():
        if before.blob is not None:
            unnamed[before.blob.key] = _Named(before.blob.bytes, before.db_id)
        if isinstance(before, ChunkDeltaRecord) and before.base_key:
            unnamed.setdefault(before.base_key, _Named(0, before.db_id))
    ended = None if before is None else _superseded(before)
    ends = None if after is None else _superseded(after)
    if ended != ends:
        if ended is not None:
            rows.delete(SUPERSEDED, ended)
        if ends is not None:
            rows.put(SUPERSEDED, ends, b"")


def _references(row: Row) -> Iterator[bytes]:
    place = row.db_id, row.chunk_id, row.generation
    if isinstance(row, ChunkDeltaRecord):
        yield blob_reference_key(row.blob.key, "delta", *place)
        if row.base_key:
            yield blob_reference_key(row.base_key, "base", *place)
    elif row.blob is not None:
        yield blob_reference_key(row.blob.key, "chunk", *place)


def _superseded(row: Row) -> bytes | None:
    if row.superseded_at is None:
        return None
    is_delta = isinstance(row, ChunkDeltaRecord)
    return superseded_key(
        row.db_id, row.superseded_at, row.chunk_id, row.generation, is_delta=is_delta
    )


def _retire(rows: StagedRows, key: str, named: _Named, context: BatchContext) -> None:
    retire(
        rows,
        GcRecord(
            key=key,
            bytes=named.bytes,
            db_id=named.db_id,
            eligible_at_us=context.now_us + context.gc_grace_us,
            reason="unreachable",
            doomed=True,
        ),
    )
