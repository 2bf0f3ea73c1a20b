"""Ops on what keeps the service going: leases, jobs, retired blobs, cursors. They are not in the
change log.
"""

from typing import Any, Literal, TypeAlias

from app.core.stores.manifest.op import Op
from app.core.stores.manifest.records import (
    BlobRef,
    IdempotencyRecord,
    JobRecord,
    RememberedAppend,
    TenantRecord,
    VerificationRecord,
)


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
