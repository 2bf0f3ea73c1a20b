"""On what a batch's commit depends: looked at inside its transaction, before it writes (I6)."""

from typing import TypeAlias, assert_never

from app.core.stores.manifest.apply_bookkeeping import is_live, leases_of
from app.core.stores.manifest.apply_catalogue import require_database
from app.core.stores.manifest.conditions import (
    ExpectEpoch,
    ExpectGeneration,
    ExpectJobState,
    ExpectLeases,
    ExpectNoIdempotency,
    ExpectNoLeases,
    ExpectNotDoomed,
    ExpectRun,
    ExpectSegmentState,
)
from app.core.stores.manifest.context import BatchContext
from app.core.stores.manifest.errors import (
    CancelRequested,
    EpochSuperseded,
    GenerationMoved,
    IdempotencyExists,
    KeyDoomed,
    LeaseConflict,
    LeaseLost,
    MissingRow,
    RunSuperseded,
    WrongState,
)
from app.core.stores.manifest.gc_queue import is_doomed
from app.core.stores.manifest.rows import StagedRows
from app.core.stores.manifest.tables import (
    IDEMPOTENCY,
    JOBS,
    LEASES,
    SEGMENTS,
    number_key,
    segment_key,
)

AnyPrecondition: TypeAlias = (
    ExpectGeneration
    | ExpectLeases
    | ExpectNoLeases
    | ExpectRun
    | ExpectJobState
    | ExpectNotDoomed
    | ExpectEpoch
    | ExpectSegmentState
    | ExpectNoIdempotency
)


def check(  # noqa: C901 - a case per condition
    rows: StagedRows, expected: AnyPrecondition, context: BatchContext
) -> None:
    """Raises the refusal if the expectation does not hold."""
    match expected:
        case ExpectGeneration():
            generation = require_database(rows, expected.db_id).generation
            if generation != expected.generation:
                raise GenerationMoved(
                    db_id=expected.db_id, generation=generation, expected=expected.generation
                )
        case ExpectLeases():
            _check_leases(rows, expected, context)
        case ExpectNoLeases():
            for _, lease in rows.scan(LEASES, number_key(expected.db_id)):
                if is_live(lease, context):
                    raise LeaseConflict(
                        holder=lease.job_id, db_id=lease.db_id, chunk_id=lease.chunk_id,
                        expires_at_us=lease.expires_at_us,
                    )  # fmt: skip
        case ExpectRun():
            _check_run(rows, expected)
        case ExpectJobState():
            job = rows.get(JOBS, expected.job_id.encode())
            if job is None:
                raise MissingRow("No such job.", job_id=expected.job_id)
            if job.state not in expected.states:
                raise WrongState(f"The job is {job.state}.", job_id=expected.job_id)
        case ExpectNotDoomed():
            for key in expected.keys:
                if is_doomed(rows, key):
                    raise KeyDoomed(key=key)
        case ExpectEpoch():
            if context.epoch != expected.epoch:
                raise EpochSuperseded(epoch=context.epoch, expected=expected.epoch)
        case ExpectSegmentState():
            segment = rows.get(SEGMENTS, segment_key(expected.db_id, expected.segment_id))
            if segment is None:
                raise MissingRow(
                    "No such segment.", db_id=expected.db_id, segment_id=expected.segment_id
                )
            if segment.state != expected.state:
                raise WrongState(
                    f"The segment is {segment.state}.",
                    db_id=expected.db_id,
                    segment_id=expected.segment_id,
                )
        case ExpectNoIdempotency():
            if rows.get(IDEMPOTENCY, expected.scope_hash) is not None:
                raise IdempotencyExists
        case _:
            assert_never(expected)


def _check_leases(rows: StagedRows, expected: ExpectLeases, context: BatchContext) -> None:
    held = {
        lease.chunk_id: lease
        for lease in leases_of(rows, expected.job_id)
        if lease.db_id == expected.db_id
    }
    if {(lease.chunk_id, lease.token) for lease in held.values()} != set(expected.tokens):
        raise LeaseLost(
            "The job's leases are not those it planned with.",
            job_id=expected.job_id,
            db_id=expected.db_id,
        )
    for lease in held.values():
        if not is_live(lease, context):
            raise LeaseLost(job_id=expected.job_id, db_id=lease.db_id, chunk_id=lease.chunk_id)


def _check_run(rows: StagedRows, expected: ExpectRun) -> None:
    job = rows.get(JOBS, expected.job_id.encode())
    if job is None or job.state != "in_flight" or job.run != expected.run:
        raise RunSuperseded(
            job_id=expected.job_id,
            run=None if job is None else job.run,
            expected=expected.run,
        )
    if job.cancel_requested and not expected.allow_cancelled:
        raise CancelRequested(job_id=expected.job_id)
