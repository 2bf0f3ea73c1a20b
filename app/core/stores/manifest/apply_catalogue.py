"""What each catalogue op does to the rows: one definition for the writer and for the replay.

Pure but for the rows it is given: the same ops over the same rows give the same rows (I14), so
nothing here reads a clock, a counter or a table outside the catalogue.
"""

from typing import TypeVar, assert_never

import msgspec

from app.core.base.errors import InvariantViolation
from app.core.stores.manifest.apply_history import (
    apply_history,
    check_no_fork_needs,
    check_no_snapshot,
    register_fork,
    unregister_fork,
)
from app.core.stores.manifest.errors import (
    GenerationMoved,
    MissingRow,
    NameTaken,
    RowExists,
    WrongState,
)
from app.core.stores.manifest.lineage import adopt_chunk, leave_drop
from app.core.stores.manifest.ops import (
    AdoptEveryChunk,
    AdvanceCheckpointed,
    CatalogueOp,
    CompensateCheckpoint,
    CoverSegment,
    CreateDatabase,
    CreateSnapshot,
    CutSegment,
    DeleteChunk,
    DeleteChunkDelta,
    DeleteGeneration,
    DeleteSnapshot,
    MarkSnapshotStored,
    MarkVerified,
    PublishGeneration,
    RaiseFirstLsn,
    RaiseFloor,
    RegisterSegment,
    RemoveDatabase,
    RemoveSegment,
    RestoreDatabase,
    RestoreGeneration,
    SealSegment,
    SetDatabaseState,
    SetHealth,
    SetRetention,
    SupersedeChunk,
    SupersedeChunkDelta,
    UpsertChunk,
    UpsertChunkDelta,
)
from app.core.stores.manifest.records import DatabaseRecord, GenerationRecord, WalSegmentRecord
from app.core.stores.manifest.rows import Rows
from app.core.stores.manifest.tables import (
    CHUNKS,
    DATABASE_NAMES,
    DATABASES,
    DELTAS,
    GENERATIONS,
    SEGMENTS,
    Table,
    chunk_row_key,
    generation_key,
    name_key,
    number_key,
    segment_key,
)

V = TypeVar("V")

replace = msgspec.structs.replace


def apply_catalogue(rows: Rows, op: CatalogueOp) -> None:  # noqa: C901 - a case per op
    match op:
        case UpsertChunk(row=chunk):
            require_database(rows, chunk.db_id)
            adopt_chunk(rows, chunk.db_id, chunk.chunk_id)
            rows.put(CHUNKS, chunk_row_key(chunk.db_id, chunk.chunk_id, chunk.generation), chunk)
        case UpsertChunkDelta(row=delta):
            require_database(rows, delta.db_id)
            adopt_chunk(rows, delta.db_id, delta.chunk_id)
            rows.put(DELTAS, chunk_row_key(delta.db_id, delta.chunk_id, delta.generation), delta)
        case SupersedeChunk():
            adopt_chunk(rows, op.db_id, op.chunk_id)
            key = chunk_row_key(op.db_id, op.chunk_id, op.generation)
            rows.put(
                CHUNKS,
                key,
                replace(_require(rows, CHUNKS, key, op), superseded_at=op.superseded_at),
            )
        case SupersedeChunkDelta():
            adopt_chunk(rows, op.db_id, op.chunk_id)
            key = chunk_row_key(op.db_id, op.chunk_id, op.generation)
            rows.put(
                DELTAS,
                key,
                replace(_require(rows, DELTAS, key, op), superseded_at=op.superseded_at),
            )
        case DeleteChunk():
            key = chunk_row_key(op.db_id, op.chunk_id, op.generation)
            gone = _require(rows, CHUNKS, key, op)
            check_no_fork_needs(rows, gone)
            rows.delete(CHUNKS, key)
            leave_drop(rows, gone)
        case DeleteChunkDelta():
            key = chunk_row_key(op.db_id, op.chunk_id, op.generation)
            check_no_fork_needs(rows, _require(rows, DELTAS, key, op))
            rows.delete(DELTAS, key)
        case RegisterSegment(row=segment):
            _register_segment(rows, segment)
        case SealSegment() | CoverSegment() | CutSegment() | RemoveSegment():
            _change_segment(rows, op)
        case PublishGeneration():
            _publish(rows, op)
        case AdvanceCheckpointed():
            _advance_checkpointed(rows, op)
        case RestoreDatabase(record=database):
            _restore_database(rows, database)
        case RemoveDatabase():
            if require_database(rows, op.db_id).state != "tombstoned":
                raise WrongState("Only a tombstoned database can be removed.", db_id=op.db_id)
            unregister_fork(rows, op.db_id)
            rows.delete(DATABASES, number_key(op.db_id))
        case SetDatabaseState():
            _set_state(rows, op)
        case CompensateCheckpoint():
            require_database(rows, op.db_id)
        case SetHealth() | SetRetention() | RaiseFloor() | RaiseFirstLsn():
            _change_descriptor(rows, op)
        case RestoreGeneration(row=generation):
            require_database(rows, generation.db_id)
            _put_generation(rows, generation)
        case MarkVerified():
            key = generation_key(op.db_id, op.generation)
            row = _require(rows, GENERATIONS, key, op)
            rows.put(GENERATIONS, key, replace(row, verified_at_us=op.verified_at_us))
        case DeleteGeneration():
            key = generation_key(op.db_id, op.generation)
            _require(rows, GENERATIONS, key, op)
            owner = require_database(rows, op.db_id)
            if owner.state != "tombstoned" and owner.generation == op.generation:
                raise WrongState("The newest generation stays.", db_id=op.db_id)
            check_no_snapshot(rows, op.db_id, op.generation)
            rows.delete(GENERATIONS, key)
        case CreateSnapshot() | MarkSnapshotStored() | DeleteSnapshot() | AdoptEveryChunk():
            apply_history(rows, op)
        case CreateDatabase():
            raise InvariantViolation("CreateDatabase is logged and applied as RestoreDatabase.")
        case _:
            assert_never(op)


def require_database(rows: Rows, db_id: int) -> DatabaseRecord:
    database = rows.get(DATABASES, number_key(db_id))
    if database is None:
        raise MissingRow("No such database.", db_id=db_id)
    return database


def _require(rows: Rows, table: Table[V], key: bytes, op: CatalogueOp) -> V:
    row = rows.get(table, key)
    if row is None:
        raise MissingRow(f"{type(op).__name__}: no such row in {table.name}.", key=key.hex())
    return row


def _put_database(rows: Rows, database: DatabaseRecord) -> None:
    rows.put(DATABASES, number_key(database.db_id), database)


def _put_generation(rows: Rows, generation: GenerationRecord) -> None:
    rows.put(GENERATIONS, generation_key(generation.db_id, generation.generation), generation)


def _restore_database(rows: Rows, database: DatabaseRecord) -> None:
    key = name_key(database.tenant, database.name)
    named = database.state != "tombstoned"
    if named and rows.get(DATABASE_NAMES, key) is not None:
        raise NameTaken(tenant=database.tenant, database=database.name)
    if rows.get(DATABASES, number_key(database.db_id)) is not None:
        raise RowExists("The database id is in use.", db_id=database.db_id)
    _put_database(rows, database)
    register_fork(rows, database)
    if named:
        rows.put(DATABASE_NAMES, key, number_key(database.db_id))


def _set_state(rows: Rows, op: SetDatabaseState) -> None:
    database = require_database(rows, op.db_id)
    if database.state == op.state:
        return
    if database.state == "tombstoned":
        raise WrongState("A tombstone is final.", db_id=op.db_id)
    if op.state == "tombstoned":
        check_no_snapshot(rows, op.db_id)
    _put_database(rows, replace(database, state=op.state))
    if op.state == "tombstoned":
        rows.delete(DATABASE_NAMES, name_key(database.tenant, database.name))


def _change_descriptor(
    rows: Rows, op: SetHealth | SetRetention | RaiseFloor | RaiseFirstLsn
) -> None:
    database = require_database(rows, op.db_id)
    match op:
        case SetHealth():
            database = replace(database, health=op.health, lost_from_lsn=op.lost_from_lsn)
        case SetRetention():
            database = replace(database, retention=op.retention)
        case RaiseFloor():
            database = replace(database, floor_lsn=max(database.floor_lsn, op.floor_lsn))
        case RaiseFirstLsn():
            database = replace(database, first_lsn=max(database.first_lsn, op.first_lsn))
        case _:
            assert_never(op)
    _put_database(rows, database)


def _register_segment(rows: Rows, segment: WalSegmentRecord) -> None:
    require_database(rows, segment.db_id)
    key = segment_key(segment.db_id, segment.segment_id)
    known = rows.get(SEGMENTS, key)
    if known is not None and (
        known.state != "open"
        or segment.first_lsn != known.first_lsn
        or segment.ceiling_lsn < known.ceiling_lsn
    ):
        raise RowExists(
            "The segment is registered with other properties.",
            db_id=segment.db_id,
            segment_id=segment.segment_id,
        )
    rows.put(SEGMENTS, key, segment)


def _change_segment(
    rows: Rows, op: SealSegment | CoverSegment | CutSegment | RemoveSegment
) -> None:
    key = segment_key(op.db_id, op.segment_id)
    segment = _require(rows, SEGMENTS, key, op)
    match op:
        case SealSegment():
            if segment.state != "open":
                if (segment.last_lsn, segment.bytes) == (op.last_lsn, op.bytes):
                    return  # recovery says again what it finds
                raise WrongState(
                    f"The segment is {segment.state}.", db_id=op.db_id, segment_id=op.segment_id
                )
            if not segment.first_lsn - 1 <= op.last_lsn < segment.ceiling_lsn:
                raise InvariantViolation("A segment sealed outside its LSN range.", op=str(op))
            sealed = replace(segment, state="sealed", last_lsn=op.last_lsn, bytes=op.bytes)
            rows.put(SEGMENTS, key, sealed)
        case CoverSegment():
            if segment.state not in {"sealed", "checkpointed"}:
                raise WrongState(
                    f"The segment is {segment.state}, it cannot be covered.",
                    db_id=op.db_id, segment_id=op.segment_id,
                )  # fmt: skip
            rows.put(
                SEGMENTS,
                key,
                replace(segment, state="checkpointed", covering_generation=op.generation),
            )
        case CutSegment():
            if segment.state == "open":
                raise WrongState(
                    "An open segment cannot be cut.", db_id=op.db_id, segment_id=op.segment_id
                )
            rows.put(SEGMENTS, key, _cut(segment, op.visible_last))
        case RemoveSegment():
            rows.delete(SEGMENTS, key)
        case _:
            assert_never(op)


def _cut(segment: WalSegmentRecord, visible_last: int) -> WalSegmentRecord:
    """A cut never gives anything back."""
    before = segment.last_lsn if segment.visible_last is None else segment.visible_last
    visible_last = min(before, visible_last)
    gone = visible_last < segment.first_lsn
    return replace(segment, visible_last=visible_last, state="dropped" if gone else segment.state)


def _publish(rows: Rows, op: PublishGeneration) -> None:
    row = op.row
    database = require_database(rows, row.db_id)
    if database.state == "tombstoned":
        raise WrongState("The database is deleted.", db_id=row.db_id)
    if row.generation != database.generation + 1:
        raise GenerationMoved(
            db_id=row.db_id, generation=database.generation, expected=row.generation - 1
        )
    before = rows.get(GENERATIONS, generation_key(row.db_id, database.generation))
    if before is not None:
        _put_generation(rows, replace(before, superseded_at_us=row.committed_at_us))
    _put_generation(rows, row)
    starts_reading = database.engine == "append_only" and row.generation == 1
    _put_database(
        rows,
        replace(
            database,
            generation=row.generation,
            first_lsn=row.first_lsn if starts_reading else database.first_lsn,
            floor_lsn=max(database.floor_lsn, row.last_lsn + 1),
            next_chunk_id=op.next_chunk_id,
            page_count=row.page_count,
            wal_position=op.wal_position,
        ),
    )


def _advance_checkpointed(rows: Rows, op: AdvanceCheckpointed) -> None:
    key = generation_key(op.db_id, op.generation)
    generation = _require(rows, GENERATIONS, key, op)
    if op.lsn > generation.last_lsn:
        raise InvariantViolation(
            "checkpointed_lsn above what the generation holds.", db_id=op.db_id, lsn=op.lsn
        )
    rows.put(GENERATIONS, key, replace(generation, document_stored=True))
    database = require_database(rows, op.db_id)
    _put_database(rows, replace(database, checkpointed_lsn=max(database.checkpointed_lsn, op.lsn)))
