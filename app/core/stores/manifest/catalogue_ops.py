"""Ops on the catalogue: they are also written to the change log, and replayed from it."""

from typing import TypeAlias, get_args

import msgspec

from app.core.stores.manifest.op import Op
from app.core.stores.manifest.records import (
    ChunkDeltaRecord,
    ChunkRecord,
    Codec,
    DatabaseRecord,
    DatabaseState,
    Engine,
    ForkParent,
    GenerationRecord,
    HealthState,
    Retention,
    SnapshotRecord,
    WalSegmentRecord,
)


class CreateDatabase(Op, frozen=True, kw_only=True, tag=True):
    """Result: the new db_id. Refused (`NameTaken`) where the name is in use."""

    tenant: str
    name: str
    engine: Engine
    page_size: int
    chunk_bytes: int
    compression: Codec
    created_at_us: int
    forked_from: ForkParent | None = None


class RestoreDatabase(Op, frozen=True, kw_only=True, tag=True):
    """Writes a descriptor as it is, db_id included; `recover` and forks only. The name must be
    free. A fork is registered with its parent; one that inherits needs that generation of it.
    """

    record: DatabaseRecord


class UpsertChunk(Op, frozen=True, kw_only=True, tag=True):
    row: ChunkRecord


class DeleteChunk(Op, frozen=True, kw_only=True, tag=True):
    """Refused (`RowPinned`) while a fork falls through to it; so is `DeleteChunkDelta`."""

    db_id: int
    chunk_id: int
    generation: int


class SupersedeChunk(Op, frozen=True, kw_only=True, tag=True):
    """Ends a row's validity at `superseded_at` (a generation); the row stays."""

    db_id: int
    chunk_id: int
    generation: int
    superseded_at: int


class UpsertChunkDelta(Op, frozen=True, kw_only=True, tag=True):
    row: ChunkDeltaRecord


class DeleteChunkDelta(Op, frozen=True, kw_only=True, tag=True):
    db_id: int
    chunk_id: int
    generation: int


class SupersedeChunkDelta(Op, frozen=True, kw_only=True, tag=True):
    db_id: int
    chunk_id: int
    generation: int
    superseded_at: int


class PublishGeneration(Op, frozen=True, kw_only=True, tag=True):
    """Adds the generation, ends its predecessor's time, and moves the database's generation,
    floor_lsn, first_lsn (append_only, first generation), next_chunk_id and page_count on.
    Refused unless `row.generation` is the database's generation + 1.
    """

    row: GenerationRecord
    next_chunk_id: int
    wal_position: bytes = b""
    """libsql: becomes the database's."""


class CoverSegment(Op, frozen=True, kw_only=True, tag=True):
    """The segment's LSNs are in `generation`: state `checkpointed`."""

    db_id: int
    segment_id: int
    generation: int


class RegisterSegment(Op, frozen=True, kw_only=True, tag=True):
    """Registering an open segment again may only raise its ceiling."""

    row: WalSegmentRecord


class SealSegment(Op, frozen=True, kw_only=True, tag=True):
    db_id: int
    segment_id: int
    last_lsn: int
    bytes: int


class CutSegment(Op, frozen=True, kw_only=True, tag=True):
    """A truncation: nothing above `visible_last` is readable or will be published. A segment of
    which nothing is left becomes `dropped`. Refused while it is open.
    """

    db_id: int
    segment_id: int
    visible_last: int


class RemoveSegment(Op, frozen=True, kw_only=True, tag=True):
    """The file goes after this commit (or is already gone)."""

    db_id: int
    segment_id: int


class AdvanceCheckpointed(Op, frozen=True, kw_only=True, tag=True):
    """The generation document is on the store: `checkpointed_lsn` may say so (I3)."""

    db_id: int
    generation: int
    lsn: int


class SetHealth(Op, frozen=True, kw_only=True, tag=True):
    db_id: int
    health: HealthState
    lost_from_lsn: int | None = None


class RaiseFloor(Op, frozen=True, kw_only=True, tag=True):
    """LSNs below `floor_lsn` are never given out again (I14). Never lowers it."""

    db_id: int
    floor_lsn: int


class RaiseFirstLsn(Op, frozen=True, kw_only=True, tag=True):
    """A head truncation: LSNs below `first_lsn` are no longer readable. Never lowers it."""

    db_id: int
    first_lsn: int


class CompensateCheckpoint(Op, frozen=True, kw_only=True, tag=True):
    """Says in the change log that a truncation cancelled a checkpoint, which left nothing behind.
    It changes no row.
    """

    db_id: int
    job_id: str
    cancelled_by: str


class SetDatabaseState(Op, frozen=True, kw_only=True, tag=True):
    """`tombstoned` frees the name and is final."""

    db_id: int
    state: DatabaseState


class SetRetention(Op, frozen=True, kw_only=True, tag=True):
    db_id: int
    retention: Retention


class RemoveDatabase(Op, frozen=True, kw_only=True, tag=True):
    """The last of a tombstoned database goes; its id is never given out again. Refused while a
    fork of it inherits; its own registration as a fork goes too.
    """

    db_id: int


class RestoreGeneration(Op, frozen=True, kw_only=True, tag=True):
    """Writes a generation's row as it is; `recover` and forks only."""

    row: GenerationRecord


class CreateSnapshot(Op, frozen=True, kw_only=True, tag=True):
    """Refused where the name is in use (`SnapshotTaken`) or the generation is not retained
    (`GenerationGone`).
    """

    row: SnapshotRecord


class MarkSnapshotStored(Op, frozen=True, kw_only=True, tag=True):
    """Refused (`MissingRow`) where the name is another snapshot's by now: `key` is the stored
    document's. Changes of earlier versions name none.
    """

    db_id: int
    name: str
    key: str = ""


class DeleteSnapshot(Op, frozen=True, kw_only=True, tag=True):
    db_id: int
    name: str


class AdoptEveryChunk(Op, frozen=True, kw_only=True, tag=True):
    """Copies what a fork inherits into rows of its own, so that nothing falls through."""

    db_id: int


class MarkVerified(Op, frozen=True, kw_only=True, tag=True):
    db_id: int
    generation: int
    verified_at_us: int


class DeleteGeneration(Op, frozen=True, kw_only=True, tag=True):
    """An expired generation's row goes. Refused for the newest, and where a snapshot pins it."""

    db_id: int
    generation: int


CatalogueOp: TypeAlias = (
    CreateDatabase
    | RestoreDatabase
    | UpsertChunk
    | DeleteChunk
    | SupersedeChunk
    | UpsertChunkDelta
    | DeleteChunkDelta
    | SupersedeChunkDelta
    | PublishGeneration
    | CoverSegment
    | RegisterSegment
    | SealSegment
    | CutSegment
    | RemoveSegment
    | AdvanceCheckpointed
    | SetHealth
    | RaiseFloor
    | RaiseFirstLsn
    | CompensateCheckpoint
    | SetDatabaseState
    | SetRetention
    | RemoveDatabase
    | RestoreGeneration
    | MarkVerified
    | DeleteGeneration
    | CreateSnapshot
    | MarkSnapshotStored
    | DeleteSnapshot
    | AdoptEveryChunk
)
CATALOGUE_OPS: tuple[type[Op], ...] = get_args(CatalogueOp)

_catalogue_decoder: msgspec.msgpack.Decoder[CatalogueOp] = msgspec.msgpack.Decoder(CatalogueOp)


def decode_op(raw: bytes | msgspec.Raw) -> CatalogueOp:
    """One op of a change record. `CreateDatabase` is logged as the `RestoreDatabase` it came to."""
    return _catalogue_decoder.decode(raw)
