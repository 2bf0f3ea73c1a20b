"""The janitor: what no live job needs goes, at its time."""

import asyncio
import os

import pytest

from app.core.base import failpoints
from app.core.base.errors import StorageFailure
from app.core.base.events import Events
from app.core.base.tasks import BlockingPool
from app.core.coordination.quota import StorageQuota
from app.core.coordination.usage import UsageKind
from app.core.stores.local.scratch import ScratchStore
from app.core.workers.janitor import ScratchJanitor
from app.core.workers.supervisor import Supervisor
from tests.helpers.fake_clock import FakeClock

OLD, YOUNG, LIVE, HALF = (f"01J0000000000000000000000{letter}" for letter in "ABCD")


class House:
    def __init__(self, tmp_path, pool) -> None:
        self.root = tmp_path / "checkpoint_scratch"
        self.clock = FakeClock()
        self.told: list[tuple[str, object]] = []
        events = Events(lambda name, level, fields: self.told.append((name, fields.get("job_id"))))
        self.scratch = ScratchStore(self.root, pool=pool, clock=self.clock)
        self.quota = StorageQuota(
            global_limit_bytes=1000, drain_limit_bytes=0, clock=self.clock, events=Events()
        )
        self.live: set[str] = set()
        self.beats = 0
        self.janitor = ScratchJanitor(
            self.scratch,
            live_jobs=lambda: self.live,
            room=self.quota,
            clock=self.clock,
            events=events,
            heartbeat=self._beat,
        )

    def _beat(self) -> None:
        self.beats += 1

    async def make(self, job_id: str, *, age_seconds: float, size: int = 5) -> None:
        scratch = await self.scratch.create(job_id)
        scratch.write_blocking("chunk", [b"x" * size])
        at = self.clock.wall_ns() - round(age_seconds * 1e9)
        for path in (scratch.file("chunk"), scratch.path):
            os.utime(path, ns=(at, at))

    def left(self) -> list[str]:
        return sorted(path.name for path in self.root.iterdir())


@pytest.fixture
def pool():
    pool = BlockingPool("test", threads=2)
    yield pool
    pool.close_blocking()


@pytest.fixture
def house(tmp_path, pool):
    return House(tmp_path, pool)


async def test_removes_old_directories_of_no_live_job(house):
    await house.make(OLD, age_seconds=3600)
    await house.make(YOUNG, age_seconds=3599)
    await house.make(LIVE, age_seconds=90_000)
    await house.make(HALF, age_seconds=1, size=7)
    (house.root / HALF).rename(house.root / f"{HALF}.removing")
    house.live = {LIVE}
    report = await house.janitor.run_once()
    assert sorted(report.removed) == [OLD, HALF]
    assert (report.scanned, report.failed, report.removed_bytes) == (4, (), 12)
    assert house.left() == [YOUNG, LIVE]
    house.clock.advance(1)
    assert (await house.janitor.run_once()).removed == (YOUNG,)
    assert (await house.janitor.run_once()).removed == ()


async def test_what_was_charged_for_a_half_removed_directory_is_given_back(house):
    await house.make(HALF, age_seconds=1, size=7)
    (house.root / HALF).rename(house.root / f"{HALF}.removing")
    found = (house.root / f"{HALF}.removing" / "chunk").stat()
    house.quota.account(kind=UsageKind.SCRATCH, owner=HALF, tenant=None).charge(
        "chunk", device=found.st_dev, inode=found.st_ino, size_bytes=7
    )
    await house.janitor.run_at_start()
    assert house.quota.snapshot().global_used_bytes == 0


async def test_at_start_age_does_not_matter(house):
    await house.make(YOUNG, age_seconds=-50)  # even from the future
    await house.make(LIVE, age_seconds=90_000)
    house.live = {LIVE}
    assert (await house.janitor.run_at_start()).removed == (YOUNG,)
    assert house.left() == [LIVE]


async def test_an_interrupted_removal_is_finished_beside_a_live_jobs_new_directory(house):
    await house.make(LIVE, age_seconds=5000)
    (house.root / LIVE).rename(house.root / f"{LIVE}.removing")
    await house.make(LIVE, age_seconds=0)
    house.live = {LIVE}
    await house.janitor.run_once()
    assert house.left() == [LIVE]
    assert (house.root / LIVE / "chunk").exists()


async def test_a_job_that_came_alive_meanwhile_keeps_its_directory(house, monkeypatch):
    await house.make(OLD, age_seconds=5000)
    await house.make(LIVE, age_seconds=4000)

    def enqueue(name: str) -> None:
        if name == "janitor.before_remove":
            house.live = {LIVE}

    monkeypatch.setattr(failpoints, "fp", enqueue)
    assert (await house.janitor.run_once()).removed == (OLD,)
    assert house.left() == [LIVE]


async def test_one_that_cannot_be_removed_does_not_stop_the_others(house, monkeypatch):
    await house.make(OLD, age_seconds=5000)
    await house.make(HALF, age_seconds=4000)
    real = house.scratch.remove

    async def remove(job_id: str) -> int:
        if job_id == OLD:
            raise PermissionError(13, "denied")
        return await real(job_id)

    with monkeypatch.context() as patched:
        patched.setattr(house.scratch, "remove", remove)
        report = await house.janitor.run_once()
    assert (report.removed, report.failed) == ((HALF,), (OLD,))
    assert ("janitor.not_removed", OLD) in house.told
    assert (await house.janitor.run_once()).removed == (OLD,)


async def test_gives_back_what_dead_jobs_held(house):
    await house.quota.reserve(tenant="acme", job_id=OLD, size_bytes=30)
    await house.quota.reserve(tenant="acme", job_id=LIVE, size_bytes=40)
    await house.quota.reserve(tenant="acme", job_id=None, size_bytes=50)
    house.live = {LIVE}
    assert (await house.janitor.run_once()).released_bytes == 30
    assert house.told == [("quota.leak_released", OLD)]
    assert house.quota.snapshot().global_used_bytes == 90
    house.quota.check()


async def test_loop_runs_a_round_each_interval_and_survives_a_bad_one(house, monkeypatch):
    fatal: list[BaseException] = []
    died = asyncio.Event()
    async with Supervisor(
        clock=house.clock, events=Events(lambda *_: died.set()), on_fatal=fatal.append
    ) as supervisor:
        supervisor.start(house.janitor)
        await house.clock.until_sleeping()
        assert house.beats == 1
        await house.make(OLD, age_seconds=3500)
        house.clock.advance(299)
        assert house.left() == [OLD]
        house.clock.advance(1)
        await house.clock.until_sleeping()
        assert house.left() == []
        assert house.beats == 2

        async def broken() -> list[object]:
            raise PermissionError(13, "denied")

        with monkeypatch.context() as patched:
            patched.setattr(house.scratch, "list", broken)
            house.clock.advance(300)
            await house.clock.until_sleeping()
        assert house.told[-1] == ("janitor.failed", None)
        assert fatal == []

        async def dead_disk() -> list[object]:
            raise StorageFailure("the disk failed")

        monkeypatch.setattr(house.scratch, "list", dead_disk)
        house.clock.advance(300)
        await died.wait()
    assert [type(error) for error in fatal] == [StorageFailure]
