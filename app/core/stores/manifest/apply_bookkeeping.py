"""What the ops outside the change log do: jobs, leases, collection, and small things.

Leases are judged here, inside the transaction, by this process's monotonic clock (I6, I16): one
of another process is dead whatever its time says, one that expired is never renewed.
"""

from typing import Any, assert_never

import msgspec

from app.core.base.errors import FormatFromFuture, InvariantViolation
from app.core.stores.manifest.change_log import (
    ack_cursor,
    delete_cursor,
    put_cursor,
    trim_change_log,
)
from app.core.stores.manifest.context import BatchContext
from app.core.stores.manifest.derived import is_referenced
from app.core.stores.manifest.errors import (
    CorruptRow,
    LeaseConflict,
    LeaseLost,
    MissingRow,
    RowExists,
)
from app.core.stores.manifest.gc_queue import claim_blob, doom, forget, retire
from app.core.stores.manifest.ops import (
    AckCursor,
    AcquireLease,
    BookkeepingOp,
    DeleteCursor,
    DeleteIdempotency,
    DeleteJob,
    DoomBlob,
    DropForeignLeases,
    EnqueueJob,
    ForgetAppends,
    ForgetBlob,
    PutCursor,
    PutIdempotency,
    PutMeta,
    PutTenant,
    PutVerification,
    ReapLeases,
    ReleaseLease,
    ReleaseLeases,
    RememberAppends,
    RenewLeases,
    RetireBlob,
    TakeDatabaseId,
    TrimChangeLog,
    UnretireBlob,
    UpdateJob,
)
from app.core.stores.manifest.records import (
    ENDED_STATES,
    GcRecord,
    JobRecord,
    LeaseRecord,
)
from app.core.stores.manifest.rows import StagedRows
from app.core.stores.manifest.tables import (
    DATABASE_IDS,
    IDEMPOTENCY,
    JOBS,
    JOBS_PENDING,
    JOBS_UNFINISHED,
    LEASE_TOKENS,
    LEASES,
    LEASES_BY_JOB,
    REMEMBERED,
    SCHEMA,
    TENANTS,
    VERIFICATION,
    blob_key,
    chunk_prefix,
    job_lease_key,
    job_lease_prefix,
    meta_key,
    number_key,
    number_of,
    pending_key,
    segment_key,
)

replace = msgspec.structs.replace

_FIXED_JOB_FIELDS = frozenset({"job_id", "schema_version"})


def apply_bookkeeping(  # noqa: C901 - a case per op
    rows: StagedRows, op: BookkeepingOp, context: BatchContext
) -> Any:
    """Gives the op's result."""
    match op:
        case UpdateJob():
            _update_job(rows, op)
        case PutCursor():
            return put_cursor(rows, op, context)
        case AckCursor():
            return ack_cursor(rows, op, context)
        case DeleteCursor():
            delete_cursor(rows, op)
        case TrimChangeLog():
            return trim_change_log(rows, op)
        case EnqueueJob(job=job):
            if rows.get(JOBS, job.job_id.encode()) is not None:
                raise RowExists("The job is in the queue already.", job_id=job.job_id)
            _put_job(rows, job, before=None)
        case DeleteJob():
            _delete_job(rows, op.job_id)
        case AcquireLease():
            return _acquire(rows, op, context)
        case RenewLeases():
            return _renew(rows, op, context)
        case ReleaseLeases():
            for lease in leases_of(rows, op.job_id):
                _drop_lease(rows, lease)
        case ReleaseLease():
            return _release_by_force(rows, op)
        case DropForeignLeases():
            foreign = [row for _, row in rows.scan(LEASES) if row.process_id != context.process_id]
            for lease in foreign:
                _drop_lease(rows, lease)
            return len(foreign)
        case ReapLeases():
            dead = tuple(row for _, row in rows.scan(LEASES) if not is_live(row, context))
            for lease in dead:
                _drop_lease(rows, lease)
            return dead
        case RememberAppends():
            rows.put(REMEMBERED, segment_key(op.db_id, op.segment_id), op.appends)
        case ForgetAppends():
            rows.delete(REMEMBERED, segment_key(op.db_id, op.segment_id))
        case PutIdempotency(record=record):
            rows.put(IDEMPOTENCY, record.scope_hash, record)
        case DeleteIdempotency():
            rows.delete(IDEMPOTENCY, op.scope_hash)
        case RetireBlob():
            if not is_referenced(rows, op.blob.key):
                retire(
                    rows,
                    GcRecord(
                        key=op.blob.key,
                        bytes=op.blob.bytes,
                        db_id=op.db_id,
                        eligible_at_us=op.eligible_at_us,
                        reason=op.reason,
                    ),
                )
        case UnretireBlob():
            claim_blob(rows, op.key)
        case DoomBlob():
            return doom(rows, op.key, eligible_at_us=op.eligible_at_us)
        case ForgetBlob():
            forget(rows, op.key)
            rows.delete(VERIFICATION, blob_key(op.key))
        case PutVerification(record=verified):
            rows.put(VERIFICATION, blob_key(verified.key), verified)
        case TakeDatabaseId():
            return count_up(rows, DATABASE_IDS)
        case PutTenant(row=tenant):
            rows.put(TENANTS, tenant.tenant.encode(), tenant)
        case PutMeta():
            rows.put(SCHEMA, meta_key(op.name), op.value)
        case _:
            assert_never(op)
    return None


def count_up(rows: StagedRows, counter: bytes) -> int:
    """The counter's next value; the first is 1."""
    raw = rows.get(SCHEMA, counter)
    value = 1 if raw is None else number_of(raw) + 1
    rows.put(SCHEMA, counter, number_key(value))
    return value


# --- jobs


def _put_job(rows: StagedRows, job: JobRecord, *, before: JobRecord | None) -> None:
    key = job.job_id.encode()
    rows.put(JOBS, key, job)
    was = _pending_key(before)
    now = _pending_key(job)
    if was is not None and was != now:
        rows.delete(JOBS_PENDING, was)
    if now is not None and was != now:
        rows.put(JOBS_PENDING, now, b"")
    was_unfinished = before is not None and before.state not in ENDED_STATES
    unfinished = job.state not in ENDED_STATES
    if unfinished and not was_unfinished:
        rows.put(JOBS_UNFINISHED, key, b"")
    elif was_unfinished and not unfinished:
        rows.delete(JOBS_UNFINISHED, key)


def _pending_key(job: JobRecord | None) -> bytes | None:
    if job is None or job.state != "pending":
        return None
    return pending_key(job.db_id, job.kind, job.job_id)


def _update_job(rows: StagedRows, op: UpdateJob) -> None:
    job = rows.get(JOBS, op.job_id.encode())
    if job is None:
        raise MissingRow("No such job.", job_id=op.job_id)
    if not _FIXED_JOB_FIELDS.isdisjoint(op.changes):
        raise InvariantViolation("A job's identity does not change.", job_id=op.job_id)
    changed = replace(job, **op.changes)
    # The values are untyped: one of a wrong type must not become a row that nothing can read.
    try:
        JOBS.codec.decode(JOBS.codec.encode(changed))
    except (CorruptRow, FormatFromFuture, TypeError) as error:
        raise InvariantViolation(f"UpdateJob: {error}", job_id=op.job_id) from error
    _put_job(rows, changed, before=job)


def _delete_job(rows: StagedRows, job_id: str) -> None:
    key = job_id.encode()
    job = rows.get(JOBS, key)
    if job is None:
        raise MissingRow("No such job.", job_id=job_id)
    rows.delete(JOBS, key)
    rows.delete(JOBS_UNFINISHED, key)
    if (pending := _pending_key(job)) is not None:
        rows.delete(JOBS_PENDING, pending)


# --- leases


def is_live(lease: LeaseRecord, context: BatchContext) -> bool:
    return (
        lease.process_id == context.process_id
        and context.now_monotonic < lease.expires_at_monotonic
    )


def leases_of(rows: StagedRows, job_id: str) -> list[LeaseRecord]:
    prefix = job_lease_prefix(job_id)
    found = []
    for key, _ in rows.scan(LEASES_BY_JOB, prefix):
        lease = rows.get(LEASES, key[len(prefix) :])
        if lease is None or lease.job_id != job_id:
            raise InvariantViolation("The index of leases names one that is not there.")
        found.append(lease)
    return found


def _acquire(rows: StagedRows, op: AcquireLease, context: BatchContext) -> int:
    """The same job takes its own lease anew, under a new token: its earlier run is fenced."""
    key = chunk_prefix(op.db_id, op.chunk_id)
    held = rows.get(LEASES, key)
    if held is not None and held.job_id != op.job_id:
        if is_live(held, context):
            raise LeaseConflict(
                holder=held.job_id,
                db_id=op.db_id,
                chunk_id=op.chunk_id,
                expires_at_us=held.expires_at_us,
            )
        _drop_lease(rows, held)
    token = count_up(rows, LEASE_TOKENS)
    rows.put(
        LEASES,
        key,
        LeaseRecord(
            db_id=op.db_id,
            chunk_id=op.chunk_id,
            generation=op.generation,
            job_id=op.job_id,
            token=token,
            process_id=context.process_id,
            registered_at_us=context.now_us,
            expires_at_us=context.now_us + int(op.ttl_seconds * 1_000_000),
            expires_at_monotonic=context.now_monotonic + op.ttl_seconds,
        ),
    )
    rows.put(LEASES_BY_JOB, job_lease_key(op.job_id, op.db_id, op.chunk_id), b"")
    return token


def _renew(rows: StagedRows, op: RenewLeases, context: BatchContext) -> int:
    leases = leases_of(rows, op.job_id)
    if len(leases) < op.count_min and not _is_published(rows, op.job_id):
        raise LeaseLost(job_id=op.job_id, held=len(leases), expected=op.count_min)
    for lease in leases:
        if not is_live(lease, context):
            raise LeaseLost(job_id=op.job_id, db_id=lease.db_id, chunk_id=lease.chunk_id)
        rows.put(
            LEASES,
            chunk_prefix(lease.db_id, lease.chunk_id),
            replace(
                lease,
                expires_at_us=context.now_us + int(op.ttl_seconds * 1_000_000),
                expires_at_monotonic=context.now_monotonic + op.ttl_seconds,
            ),
        )
    return len(leases)


def _is_published(rows: StagedRows, job_id: str) -> bool:
    """Its publication released its leases: a renewal that comes later has missed nothing."""
    job = rows.get(JOBS, job_id.encode())
    return job is not None and job.published_generation is not None


def _release_by_force(rows: StagedRows, op: ReleaseLease) -> bool:
    """The holder is fenced (I6): its publication finds its lease gone, and whoever takes the chunk
    next has a token above all that were given out.
    """
    held = rows.get(LEASES, chunk_prefix(op.db_id, op.chunk_id))
    if op.token is not None and (held is None or held.token != op.token):
        raise MissingRow("That lease is not held any more.", db_id=op.db_id, chunk_id=op.chunk_id)
    if held is None:
        return False
    count_up(rows, LEASE_TOKENS)
    _drop_lease(rows, held)
    return True


def _drop_lease(rows: StagedRows, lease: LeaseRecord) -> None:
    rows.delete(LEASES, chunk_prefix(lease.db_id, lease.chunk_id))
    rows.delete(LEASES_BY_JOB, job_lease_key(lease.job_id, lease.db_id, lease.chunk_id))
