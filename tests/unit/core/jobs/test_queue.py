"""The job queue over a real manifest: who is claimed, when, and what a restart makes of it."""

import asyncio
from contextlib import asynccontextmanager

import msgspec
import pytest

from app.core.base.clock import Clock, SeededRandomness, SystemClock, wall_us
from app.core.base.errors import (
    Backpressure,
    JobAlreadyEnded,
    JobNotFound,
    ManifestBusy,
    QueueDrained,
)
from app.core.base.events import Events, bound
from app.core.base.ids import new_ulid
from app.core.jobs.feed import JobFeed
from app.core.jobs.queue import JobQueue
from app.core.stores.manifest.errors import CancelRequested, RunSuperseded
from app.core.stores.manifest.records import JobRecord
from app.core.stores.manifest.store import ManifestStore
from migrations.runner import load_steps
from tests.helpers.fake_clock import FakeClock

CLOCK, RANDOMNESS = SystemClock(), SeededRandomness(1)
WAIT_MAX = 3600


def job(db_id: int, *, tenant: str = "acme", kind="create_checkpoint") -> JobRecord:
    return JobRecord(
        job_id=new_ulid(CLOCK, RANDOMNESS), kind=kind, tenant=tenant, database=f"db{db_id}",
        db_id=db_id, created_at_us=wall_us(CLOCK),
    )  # fmt: skip


def raise_fatal(error: BaseException) -> None:
    raise error


@asynccontextmanager
async def opened(tmp_path, *, depth_max: int = 100, clock: Clock = CLOCK):
    manifest = await ManifestStore.open(
        tmp_path / "manifest", clock=clock, events=Events(), process_id=new_ulid(CLOCK, RANDOMNESS),
        map_bytes=1 << 26, max_readers=16, migrations=load_steps(), on_fatal=raise_fatal,
    )  # fmt: skip
    try:
        queue = JobQueue(
            manifest,
            clock=clock,
            events=Events(),
            feed=JobFeed(),
            depth_max=depth_max,
            retry_wait_seconds_max=WAIT_MAX,
        )
        await queue.load()
        yield queue
    finally:
        await manifest.aclose()


@pytest.fixture
async def queue(tmp_path):
    async with opened(tmp_path) as queue:
        yield queue


async def test_one_mutating_job_per_database_at_a_time(queue):
    first = await queue.enqueue(job(1), join=False)
    second = await queue.enqueue(job(1), join=False)
    other = await queue.enqueue(job(2), join=False)
    claimed = [await queue.claim(), await queue.claim()]
    assert {one.job_id for one in claimed if one} == {first.job_id, other.job_id}
    assert await queue.claim() is None
    done, _ = await queue.update(claimed[0], reason="t", changes={"state": "completed"})
    queue.give_back(done)
    follower = await queue.claim()
    assert follower is not None
    assert follower.job_id == second.job_id


async def test_a_job_keeps_which_request_asked_for_it(queue):
    with bound(request_id="me", trace_id="4bf9"):
        asked = await queue.enqueue(job(1), join=False)
    own = await queue.enqueue(job(2), join=False)
    assert [(one.request_id, one.trace_id) for one in (asked, own)] == [("me", "4bf9"), ("", "")]


async def test_tenants_take_turns(queue):
    for number in range(3):
        await queue.enqueue(job(number, tenant="loud"), join=False)
    await queue.enqueue(job(9, tenant="quiet"), join=False)
    turns = [await queue.claim() for _ in range(4)]
    assert "quiet" in [one.tenant for one in turns[:2] if one]


async def test_a_caller_joins_only_a_job_that_has_not_planned(queue):
    first = await queue.enqueue(job(1), join=True)
    assert (await queue.enqueue(job(1), join=True)).job_id == first.job_id
    claimed = await queue.claim()
    assert claimed is not None
    third = await queue.enqueue(job(1), join=True)
    assert third.job_id != first.job_id
    planned, _ = await queue.update(
        claimed, reason="t", changes={"state": "pending", "plan": b"a plan"}
    )
    queue.give_back(planned)
    assert (await queue.enqueue(job(1), join=True)).job_id == third.job_id


async def test_callers_at_the_same_time_share_one_job(queue):
    jobs = await asyncio.gather(*(queue.enqueue(job(1), join=True) for _ in range(20)))
    assert len({one.job_id for one in jobs}) == 1
    assert queue.depth == 1


async def test_a_full_queue_pushes_back(tmp_path):
    async with opened(tmp_path, depth_max=2) as queue:
        await queue.enqueue(job(1), join=True)
        await queue.enqueue(job(2), join=True)
        with pytest.raises(Backpressure) as refused:
            await queue.enqueue(job(3), join=True)
        assert refused.value.retry_after_seconds
        assert queue.depth == 2


async def test_a_full_queue_pushes_back_on_those_who_filled_it(tmp_path):
    async with opened(tmp_path, depth_max=2) as queue:
        await queue.enqueue(job(1), join=True)
        await queue.enqueue(job(2), join=True)
        await queue.enqueue(job(3, tenant="other"), join=True)  # it has nothing in it yet
        with pytest.raises(Backpressure):
            await queue.enqueue(job(4, tenant="other"), join=True)
        answers = await asyncio.gather(
            *(queue.enqueue(job(10 + n), join=True) for n in range(5)), return_exceptions=True
        )
        assert all(isinstance(answer, Backpressure) for answer in answers)
        assert queue.depth == 3


async def test_those_who_enqueue_at_once_do_not_pass_the_bound_together(tmp_path):
    async with opened(tmp_path, depth_max=3) as queue:
        await queue.enqueue(job(1), join=True)
        answers = await asyncio.gather(
            *(queue.enqueue(job(10 + n), join=True) for n in range(20)), return_exceptions=True
        )
        assert sum(isinstance(answer, JobRecord) for answer in answers) == 2
        assert queue.depth == 3


async def test_a_drained_queue_takes_nothing_new_and_lets_the_rest_end(tmp_path):
    async with opened(tmp_path) as queue:
        first = await queue.enqueue(job(1), join=True)
        await queue.set_draining(True)
        for again in (job(1), job(2)):  # not even to be joined: the caller must be told
            with pytest.raises(QueueDrained):
                await queue.enqueue(again, join=True)
    async with opened(tmp_path) as queue:
        assert queue.draining
        claimed = await queue.claim()
        assert claimed is not None
        assert claimed.job_id == first.job_id
        await queue.set_draining(False)
        await queue.enqueue(job(2), join=True)
    async with opened(tmp_path) as queue:
        assert not queue.draining


async def test_a_stale_run_changes_nothing(queue):
    await queue.enqueue(job(1), join=False)
    claimed = await queue.claim()
    assert claimed is not None
    stale = msgspec.structs.replace(claimed, run=claimed.run - 1)
    with pytest.raises(RunSuperseded):
        await queue.update(stale, reason="t", changes={"state": "completed"})


async def test_a_cancelled_job_in_flight_is_told_at_its_next_step(queue):
    await queue.enqueue(job(1), join=False)
    claimed = await queue.claim()
    assert claimed is not None
    told = await queue.request_cancel(claimed.job_id)
    assert told.cancel_requested
    with pytest.raises(CancelRequested):
        await queue.update(claimed, reason="t", changes={"stage": "staging"})
    ended, _ = await queue.update(
        claimed, reason="t", changes={"state": "cancelled"}, allow_cancelled=True
    )
    queue.give_back(ended)
    with pytest.raises(JobAlreadyEnded):
        await queue.request_cancel(claimed.job_id)
    with pytest.raises(JobNotFound):
        await queue.request_cancel(new_ulid(CLOCK, RANDOMNESS))


async def test_a_job_that_never_ran_is_cancelled_at_once_whoever_is_in_its_way(queue):
    in_the_way = await queue.enqueue(job(1), join=False)
    claimed = await queue.claim()
    assert claimed is not None
    assert claimed.job_id == in_the_way.job_id
    waiting = await queue.enqueue(job(1), join=True)
    told = queue.feed.subscribe(waiting.job_id)
    ended = await queue.request_cancel(waiting.job_id)
    await asyncio.wait_for(told, 1)
    assert (ended.state, ended.error.code) == ("cancelled", "cancelled")
    assert ended.finished_at_us is not None
    assert (queue.depth, queue.unfinished_ids()) == (0, {claimed.job_id})
    with pytest.raises(JobAlreadyEnded):
        await queue.request_cancel(waiting.job_id)
    joined = await queue.enqueue(job(1), join=True)
    assert joined.job_id != waiting.job_id


async def test_a_job_whose_cancellation_is_refused_still_waits(queue, monkeypatch):
    added = await queue.enqueue(job(1), join=False)

    async def refused(batch):
        raise ManifestBusy

    with monkeypatch.context() as patched:
        patched.setattr(queue._manifest, "commit", refused)
        with pytest.raises(ManifestBusy):
            await queue.request_cancel(added.job_id)
    claimed = await queue.claim()
    assert claimed is not None
    assert (claimed.job_id, claimed.cancel_requested) == (added.job_id, False)


async def test_a_restart_resumes_at_once_and_uses_up_no_attempt(tmp_path):
    async with opened(tmp_path) as queue:
        first, second = sorted((job(1), job(2)), key=lambda one: one.job_id)  # as `load` has them
        await queue.enqueue(first, join=False)
        waiting = await queue.enqueue(second, join=False)
        claimed = await queue.claim()
        assert claimed is not None
        await queue.update(claimed, reason="t", changes={"plan": b"kept", "stage": "uploading"})
    async with opened(tmp_path) as queue:
        assert queue.depth == 2
        both = [await queue.claim(), await queue.claim()]  # ids of one millisecond have no order
        again = next(one for one in both if one is not None and one.job_id == claimed.job_id)
        assert (again.attempts, again.run) == (1, 2)
        assert (again.plan, again.stage) == (b"kept", "uploading")
        assert queue.unfinished_ids() == {claimed.job_id, waiting.job_id}


async def test_a_retry_waits_for_its_time(queue):
    await queue.enqueue(job(1), join=False)
    claimed = await queue.claim()
    assert claimed is not None
    later = wall_us(CLOCK) + 3_600_000_000
    waiting, _ = await queue.update(
        claimed, reason="t", changes={"state": "pending", "not_before_us": later}
    )
    queue.give_back(waiting)
    assert await queue.claim() is None
    ready_at = queue.next_eligible_at()
    assert ready_at is not None
    assert CLOCK.monotonic() + 3590 < ready_at <= CLOCK.monotonic() + 3600


async def pausing(queue, clock):
    """A job that was tried, and is tried again in a minute."""
    added = msgspec.structs.replace(job(1), created_at_us=wall_us(clock))
    await queue.enqueue(added, join=False)
    claimed = await queue.claim()
    later = wall_us(clock) + 60_000_000
    waiting, _ = await queue.update(
        claimed, reason="t", changes={"state": "pending", "not_before_us": later}
    )
    queue.give_back(waiting)
    return waiting


@pytest.mark.parametrize("seconds", [-86_400, 86_400])
async def test_waits_and_ages_are_not_the_wall_clocks(tmp_path, seconds):
    clock = FakeClock()
    async with opened(tmp_path, clock=clock) as queue:
        await pausing(queue, clock)
        clock.jump_wall(seconds)
        clock.advance(59)
        assert await queue.claim() is None
        clock.advance(1)
        again = await queue.claim()
        assert again is not None
        assert queue.age_seconds(again) == 60


@pytest.mark.parametrize(("seconds", "left"), [(-86_400, WAIT_MAX), (-10, 70), (0, 60), (50, 10)])
async def test_a_clock_set_back_over_a_restart_prolongs_no_pause_beyond_the_longest(
    tmp_path, seconds, left
):
    clock = FakeClock()
    async with opened(tmp_path, clock=clock) as queue:
        waiting = await pausing(queue, clock)
    clock.jump_wall(seconds)
    async with opened(tmp_path, clock=clock) as queue:
        assert queue.wait_seconds(waiting) == left
        clock.advance(left - 1)
        assert await queue.claim() is None
        clock.advance(1)
        assert queue.wait_seconds(waiting) == 0
        assert await queue.claim() is not None


async def test_ages_go_on_over_a_restart_and_are_never_negative(tmp_path):
    clock = FakeClock()
    async with opened(tmp_path, clock=clock) as queue:
        added = msgspec.structs.replace(job(1), created_at_us=wall_us(clock))
        await queue.enqueue(added, join=False)
    clock.advance(30)
    async with opened(tmp_path, clock=clock) as queue:
        assert queue.age_seconds(added) == 30
    clock.jump_wall(-3600)
    async with opened(tmp_path, clock=clock) as queue:
        assert queue.age_seconds(added) == 0


async def test_a_cancelled_job_does_not_wait_for_its_time(queue):
    await queue.enqueue(job(1), join=False)
    claimed = await queue.claim()
    assert claimed is not None
    later = wall_us(CLOCK) + 3_600_000_000
    waiting, _ = await queue.update(
        claimed, reason="t", changes={"state": "pending", "not_before_us": later}
    )
    queue.give_back(waiting)
    await queue.request_cancel(claimed.job_id)
    again = await queue.claim()
    assert again is not None
    assert again.cancel_requested


async def test_to_cancel_a_job_that_ends_meanwhile_says_so(queue, monkeypatch):
    await queue.enqueue(job(1), join=False)
    claimed = await queue.claim()
    assert claimed is not None
    with queue._manifest.read() as view:
        before = view.job(claimed.job_id)
    await queue.update(claimed, reason="t", changes={"state": "completed"})
    monkeypatch.setattr(queue, "_read", lambda job_id: before)
    with pytest.raises(JobAlreadyEnded):
        await queue.request_cancel(claimed.job_id)


async def test_watchers_are_woken_by_each_change(queue):
    added = await queue.enqueue(job(1), join=False)
    woken = queue.feed.subscribe(added.job_id)
    claimed = await queue.claim()
    assert claimed is not None
    await asyncio.wait_for(woken, 1)


async def test_jobs_that_change_nothing_leave_a_place_for_those_that_do(tmp_path):
    async with opened(tmp_path) as queue:
        for number in (1, 2):
            await queue.enqueue(job(number, kind="verify_manifest"), join=False)
        await queue.enqueue(job(3), join=False)
        first, second = await queue.claim(), await queue.claim()
        assert {first.kind, second.kind} == {"verify_manifest", "create_checkpoint"}
        assert await queue.claim() is None
        verifying = first if first.kind == "verify_manifest" else second
        ended, _ = await queue.update(verifying, reason="t", changes={"state": "completed"})
        queue.give_back(ended)
        assert (await queue.claim()).kind == "verify_manifest"
