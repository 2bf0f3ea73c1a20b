"""What a manifest batch may do, and on what conditions.

A batch is applied whole or not at all, in one LMDB transaction that it may share with others.
Catalogue ops are also written to the change log, in order, in that same transaction.
"""

from typing import Any, Literal, TypeAlias, get_args

import msgspec

from app.core.stores.manifest.admin_records import (
    ApprovalRecord,
    ApprovalState,
    AuditOutcome,
    AuditRecord,
)
from app.core.stores.manifest.conditions import Precondition
from app.core.stores.manifest.records import (
    BlobRef,
    ChunkDeltaRecord,
    ChunkRecord,
    Codec,
    DatabaseRecord,
    DatabaseState,
    Engine,
    ForkParent,
    GenerationRecord,
    HealthState,
    IdempotencyRecord,
    JobRecord,
    RememberedAppend,
    Retention,
    SnapshotRecord,
    TenantRecord,
    VerificationRecord,
    WalSegmentRecord,
)


class Op(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One change. Tagged with its class name, so that the change log can be read back."""


# --- catalogue ops: they go into the change log -----------------------------------------------


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


# --- bookkeeping: not in the change log -------------------------------------------------------


class RememberAppends(Op, frozen=True, kw_only=True, tag=True):
    """Keeps a segment's idempotent appends beyond the life of its WAL."""

    db_id: int
    segment_id: int
    appends: tuple[RememberedAppend, ...]


class ForgetAppends(Op, frozen=True, kw_only=True, tag=True):
    db_id: int
    segment_id: int


class AcquireLease(Op, frozen=True, kw_only=True, tag=True):
    """Result: the fencing token. Refused (`LeaseConflict`) while another job holds the chunk."""

    db_id: int
    chunk_id: int
    generation: int
    job_id: str
    ttl_seconds: float


class RenewLeases(Op, frozen=True, kw_only=True, tag=True):
    """Extends every lease of the job. Refused (`LeaseLost`) if one of them has expired, or if it
    holds fewer than `count_min`: one was reaped or released by force.
    """

    job_id: str
    ttl_seconds: float
    count_min: int = 0


class ReleaseLeases(Op, frozen=True, kw_only=True, tag=True):
    """Releases every lease of the job; none is fine."""

    job_id: str


class DropForeignLeases(Op, frozen=True, kw_only=True, tag=True):
    """At start: removes the leases of earlier processes. Result: how many."""


class ReapLeases(Op, frozen=True, kw_only=True, tag=True):
    """Removes what nobody can use any more: expired leases, and those of other processes.
    Result: the leases that went.
    """


class ReleaseLease(Op, frozen=True, kw_only=True, tag=True):
    """Releases one chunk's lease, whoever holds it (an operator's act), and counts the fencing
    token up. Result: it was held. With `token`, refused (`MissingRow`) unless that is held.
    """

    db_id: int
    chunk_id: int
    token: int | None = None


class EnqueueJob(Op, frozen=True, kw_only=True, tag=True):
    """Adds a pending job and indexes it by (db_id, kind)."""

    job: JobRecord


class UpdateJob(Op, frozen=True, kw_only=True, tag=True):
    """Replaces single fields of a job; keeps the pending index right. `changes` are field names
    of JobRecord to values.
    """

    job_id: str
    changes: dict[str, Any]


class DeleteJob(Op, frozen=True, kw_only=True, tag=True):
    job_id: str


class PutIdempotency(Op, frozen=True, kw_only=True, tag=True):
    record: IdempotencyRecord


class DeleteIdempotency(Op, frozen=True, kw_only=True, tag=True):
    scope_hash: bytes


class RetireBlob(Op, frozen=True, kw_only=True, tag=True):
    """Queues a blob for collection; retiring the same key again changes nothing. One that a row
    names is left alone: it is retired by the commit in which its last row goes.
    """

    blob: BlobRef
    db_id: int
    eligible_at_us: int
    reason: str


class UnretireBlob(Op, frozen=True, kw_only=True, tag=True):
    """A publication names the key after all: takes it from the queue. Refused if doomed."""

    key: str


class DoomBlob(Op, frozen=True, kw_only=True, tag=True):
    """From this commit on no publication may name the key (I8). Refused unless it is retired.
    Result: false, and out of the queue, if a row names it.
    """

    key: str
    eligible_at_us: int | None = None
    """When it may be deleted; None: when it became eligible to be doomed."""


class ForgetBlob(Op, frozen=True, kw_only=True, tag=True):
    """The doomed object is gone from the store: so is its entry in the queue."""

    key: str


class TakeDatabaseId(Op, frozen=True, kw_only=True, tag=True):
    """Result: an id that no other database gets."""


class PutVerification(Op, frozen=True, kw_only=True, tag=True):
    """The ledger of verification: replaces what was known of the blob. Goes with `ForgetBlob`."""

    record: VerificationRecord


class PutTenant(Op, frozen=True, kw_only=True, tag=True):
    row: TenantRecord


class PutMeta(Op, frozen=True, kw_only=True, tag=True):
    name: str
    value: bytes


class PutCursor(Op, frozen=True, kw_only=True, tag=True):
    """Makes a cursor, or sets it anew. `start` is the first sequence it is to be given, or the
    first retained one, or the next to come. Result: the CursorRecord, and whether it is new.
    Raises CursorExpired for a sequence that was trimmed, InvalidRequest for one to come.
    """

    principal: str
    name: str
    start: int | Literal["start", "now"]


class AckCursor(Op, frozen=True, kw_only=True, tag=True):
    """Moves a cursor on, never back. Result: the CursorRecord. Raises CursorNotFound,
    CursorExpired, InvalidRequest for a sequence to come.
    """

    principal: str
    name: str
    sequence: int


class DeleteCursor(Op, frozen=True, kw_only=True, tag=True):
    """Raises CursorNotFound."""

    principal: str
    name: str


class TrimChangeLog(Op, frozen=True, kw_only=True, tag=True):
    """Drops the oldest changes that nobody needs, some at a time, into the base that the rest is
    replayed from. Result: how many went. What may go is decided inside the transaction.
    """

    history_count: int
    """So many stay in any case."""
    lag_count_max: int
    """A cursor further behind than this is left behind."""


class PutApproval(Op, frozen=True, kw_only=True, tag=True):
    row: ApprovalRecord


class DecideApproval(Op, frozen=True, kw_only=True, tag=True):
    """Refused (`WrongState`) unless it is pending."""

    approval_id: str
    state: ApprovalState
    decided_by: str
    decided_at_us: int


class DeleteApproval(Op, frozen=True, kw_only=True, tag=True):
    approval_id: str


class AppendAudit(Op, frozen=True, kw_only=True, tag=True):
    """Result: the entry's sequence, which the row itself need not know."""

    row: AuditRecord


class SettleAudit(Op, frozen=True, kw_only=True, tag=True):
    sequence: int
    outcome: AuditOutcome
    status: int | None
    code: str | None
    answer: str
    ended_at_us: int


class DeleteAudit(Op, frozen=True, kw_only=True, tag=True):
    sequence: int


AdminOp: TypeAlias = (
    PutApproval | DecideApproval | DeleteApproval | AppendAudit | SettleAudit | DeleteAudit
)
ADMIN_OPS: tuple[type[Op], ...] = get_args(AdminOp)

BookkeepingOp: TypeAlias = (
    PutCursor
    | AckCursor
    | DeleteCursor
    | TrimChangeLog
    | RememberAppends
    | ForgetAppends
    | AcquireLease
    | RenewLeases
    | ReleaseLeases
    | DropForeignLeases
    | ReapLeases
    | ReleaseLease
    | EnqueueJob
    | UpdateJob
    | DeleteJob
    | PutIdempotency
    | DeleteIdempotency
    | RetireBlob
    | UnretireBlob
    | DoomBlob
    | ForgetBlob
    | PutVerification
    | TakeDatabaseId
    | PutTenant
    | PutMeta
)


# --- batches


class ManifestBatch(msgspec.Struct, frozen=True, kw_only=True):
    """Ops that commit together. `db_id` and `reason` head the change record, if there is one."""

    ops: tuple[Op, ...]
    preconditions: tuple[Precondition, ...] = ()
    reason: str
    db_id: int = 0


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """The batch is durable. `results` has one value per op (None where an op has none)."""

    sequence: int | None
    """Of the change record; None if the batch held no catalogue op."""
    results: tuple[Any, ...]
    retired_blobs: int = 0
    retired_bytes: int = 0
    """What lost its last row by the batch."""
