"""History is bounded, and nothing that still counts is forgotten."""

import msgspec
import pytest

from app.core.base.clock import SeededRandomness, wall_us
from app.core.base.events import Events
from app.core.base.ids import new_ulid
from app.core.stores.manifest.admin_records import ApprovalRecord, AuditRecord
from app.core.stores.manifest.ops import (
    AppendAudit,
    CreateDatabase,
    EnqueueJob,
    ManifestBatch,
    PutApproval,
    PutIdempotency,
    RememberAppends,
)
from app.core.stores.manifest.records import IdempotencyRecord, JobRecord, RememberedAppend
from app.core.stores.manifest.store import ManifestStore
from app.core.workers.pruning import Pruning
from migrations.runner import load_steps
from tests.helpers.fake_clock import FakeClock

DAY_US = 24 * 3600 * 1_000_000
RANDOMNESS = SeededRandomness(3)


def raise_fatal(error: BaseException) -> None:
    raise error


@pytest.fixture
async def clock():
    return FakeClock()


@pytest.fixture
async def manifest(tmp_path, clock):
    store = await ManifestStore.open(
        tmp_path / "manifest", clock=clock, events=Events(), process_id="p", map_bytes=1 << 26,
        max_readers=8, migrations=load_steps(), on_fatal=raise_fatal,
    )  # fmt: skip
    yield store
    await store.aclose()


async def test_the_oldest_ended_jobs_go(manifest, clock):
    jobs = []
    for number in range(8):
        clock.advance(1)
        job = JobRecord(
            job_id=new_ulid(clock, RANDOMNESS), kind="create_checkpoint", tenant="t",
            database="d", db_id=1, created_at_us=wall_us(clock),
            state="pending" if number == 0 else "completed",
        )  # fmt: skip
        jobs.append(job)
        await manifest.commit(ManifestBatch(ops=(EnqueueJob(job=job),), reason="t"))
    pruning = Pruning(manifest, clock=clock, events=Events(), jobs_max=3, audit_max=9)
    assert await pruning.run_once() == 4
    with manifest.read() as view:
        kept = {job.job_id for job in view.jobs(limit=100)}
    assert kept == {jobs[0].job_id, *(job.job_id for job in jobs[-3:])}
    assert await pruning.run_once() == 0


async def test_what_came_faster_than_rounds_do_goes_at_once(manifest, clock):
    """More than a round looks at: each of them ends with no more than is kept."""
    for first in range(0, 1_300, 650):
        rows = [
            op
            for number in range(first, first + 650)
            for op in (
                EnqueueJob(
                    job=JobRecord(
                        job_id=new_ulid(clock, RANDOMNESS), kind="create_checkpoint", tenant="t",
                        database="d", db_id=1, created_at_us=number, state="completed",
                    )
                ),
                AppendAudit(
                    row=AuditRecord(
                        sequence=0, at_us=1, principal="ann", action="POST /x", path="/x",
                        request_id="r",
                    )
                ),
            )
        ]  # fmt: skip
        await manifest.commit(ManifestBatch(ops=tuple(rows), reason="t"))
    pruning = Pruning(manifest, clock=clock, events=Events(), jobs_max=3, audit_max=9)
    assert await pruning.run_once() == 1_297 + 1_291
    with manifest.read() as view:
        assert len(view.jobs(limit=2_000)) == 3
        assert len(view.audit_log(limit=2_000)) == 9


async def test_answers_and_appends_are_kept_for_a_day(manifest, clock):
    now = wall_us(clock)
    answer = IdempotencyRecord(
        scope_hash=b"a" * 16, body_hash=b"b" * 16, created_at_us=now, status=202, headers={},
        body=b"{}",
    )  # fmt: skip
    append = RememberedAppend(
        key_hash=b"k" * 16, body_hash=b"b" * 16, first_lsn=1, last_lsn=1, payload_bytes=5,
        appended_at_us=now,
    )  # fmt: skip
    later = msgspec.structs.replace(append, appended_at_us=now + DAY_US // 2)
    created = CreateDatabase(
        tenant="t", name="d", engine="append_only", page_size=0, chunk_bytes=1 << 26,
        compression="none", created_at_us=now,
    )  # fmt: skip
    receipt = await manifest.commit(ManifestBatch(ops=(created,), reason="t"))
    db_id = receipt.results[0]
    await manifest.commit(
        ManifestBatch(
            ops=(
                PutIdempotency(record=answer),
                RememberAppends(db_id=db_id, segment_id=1, appends=(append,)),
                RememberAppends(db_id=db_id, segment_id=2, appends=(append, later)),
            ),
            reason="t",
        )
    )
    pruning = Pruning(manifest, clock=clock, events=Events(), jobs_max=10, audit_max=9)
    clock.advance(24 * 3600 - 1)
    assert await pruning.run_once() == 0
    clock.advance(2)
    assert await pruning.run_once() == 2
    with manifest.read() as view:
        assert view.idempotency(answer.scope_hash) is None
        assert set(view.remembered_appends(db_id)) == {2}


async def test_the_audit_log_and_old_approvals_are_bounded(manifest, clock):
    action = AuditRecord(
        sequence=0, at_us=1, principal="ann", action="POST /x", path="/x", request_id="r"
    )
    for _ in range(12):
        await manifest.commit(ManifestBatch(ops=(AppendAudit(row=action),), reason="t"))
    approval = ApprovalRecord(
        approval_id=new_ulid(clock, RANDOMNESS), action="lease.release", tenant="t", database="d",
        db_id=1, chunk_id=0, job_id="J", token=1, reason="r", requested_by="ann",
        requested_at_us=wall_us(clock), expires_at_us=wall_us(clock),
    )  # fmt: skip
    await manifest.commit(ManifestBatch(ops=(PutApproval(row=approval),), reason="t"))
    pruning = Pruning(manifest, clock=clock, events=Events(), jobs_max=10, audit_max=9)
    assert await pruning.run_once() == 3
    with manifest.read() as view:
        assert [entry.sequence for entry in view.oldest_audit(100)] == list(range(4, 13))
    clock.advance(31 * 24 * 3600)
    assert await pruning.run_once() == 1
    with manifest.read() as view:
        assert view.approvals() == []
