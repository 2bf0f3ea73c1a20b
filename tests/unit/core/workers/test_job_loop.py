"""The loop that claims jobs lives with a manifest that takes no writes for a while."""

import asyncio
from contextlib import asynccontextmanager
from typing import Any

import pytest

from app.core.base.errors import BopError, DiskFull, ManifestBusy, ManifestFull, StorageFailure
from app.core.base.events import Events
from app.core.stores.manifest.records import JobRecord
from app.core.workers.job_loop import JobLoop
from tests.helpers.fake_clock import FakeClock

JOB = JobRecord(
    job_id="J", kind="create_checkpoint", tenant="t", database="d", db_id=1, created_at_us=0
)


class Queue:
    """Gives out one job, once it has refused as often as it was told to."""

    aside_count = 0

    def __init__(self, *refusals: Exception) -> None:
        self.refusals, self.jobs = list(refusals), [JOB]
        self.woken = asyncio.Event()

    async def claim(self) -> JobRecord | None:
        if self.refusals:
            self.wake()  # as the queue does: the job waits again
            raise self.refusals.pop(0)
        return self.jobs.pop() if self.jobs else None

    def next_eligible_at(self) -> float | None:
        return None

    def wake(self) -> None:
        self.woken.set()

    async def wait_for_work(self) -> None:
        await self.woken.wait()
        self.woken.clear()


class Runner:
    def __init__(self) -> None:
        self.ran = asyncio.Event()

    async def run(self, job: JobRecord) -> None:
        self.ran.set()


async def ready() -> None:
    pass


@asynccontextmanager
async def looping(queue: Queue, runner: Runner, clock: FakeClock):
    parts: tuple[Any, Any] = queue, runner
    loop = JobLoop(*parts, ready=ready, clock=clock, events=Events(), concurrency=2)
    task = asyncio.get_running_loop().create_task(loop.run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})


@pytest.mark.parametrize("refusal", [ManifestFull(), ManifestBusy(), DiskFull()])
async def test_a_claim_that_is_turned_away_is_made_again(refusal: BopError):
    clock, queue, runner = FakeClock(), Queue(refusal, refusal), Runner()
    async with looping(queue, runner, clock) as task:
        for left in (1, 0):
            await clock.until_sleeping()  # it does not try in a busy loop
            assert len(queue.refusals) == left
            clock.advance(1)
        await runner.ran.wait()
        assert not task.done()


async def test_a_failure_of_the_disk_ends_it():
    clock, queue, runner = FakeClock(), Queue(StorageFailure("EIO")), Runner()
    async with looping(queue, runner, clock) as task:
        await asyncio.wait({task})
        assert isinstance(task.exception(), StorageFailure)
