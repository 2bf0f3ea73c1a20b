"""Checkpoints that nobody asked for: by timer, by WAL pressure, for want of room."""

from types import SimpleNamespace

import pytest

from app.core.base.clock import SeededRandomness
from app.core.base.errors import ManifestBusy
from app.core.base.events import Events
from app.core.coordination.checkpoint_demand import CheckpointDemand
from app.core.coordination.quota import StorageQuota
from app.core.coordination.wal_backlog import BacklogLimits, WalBacklog
from app.core.coordination.wal_room import WalRooms
from app.core.jobs.checkpoint_requests import CheckpointRequests
from app.core.jobs.feed import JobFeed
from app.core.jobs.queue import JobQueue
from app.core.stores.manifest.ops import CreateDatabase, ManifestBatch, PutTenant
from app.core.stores.manifest.records import FeatureFlags, TenantRecord
from app.core.workers.triggers import CheckpointTriggers
from tests.helpers.fake_clock import FakeClock
from tests.unit.core.stores.manifest.builders import open_store


class House:
    """The trigger worker over a real manifest and queue; logs are told of by hand."""

    def __init__(self, manifest, clock) -> None:
        self.manifest, self.clock = manifest, clock
        self.requested = 0
        events = Events(self._count)
        quota = StorageQuota(
            global_limit_bytes=5_000, drain_limit_bytes=0, clock=clock, events=events
        )
        self.backlog = WalBacklog(
            BacklogLimits(budget_bytes=4_000, trigger_ratio=0.25, overdue_seconds=30)
        )
        demand = CheckpointDemand()
        self.rooms = WalRooms(quota, self.backlog, demand, clock=clock, events=events)
        self.queue = JobQueue(
            manifest,
            clock=clock,
            events=events,
            feed=JobFeed(),
            depth_max=100,
            retry_wait_seconds_max=60,
        )
        self.triggers = CheckpointTriggers(
            manifest, self.queue,
            CheckpointRequests(
                self.queue, clock=clock, randomness=SeededRandomness(3), deadline_seconds=60
            ),
            backlog=self.backlog, demand=demand, clock=clock, events=events, interval_seconds=60,
        )  # fmt: skip

    def _count(self, name, level, fields) -> None:
        self.requested += name == "job.enqueued"

    async def add(self, name: str, tenant: str = "acme"):
        receipt = await self.manifest.commit(
            ManifestBatch(
                ops=(
                    CreateDatabase(
                        tenant=tenant, name=name, engine="append_only", page_size=0,
                        chunk_bytes=65_536, compression="none", created_at_us=1,
                    ),
                ),
                reason="database.created",
            )
        )  # fmt: skip
        return self.rooms.open(db_id=receipt.results[0], tenant=tenant)

    async def set_flags(self, tenant: str = "acme", **flags) -> None:
        row = TenantRecord(tenant=tenant, flags=FeatureFlags(**flags))
        await self.manifest.commit(ManifestBatch(ops=(PutTenant(row=row),), reason="flags"))
        self.triggers.flags_changed(tenant)

    async def pass_time(self, seconds: int, *, step: float = 1.0) -> list[tuple[str, str | None]]:
        """(database, reason) of the jobs that were asked for meanwhile."""
        before = {job.job_id for job in self.jobs()}
        for _ in range(int(seconds / step)):
            await self.triggers.run_once()
            self.clock.advance(step)
        await self.triggers.run_once()
        return [(job.database, job.reason) for job in self.jobs() if job.job_id not in before]

    def jobs(self):
        with self.manifest.read() as view:
            return sorted(view.jobs(limit=1000), key=lambda job: job.job_id)

    async def finish_all(self) -> None:
        while (job := await self.queue.claim()) is not None:
            await self.queue.update(job, reason="done", changes={"state": "completed"})
            self.queue.give_back(job)


@pytest.fixture
async def house(tmp_path):
    clock = FakeClock()
    manifest = await open_store(tmp_path / "manifest", clock=clock)
    yield House(manifest, clock)
    await manifest.aclose()


async def test_a_dirty_database_is_checkpointed_once_an_interval(house):
    room = await house.add("log")
    room.unpublished(100)
    assert await house.pass_time(60) == [("log", "timer")]
    await house.finish_all()
    assert await house.pass_time(60) == [("log", "timer")]  # still dirty: it took appends since
    room.unpublished(0)
    await house.finish_all()
    assert await house.pass_time(120) == []
    room.unpublished(1)
    assert await house.pass_time(60) == [("log", "timer")]


@pytest.mark.parametrize("busy_from", [0, 55])
async def test_a_manifest_without_a_reader_to_spare_only_delays(house, monkeypatch, busy_from):
    room = await house.add("log")
    read, begun = house.manifest.read, house.clock.monotonic()

    def busy():
        if begun + busy_from <= house.clock.monotonic() < begun + busy_from + 15:
            raise ManifestBusy
        return read()

    room.unpublished(100)
    with monkeypatch.context() as patched:
        patched.setattr(house.manifest, "read", busy)
        for _ in range(75):
            await house.triggers.run_once()
            house.clock.advance(1)
    assert [(job.database, job.reason) for job in house.jobs()] == [("log", "timer")]


async def test_an_unfinished_checkpoint_is_not_doubled(house):
    room = await house.add("log")
    room.unpublished(100)
    assert len(await house.pass_time(300)) == 1


async def test_idle_databases_cost_no_round(house, monkeypatch):
    for number in range(20):
        room = await house.add(f"db{number}")
        room.unpublished(0)
    reads = SimpleNamespace(count=0)
    monkeypatch.setattr(
        type(house.triggers), "_wanted",
        lambda self, db_id: setattr(reads, "count", reads.count + 1),
    )  # fmt: skip
    assert await house.pass_time(600, step=10) == []
    assert house.triggers.next_due() is None  # the loop sleeps until it is told something
    assert reads.count == 0


async def test_a_thousand_are_spread_over_the_interval(house):
    for number in range(200):
        (await house.add(f"db{number}")).unpublished(1)
    counts = [len(await house.pass_time(1)) for _ in range(60)]
    assert sum(counts) >= 99  # as many as the queue takes
    assert max(counts) <= 8


async def test_pressure_begins_a_checkpoint_at_once(house):
    room = await house.add("log")
    await house.set_flags(checkpoint_interval_seconds=0)
    room.unpublished(999)
    assert await house.pass_time(60) == []
    room.unpublished(1000)
    assert await house.pass_time(0) == [("log", "wal_pressure")]
    room.unpublished(2000)
    assert await house.pass_time(10) == []  # it waits already
    await house.finish_all()
    room.unpublished(100)
    assert await house.pass_time(10) == []
    room.unpublished(1500)
    assert await house.pass_time(0) == [("log", "wal_pressure")]


async def test_under_pressure_behind_a_running_checkpoint_it_is_looked_at_again(house):
    room = await house.add("log")
    await house.set_flags(checkpoint_interval_seconds=0)
    room.unpublished(1000)
    await house.pass_time(0)
    room.unpublished(100)
    room.unpublished(1200)  # crosses the trigger again while the first one runs
    assert await house.pass_time(5) == []
    await house.finish_all()
    assert await house.pass_time(5) == [("log", "wal_pressure")]


async def test_flags_switch_off_and_on_at_once(house):
    room = await house.add("log")
    other = await house.add("log", tenant="other")
    room.unpublished(100)
    other.unpublished(100)
    await house.set_flags(enable_checkpoints=False)
    assert len(await house.pass_time(60)) == 1  # the other tenant's
    room.unpublished(3000)
    assert await house.pass_time(10) == []
    await house.finish_all()
    other.unpublished(0)
    await house.set_flags(checkpoint_interval_seconds=5)
    assert (await house.pass_time(5))[-1] == ("log", "timer")


async def test_a_refused_append_is_answered_by_the_oldest_wal(house):
    await house.set_flags(checkpoint_interval_seconds=0)
    rooms = []
    for number in range(12):
        rooms.append(await house.add(f"db{number}"))
        rooms[-1].charge("wal", device=1, inode=number, size_bytes=400)
        rooms[-1].unpublished(10)
        house.clock.advance(1)
    assert rooms[11].hold(300) is None
    with pytest.raises(Exception, match="global storage limit"):
        await rooms[11].make_way(300)
    begun = await house.pass_time(0)
    assert sorted(begun) == [(f"db{number}", "wal_pressure") for number in range(8)]
    with pytest.raises(Exception, match="global storage limit"):
        await rooms[11].make_way(300)
    assert await house.pass_time(0) == []  # not for each refused append


async def test_a_drained_queue_is_asked_again_later(house):
    room = await house.add("log")
    await house.queue.set_draining(True)
    room.unpublished(1000)
    assert await house.pass_time(10) == []
    await house.queue.set_draining(False)
    assert await house.pass_time(5) == [("log", "wal_pressure")]


async def test_a_database_that_is_gone_is_let_be(house):
    room = await house.add("log")
    room.unpublished(1000)
    room.forget()
    assert await house.pass_time(120) == []
