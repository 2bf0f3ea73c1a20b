"""Disk room of real logs (I9, I13): whatever becomes of appends, the books agree with the files."""

import asyncio
import contextlib
import errno
import random
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from app.core.base.errors import (
    Backpressure,
    DiskFull,
    LsnMismatch,
    QuotaExhausted,
    StorageFailure,
)
from app.core.base.events import Events
from app.core.coordination.checkpoint_demand import CheckpointDemand
from app.core.coordination.quota import StorageQuota
from app.core.coordination.wal_backlog import BacklogLimits, WalBacklog
from app.core.coordination.wal_room import WalRooms
from app.core.stores.wal.log import WalLog
from app.core.stores.wal.store import WalStore
from tests.helpers.fake_clock import FakeClock
from tests.helpers.open_files import open_files_below
from tests.unit.core.stores.wal.builders import Hold, Place, append, config, request, settled
from tests.unit.core.stores.wal.disks import FaultyDisk

KIB = 1024
QUOTA = 40 * KIB


class Counted:
    """A store whose logs take room of a quota."""

    def __init__(self, place: Place, store: WalStore, *, quota_bytes: int, budget: int) -> None:
        clock = FakeClock()
        self.place, self.store = place, store
        self.quota = StorageQuota(
            global_limit_bytes=quota_bytes, drain_limit_bytes=0, clock=clock, events=Events()
        )
        self.backlog = WalBacklog(
            BacklogLimits(budget_bytes=budget, trigger_ratio=0.4, overdue_seconds=30)
        )
        self.demand = CheckpointDemand()
        self.rooms = WalRooms(
            self.quota, self.backlog, self.demand, clock=clock, events=Events()
        )  # fmt: skip

    async def log(self, db_id: int, tenant: str = "acme") -> WalLog:
        return await self.store.open_log(
            config(db_id=db_id),
            self.place.catalog.of(db_id),
            room=self.rooms.open(db_id=db_id, tenant=tenant),
        )

    async def publish(self, log: WalLog) -> None:
        """As a checkpoint of all that is there."""
        await log.seal()
        ids = [info.segment_id for info in log.sealed_segments() if info.state == "sealed"]
        for segment_id in ids:
            self.place.catalog.checkpoint(segment_id, log.db_id)
        log.mark_checkpointed(ids)
        await log.remove(ids)

    def check(self) -> None:
        self.quota.check()
        files = sum(path.stat().st_size for path in self.place.root.rglob("*.wal"))
        seen = self.quota.snapshot()
        assert (seen.global_used_bytes, seen.files_by_kind["wal"]) == (files, files)
        assert self.backlog.total_bytes == sum(log.unpublished_bytes for log in self.store.logs())
        assert not any(entry.held_bytes for entry in self.backlog.dirty())


@pytest.fixture
async def counted(tmp_path: Path, disk: FaultyDisk):
    place = Place(root=tmp_path / "wal", disk=disk)
    async with place.store() as store:
        yield Counted(place, store, quota_bytes=QUOTA, budget=32 * KIB)


async def test_what_an_append_takes_is_charged_once_and_freed_with_its_segment(counted):
    log = await counted.log(1)
    await append(log, b"x" * 1000)
    counted.check()
    used = counted.quota.snapshot().tenants[0].used_bytes
    assert 1000 < used < 1300
    assert counted.backlog.get(1).bytes == used
    await counted.publish(log)
    counted.check()
    assert counted.quota.snapshot().global_used_bytes == 0


async def test_refusals_take_nothing(counted):
    log = await counted.log(1)
    assert (await append(log, b"x" * 1000)).last_lsn == 1
    before = counted.quota.snapshot().global_used_bytes
    with pytest.raises(LsnMismatch):
        await append(log, b"y", expected=7)
    with pytest.raises(Backpressure) as refused:
        await append(log, b"z" * 32 * KIB, per_entry=1)
    assert refused.value.fields["share_bytes"] == 32 * KIB
    counted.quota.set_tenant_limits("acme", limit_bytes=before + 10, job_limit_bytes=None)
    with pytest.raises(QuotaExhausted):
        await append(log, b"y")
    assert counted.demand.take_pressed() == {1}
    assert counted.demand.take_starved() == {"acme"}
    assert log.next_lsn == 2
    counted.check()


async def test_a_full_disk_gives_the_room_back(counted, disk):
    log = await counted.log(1)
    await append(log, b"one")
    disk.fail("write", errno.ENOSPC)
    with pytest.raises(DiskFull):
        await append(log, b"x" * 1000)
    counted.check()


async def test_a_replay_of_a_stored_append_needs_no_room(counted):
    log = await counted.log(1)
    first = await append(log, b"one", key=b"key")
    counted.quota.set_global_limit(1)
    again = await append(log, b"one", key=b"key")
    assert (again.first_lsn, again.replayed) == (first.first_lsn, True)
    counted.check()


async def test_a_dropped_log_takes_its_room_along(counted):
    log = await counted.log(1)
    other = await counted.log(2, tenant="zeta")
    await append(log, b"x" * 1000)
    await append(other, b"x")
    await counted.store.drop_log(1)
    counted.check()
    assert [one.tenant for one in counted.quota.snapshot().tenants] == ["zeta"]
    assert counted.backlog.get(1) is None


async def _cancel_at(
    hold: Hold,
    step: Coroutine[Any, Any, object],
    *,
    told: type[BaseException] = asyncio.CancelledError,
) -> None:
    """Whoever waits for the step leaves while the disk is at it."""
    task = asyncio.ensure_future(step)
    await hold.reached()
    task.cancel()
    await asyncio.sleep(0)
    hold.release()
    with pytest.raises(told):
        await task


async def test_the_room_of_a_removed_segment_comes_back_when_nobody_waits_for_it(counted, hold_at):
    log = await counted.log(1)
    await append(log, b"x" * 1000)
    await log.seal()
    counted.place.catalog.checkpoint(1, 1)
    log.mark_checkpointed([1])
    await _cancel_at(hold_at("wal.before_remove"), log.remove([1]))
    counted.check()
    assert counted.quota.snapshot().global_used_bytes == 0


async def test_a_removal_that_fails_is_fatal_when_nobody_waits_for_it(counted, disk, hold_at):
    log = await counted.log(1)
    await append(log, b"x")
    await log.seal()
    disk.fail("sync_directory", errno.EIO)
    await _cancel_at(hold_at("wal.before_remove"), log.remove([1]), told=StorageFailure)
    with pytest.raises(StorageFailure):
        await append(log, b"y")
    assert len(counted.place.fatal) == 1


async def test_a_log_whose_dropping_is_given_up_is_dropped_all_the_same(counted, hold_at):
    log = await counted.log(1)
    await append(log, b"x" * 1000)
    hold = hold_at("wal.before_write")
    late = asyncio.ensure_future(append(log, b"y"))
    await hold.reached()  # so that dropping waits for it
    dropping = asyncio.ensure_future(counted.store.drop_log(1))
    await asyncio.sleep(0)
    dropping.cancel()
    await asyncio.sleep(0)
    hold.release()
    with pytest.raises(asyncio.CancelledError):
        await dropping
    assert (await late).last_lsn == 2
    assert not (counted.place.root / "1").exists()
    counted.check()
    assert counted.backlog.get(1) is None
    assert open_files_below(counted.place.root) == []


class Writers:
    """Appends at random: more than fits, conditions that fail, full disks, callers that leave."""

    def __init__(self, counted: Counted, disk: FaultyDisk, logs: list[WalLog], seed: int) -> None:
        self.counted, self.disk, self.logs = counted, disk, logs
        self.chance = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.publishing = asyncio.Lock()

    async def write(self, number: int) -> None:
        for _ in range(12):
            log = self.chance.choice(self.logs)
            if self.chance.random() < 0.1:
                self.disk.fail("write", errno.ENOSPC)
            self.outcomes[await self.append(log, number)] += 1
            used = self.counted.quota.snapshot().global_used_bytes
            assert used <= QUOTA + 6 * KIB  # headers and trailers of six logs come on top
            if self.chance.random() < 0.05:
                await self.publish(log)

    async def append(self, log: WalLog, number: int) -> str:
        record = b"x" * self.chance.randrange(1, 3000)
        expected = 1 if self.chance.random() < 0.2 else None
        key = f"{number % 9}".encode() if self.chance.random() < 0.1 else None
        patience = 0.001 if self.chance.random() < 0.1 else 30
        try:
            async with asyncio.timeout(patience):
                await log.append(request(record, expected=expected, key=key, body=key or b""))
        except (Backpressure, QuotaExhausted, DiskFull, LsnMismatch) as error:
            return error.code
        except TimeoutError:
            return "left"
        return "stored"

    async def publish(self, log: WalLog) -> None:
        async with self.publishing:
            with contextlib.suppress(DiskFull):
                await self.counted.publish(log)


@pytest.mark.parametrize("seed", range(3))
async def test_fifty_writers_leak_nothing(counted, disk, seed):
    """Fault row 5."""
    logs = [await counted.log(db_id, tenant=f"t{db_id % 3}") for db_id in range(1, 7)]
    writers = Writers(counted, disk, logs, seed)
    async with asyncio.TaskGroup() as group:
        for number in range(50):
            group.create_task(writers.write(number))
    for log in logs:
        await settled(log)
    assert writers.outcomes["stored"] > 20
    assert len(writers.outcomes) >= 4, writers.outcomes
    counted.check()
    disk.clear()
    for log in logs:
        await counted.publish(log)
    counted.check()
    assert counted.quota.snapshot().global_used_bytes == 0
