"""What must hold after every batch, looked at before it is put into the transaction.

Only what the batch touched is looked at, and its neighbours: everything else held before. A
violation is a bug of the caller; it fails that batch and nothing of it is written.
"""

from app.core.base.errors import InvariantViolation
from app.core.stores.manifest.records import ChunkDeltaRecord, ChunkRecord, DatabaseRecord
from app.core.stores.manifest.rows import StagedRows
from app.core.stores.manifest.tables import (
    CHUNKS,
    DATABASES,
    DELTAS,
    GENERATIONS,
    chunk_prefix,
    generation_key,
    number_key,
)


def check_invariants(rows: StagedRows) -> None:
    """Raises `InvariantViolation`."""
    for key, database in rows.touched(DATABASES).items():
        if database is not None and (before := rows.original(DATABASES, key)) is not None:
            _check_descriptor(rows, before, database)
    for key, chunk in rows.touched(CHUNKS).items():
        if chunk is not None:
            database = rows.get(DATABASES, number_key(chunk.db_id))
            _check_validity(chunk, database)
            _check_chunk_neighbours(rows, key, chunk)
            if database is not None and database.engine == "append_only":
                _check_record_ranges(rows, key, chunk)
        elif (gone := rows.original(CHUNKS, key)) is not None:
            _check_unneeded(rows, gone)
            _check_no_encoding(rows, gone)
    for key, delta in rows.touched(DELTAS).items():
        if delta is None:
            if (gone_delta := rows.original(DELTAS, key)) is not None:
                _check_unneeded(rows, gone_delta)
        else:
            _check_validity(delta, rows.get(DATABASES, number_key(delta.db_id)))


def _check_descriptor(rows: StagedRows, before: DatabaseRecord, after: DatabaseRecord) -> None:
    """Watermarks only rise (I14); a generation is published by one, with its row (I2)."""
    if after.generation not in {before.generation, before.generation + 1}:
        raise _violation("A generation grows by exactly one.", after, was=before.generation)
    if after.generation != before.generation and (
        rows.get(GENERATIONS, generation_key(after.db_id, after.generation)) is None
    ):
        raise _violation("A generation without its row.", after)
    if after.floor_lsn < before.floor_lsn:
        raise _violation("floor_lsn never falls.", after, was=before.floor_lsn)
    if after.first_lsn < before.first_lsn:
        raise _violation("first_lsn never falls.", after, was=before.first_lsn)
    if after.checkpointed_lsn < before.checkpointed_lsn:
        raise _violation("checkpointed_lsn never falls.", after, was=before.checkpointed_lsn)
    # A tail truncation publishes a lower last LSN; what was published stays below the floor.
    if after.checkpointed_lsn >= after.floor_lsn:
        raise _violation("checkpointed_lsn above all that was published.", after)
    if after.next_chunk_id < before.next_chunk_id:
        raise _violation("Chunk ids are never reused.", after, was=before.next_chunk_id)


def _check_validity(row: ChunkRecord | ChunkDeltaRecord, database: DatabaseRecord | None) -> None:
    """[generation, superseded_at) is not empty and ends no later than what is published (I2)."""
    if row.superseded_at is not None and row.superseded_at <= row.generation:
        raise _row_violation("A row superseded before it was valid.", row)
    if database is None:
        raise _row_violation("A row of no database.", row)
    newest = row.generation if row.superseded_at is None else row.superseded_at
    if newest > database.generation:
        raise _row_violation(
            "A row of a generation that this batch does not publish.", row, newest=newest
        )


def _check_unneeded(rows: StagedRows, gone: ChunkRecord | ChunkDeltaRecord) -> None:
    """No retained generation has a row that goes (I8)."""
    database = rows.get(DATABASES, number_key(gone.db_id))
    if database is None or database.state == "tombstoned":
        return
    before_it = generation_key(gone.db_id, gone.generation - 1)
    for _, retained in rows.above(GENERATIONS, before_it, number_key(gone.db_id)):
        if gone.superseded_at is None or retained.generation < gone.superseded_at:
            raise _row_violation(
                "A row of a retained generation goes.", gone, retained=retained.generation
            )
        break


def _check_no_encoding(rows: StagedRows, gone: ChunkRecord) -> None:
    """No delta of the chunk is encoded against a base that goes (I8)."""
    if gone.blob is None:
        return
    for _, delta in rows.scan(DELTAS, chunk_prefix(gone.db_id, gone.chunk_id)):
        if delta.base_key == gone.blob.key:
            raise _row_violation(
                "A base goes that a delta is encoded against.", gone, delta=delta.generation
            )


def _check_chunk_neighbours(rows: StagedRows, key: bytes, chunk: ChunkRecord) -> None:
    """At most one base or drop of a chunk is valid at any generation."""
    prefix = chunk_prefix(chunk.db_id, chunk.chunk_id)
    for _, older in rows.below(CHUNKS, key, prefix):
        if older.superseded_at is None or older.superseded_at > chunk.generation:
            raise _row_violation(
                "Two valid rows of one chunk.", chunk, other_generation=older.generation
            )
        break
    for _, newer in rows.above(CHUNKS, key, prefix):
        if chunk.superseded_at is None or chunk.superseded_at > newer.generation:
            raise _row_violation(
                "Two valid rows of one chunk.", chunk, other_generation=newer.generation
            )
        break


def _check_record_ranges(rows: StagedRows, key: bytes, chunk: ChunkRecord) -> None:
    """append_only: the newest view's chunks are in LSN order and do not overlap."""
    if chunk.blob is None or chunk.superseded_at is not None:
        return
    if chunk.last < chunk.first - 1 or chunk.visible_last > chunk.last:
        raise _row_violation("A chunk's LSN range is not one.", chunk)
    prefix = number_key(chunk.db_id)
    for _, lower in rows.below(CHUNKS, key, prefix):
        if lower.blob is not None and lower.superseded_at is None:
            if lower.last >= chunk.first:
                raise _row_violation("LSN ranges overlap.", chunk, other_chunk_id=lower.chunk_id)
            break
    for _, upper in rows.above(CHUNKS, key, prefix):
        if upper.blob is not None and upper.superseded_at is None:
            if chunk.last >= upper.first:
                raise _row_violation("LSN ranges overlap.", chunk, other_chunk_id=upper.chunk_id)
            break


def _violation(text: str, database: DatabaseRecord, **fields: int) -> InvariantViolation:
    return InvariantViolation(f"{text} {fields or ''}".strip(), db_id=database.db_id)


def _row_violation(
    text: str, row: ChunkRecord | ChunkDeltaRecord, **fields: int
) -> InvariantViolation:
    return InvariantViolation(
        f"{text} {fields or ''}".strip(),
        db_id=row.db_id,
        chunk_id=row.chunk_id,
        generation=row.generation,
    )
