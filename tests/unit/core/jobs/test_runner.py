"""What an attempt's end makes of a job: done, tried again, given up, cancelled."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from app.core.base.clock import SeededRandomness, SystemClock, wall_us
from app.core.base.errors import (
    BopError,
    CorruptWal,
    DiskFull,
    QuotaExhausted,
    RemoteUnavailable,
    StorageFailure,
)
from app.core.base.events import Events
from app.core.base.ids import new_ulid
from app.core.base.tasks import run_beside
from app.core.jobs.feed import JobFeed
from app.core.jobs.queue import JobQueue
from app.core.jobs.runner import JobContext, JobRunner, RetryPolicy
from app.core.stores.manifest.ops import ManifestBatch, UpdateJob
from app.core.stores.manifest.records import JobRecord
from app.core.stores.manifest.store import ManifestStore
from migrations.runner import load_steps

CLOCK, RANDOMNESS = SystemClock(), SeededRandomness(1)


class Handler:
    """Runs what the test gives it, and counts its ways out."""

    def __init__(self, work: Callable[[JobContext], Any]) -> None:
        self.work = work
        self.paused = self.abandoned = 0

    async def run(self, context: JobContext):
        return await self.work(context)

    async def pause(self, context: JobContext):
        self.paused += 1
        return ()

    async def abandon(self, context: JobContext):
        self.abandoned += 1
        return (), {"plan": None}


class Bench:
    """A queue over a real manifest, one job, and a runner for it."""

    def __init__(self, manifest: ManifestStore) -> None:
        self.manifest = manifest
        self.queue = JobQueue(
            manifest,
            clock=CLOCK,
            events=Events(),
            feed=JobFeed(),
            depth_max=10,
            retry_wait_seconds_max=60,
        )

    async def run(
        self, work, *, attempts_max: int = 3, stall_seconds: float = 60.0, **fields: Any
    ) -> tuple[JobRecord, Handler]:
        """One attempt of a new job; the job as it then is."""
        job = JobRecord(
            job_id=new_ulid(CLOCK, RANDOMNESS), kind="create_checkpoint", tenant="t", database="d",
            db_id=1, created_at_us=wall_us(CLOCK), plan=b"plan", **fields,
        )  # fmt: skip
        await self.queue.enqueue(job, join=False)
        handler = Handler(work)
        return await self.attempt(
            handler, attempts_max=attempts_max, stall_seconds=stall_seconds
        ), handler

    async def attempt(
        self, handler: Handler, *, attempts_max: int = 3, stall_seconds: float = 60.0
    ) -> JobRecord:
        claimed = await self.queue.claim()
        assert claimed is not None
        runner = JobRunner(
            self.queue, {"create_checkpoint": handler}, clock=CLOCK, randomness=RANDOMNESS,
            events=Events(),
            policy=RetryPolicy(
                attempts_max=attempts_max, backoff_base_seconds=0.0001,
                backoff_cap_seconds=0.0001, stall_seconds=stall_seconds,
            ),
        )  # fmt: skip
        await runner.run(claimed)
        with self.manifest.read() as view:
            job = view.job(claimed.job_id)
        assert job is not None
        return job


def raise_fatal(error: BaseException) -> None:
    raise error


@pytest.fixture
async def bench(tmp_path):
    manifest = await ManifestStore.open(
        tmp_path / "manifest", clock=CLOCK, events=Events(), process_id="p", map_bytes=1 << 26,
        max_readers=8, migrations=load_steps(), on_fatal=raise_fatal,
    )  # fmt: skip
    yield Bench(manifest)
    await manifest.aclose()


def raising(error: BaseException):
    async def work(context: JobContext):
        raise error

    return work


async def test_a_job_that_ends_well_is_completed_with_its_result(bench):
    async def work(context: JobContext):
        await context.update(reason="t", changes={"stage": "staging"})
        return {"outcome": "published"}

    job, handler = await bench.run(work)
    assert (job.state, job.stage, job.result) == ("completed", None, {"outcome": "published"})
    assert job.finished_at_us is not None
    assert (handler.paused, handler.abandoned) == (0, 0)
    assert bench.queue.unfinished_ids() == set()


@pytest.mark.parametrize("error", [RemoteUnavailable("down"), QuotaExhausted("full")])
async def test_what_may_pass_is_tried_again_with_its_plan(bench, error):
    job, handler = await bench.run(raising(error))
    assert (job.state, job.attempts, job.plan) == ("pending", 1, b"plan")
    assert job.error is not None
    assert job.error.code == error.code
    assert (handler.paused, handler.abandoned) == (1, 0)
    assert bench.queue.unfinished_ids() == {job.job_id}


async def test_attempts_run_out(bench):
    job, handler = await bench.run(raising(RemoteUnavailable("down")), attempts_max=1)
    assert (job.state, job.plan) == ("failed", None)
    assert (handler.paused, handler.abandoned) == (0, 1)
    assert bench.queue.unfinished_ids() == set()


async def test_damage_is_not_tried_again(bench):
    job, handler = await bench.run(raising(CorruptWal("bits", segment_id=7)))
    assert job.state == "failed"
    assert job.error is not None
    assert (job.error.code, job.error.fields) == ("corrupt_wal", {"segment_id": 7})
    assert handler.abandoned == 1


async def test_a_bug_fails_its_job_without_telling_inner_details(bench):
    job, handler = await bench.run(raising(ZeroDivisionError("secret path")))
    assert job.state == "failed"
    assert job.error is not None
    assert job.error.code == "internal"
    assert "secret" not in job.error.detail
    assert handler.abandoned == 1


async def test_after_the_publication_it_only_goes_onwards(bench):
    job, handler = await bench.run(
        raising(CorruptWal("later")), attempts_max=1, published_generation=3
    )
    assert (job.state, handler.paused, handler.abandoned) == ("pending", 1, 0)


async def test_a_publication_under_way_when_its_attempt_is_given_up_counts(bench, monkeypatch):
    """Unknown is not failed (I15): its commit goes on, and the attempt waits for it."""
    held = threading.Event()

    async def work(context: JobContext):
        async def publish():
            monkeypatch.setattr(bench.manifest._writer, "_before_group", lambda: held.wait(5))
            await context.update(reason="t", changes={"published_generation": 3})
            raise AssertionError("it was cancelled meanwhile")

        async def lose_the_leases():
            asyncio.get_running_loop().call_later(0.05, held.set)
            raise RemoteUnavailable("down")

        await run_beside(publish(), lose_the_leases())

    job, handler = await bench.run(work, attempts_max=1)
    assert (job.state, job.published_generation, job.plan) == ("pending", 3, b"plan")
    assert (handler.paused, handler.abandoned) == (1, 0)


@pytest.mark.parametrize("error", [OSError(24, "too many open files"), DiskFull(), KeyError("x")])
@pytest.mark.parametrize(("attempts_max", "state"), [(3, "pending"), (1, "failed")])
async def test_a_way_out_that_fails_leaves_no_job_behind(
    bench, monkeypatch, error, attempts_max, state
):
    """What the handler could not give back is the janitor's; the row says how it ended."""

    async def fail(self: Handler, context: JobContext):
        raise error

    monkeypatch.setattr(Handler, "pause", fail)
    monkeypatch.setattr(Handler, "abandon", fail)
    job, _ = await bench.run(raising(RemoteUnavailable("down")), attempts_max=attempts_max)
    assert job.state == state
    assert job.error is not None
    assert job.error.code == "remote_unavailable"


async def test_how_an_attempt_ended_is_settled_once_the_disk_has_room(bench, monkeypatch):
    full = [DiskFull(), DiskFull()]
    commit = bench.manifest.commit

    async def refuse(batch: ManifestBatch):
        if batch.reason == "job.completed" and full:
            raise full.pop()
        return await commit(batch)

    monkeypatch.setattr(bench.manifest, "commit", refuse)
    monkeypatch.setattr("app.core.jobs.runner.SETTLE_SECONDS", 0.0)

    async def work(context: JobContext):
        return {"outcome": "published"}

    job, _ = await bench.run(work)
    assert (job.state, full) == ("completed", [])


async def test_a_cancelled_job_cleans_up_and_ends(bench):
    async def work(context: JobContext):
        await bench.queue.request_cancel(context.job.job_id)
        await context.update(reason="t", changes={"stage": "staging"})
        raise AssertionError("the update must be refused")

    job, handler = await bench.run(work)
    assert job.state == "cancelled"
    assert job.error is not None
    assert job.error.code == "cancelled"
    assert handler.abandoned == 1


async def test_a_job_that_waits_for_something_is_cancelled_where_it_waits(bench):
    async def work(context: JobContext):
        async with asyncio.TaskGroup() as group:
            group.create_task(bench.queue.request_cancel(context.job.job_id))
            group.create_task(asyncio.Event().wait())  # a store that does not answer
        raise AssertionError("it must not go on")

    async with asyncio.timeout(10):
        job, handler = await bench.run(work)
    assert (job.state, job.error.code, handler.abandoned) == ("cancelled", "cancelled", 1)


async def test_progress_does_not_outrun_a_cancellation(bench):
    async def work(context: JobContext):
        await bench.queue.request_cancel(context.job.job_id)
        context.touch()
        await asyncio.Event().wait()

    async with asyncio.timeout(10):
        job, _ = await bench.run(work)
    assert job.state == "cancelled"


async def test_what_has_published_is_not_interrupted(bench):
    async def work(context: JobContext):
        await context.update(reason="t", changes={"published_generation": 1})
        await bench.queue.request_cancel(context.job.job_id)
        for _ in range(3):
            await asyncio.sleep(0)
        return {"outcome": "published"}

    job, handler = await bench.run(work)
    assert (job.state, job.attempts, handler.abandoned) == ("completed", 1, 0)


async def test_what_publishes_as_it_is_interrupted_goes_on_to_its_end(bench):
    """Cancelled while the publishing commit is on its way: the row decides (I15)."""
    runs: list[int | None] = []

    async def work(context: JobContext):
        runs.append(context.job.published_generation)
        if context.job.published_generation is None:
            loop = asyncio.get_running_loop()
            loop.call_soon(bench.queue._interrupts[context.job.job_id])
            await context.update(reason="t", changes={"published_generation": 1})
            raise AssertionError("it must be interrupted")
        context.touch()
        return {"outcome": "published"}

    job, handler = await bench.run(work)
    assert (job.state, job.attempts, handler.abandoned) == ("completed", 1, 0)
    assert runs == [None, 1]


async def test_a_job_cancelled_between_its_claim_and_its_run_never_runs(bench):
    async def work(context: JobContext):
        raise AssertionError("it must not run")

    claim = bench.queue.claim

    async def claim_and_cancel():
        claimed = await claim()
        await bench.queue.request_cancel(claimed.job_id)
        return claimed

    bench.queue.claim = claim_and_cancel
    job, _ = await bench.run(work)
    assert job.state == "cancelled"


async def test_a_job_cancelled_before_its_turn_never_runs(bench):
    async def work(context: JobContext):
        raise AssertionError("it must not run")

    job, handler = await bench.run(work, cancel_requested=True)
    assert (job.state, handler.abandoned) == ("cancelled", 1)


async def test_an_attempt_in_which_nothing_moves_is_given_up_and_tried_again(bench):
    async def work(context: JobContext):
        await asyncio.Event().wait()

    job, handler = await bench.run(work, stall_seconds=0.05)
    assert (job.state, handler.paused) == ("pending", 1)
    assert job.error is not None
    assert job.error.code == "deadline_exceeded"


async def test_progress_keeps_a_long_attempt_alive(bench):
    async def work(context: JobContext):
        for _ in range(10):
            try:
                async with asyncio.timeout(0.03):
                    await asyncio.Event().wait()
            except TimeoutError:
                context.touch()
        return {}

    job, _ = await bench.run(work, stall_seconds=0.2)
    assert job.state == "completed"


async def test_past_its_deadline_a_job_fails_for_good(bench):
    async def work(context: JobContext):
        await asyncio.Event().wait()

    job, handler = await bench.run(work, deadline_us=wall_us(CLOCK) + 50_000)
    assert (job.state, handler.abandoned) == ("failed", 1)
    assert job.error is not None
    assert job.error.code == "deadline_exceeded"


async def test_a_fatal_error_leaves_the_row_as_it_is(bench):
    with pytest.raises(StorageFailure):
        await bench.run(raising(StorageFailure("EIO")))
    with bench.manifest.read() as view:
        [job] = view.unfinished_jobs()
    assert job.state == "in_flight"


async def test_a_shutdown_leaves_the_row_in_flight(bench):
    started = asyncio.Event()

    async def work(context: JobContext):
        started.set()
        await asyncio.Event().wait()

    async with asyncio.TaskGroup() as group:
        running = group.create_task(bench.run(work))
        await started.wait()
        running.cancel()
    with bench.manifest.read() as view:
        [job] = view.unfinished_jobs()
    assert (job.state, job.attempts) == ("in_flight", 1)


async def test_an_actor_of_an_earlier_run_ends_nothing(bench):
    async def work(context: JobContext):
        changes = {"state": "pending", "run": context.job.run + 1}
        await bench.manifest.commit(
            ManifestBatch(ops=(UpdateJob(job_id=context.job.job_id, changes=changes),), reason="t")
        )
        return {"outcome": "stale"}

    job, _ = await bench.run(work)
    assert (job.state, job.result) == ("pending", None)


async def test_errors_become_plain_values(bench):
    class Odd(BopError):
        code = "odd"

    job, _ = await bench.run(raising(Odd("x", number=1, thing=object())))
    assert job.error is not None
    assert job.error.fields == {"number": 1}
    assert msgspec.msgpack.encode(job)
