"""The collector's loop: rounds on demand, its own time, a jump of the clock (fault row 42)."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app.core.base.errors import NotReady, OwnershipLost, RemoteUnavailable
from app.core.base.events import Events
from app.core.retention.collector import BlobCollector
from app.core.retention.orphans import OrphanSweep
from app.core.stores.manifest import ops
from app.core.stores.manifest.records import Retention
from app.core.stores.manifest.store import ManifestStore
from app.core.workers.collector import Collector, RoundRequest
from tests.unit.core.retention.test_collector import Owner, Remote
from tests.unit.core.retention.world import World
from tests.unit.core.stores.manifest.builders import FakeClock, batch, open_store, retire

HOUR = 3600.0


class House:
    def __init__(self, store: ManifestStore, clock: FakeClock) -> None:
        self.world = World(store, clock=clock)
        self.clock, self.store = clock, store
        self.remote, self.owner = Remote(), Owner()
        self.told: list[str] = []
        self.collector = self.made()

    def made(self) -> Collector:
        """As after a restart: nothing is known but what the manifest keeps."""
        events = Events(lambda name, level, fields: self.told.append(name))
        blobs = BlobCollector(
            self.store, lambda: self.remote, self.owner, local=self, events=events, grace_us=0
        )
        return Collector(
            self.store,
            retention=self.world.retention,
            blobs=blobs,
            orphans=OrphanSweep(self.store, lambda: self.remote),
            clock=self.clock,
            events=events,
            interval_seconds=HOUR,
            grace_us=0,
            orphan_age_seconds=0,
        )

    async def forget(self, sha256: str) -> None:
        del sha256

    def pass_time(self, seconds: float) -> None:
        self.clock.wall_seconds += seconds
        self.clock.monotonic_seconds += seconds

    async def round(self, **request: Any) -> Any:
        return await self.collector.round(RoundRequest(everything=True, **request))


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    clock = FakeClock()
    store = await open_store(tmp_path / "manifest", clock=clock)
    yield House(store, clock)
    await store.aclose()


async def two_generations(house: House) -> int:
    """The older of them is due an hour after it was superseded."""
    db_id = await house.world.create(Retention(keep_seconds=3600, minimum_generations=1))
    for _ in range(2):
        await house.world.publish(db_id, 0, "base")
    await house.remote.add("base-1-0-1", "base-1-0-2")
    return db_id


async def test_a_round_expires_and_deletes(house: House) -> None:
    await two_generations(house)
    assert (await house.round()).removed.generations == 0
    house.pass_time(HOUR)
    report = await house.round()
    assert (report.removed.generations, report.collected.deleted, report.waiting) == (1, 2, 0)
    assert set(house.remote.objects) == {"base-1-0-2"}
    assert house.collector.lag_seconds() == 0


@pytest.mark.parametrize("jump", [HOUR, -HOUR])
async def test_a_jump_of_the_clock_pauses_until_it_is_accepted(house: House, jump: float) -> None:
    await two_generations(house)
    await house.round()
    house.clock.wall_seconds += jump
    for _ in range(2):
        report = await house.round()
        assert report.time.paused
        assert report.removed.generations == 0
    assert house.told.count("collection.paused") == 1
    assert house.collector.paused
    house.collector = house.made()
    assert (await house.round()).time.paused  # a restart changes nothing about it
    report = await house.round(accept_clock=True)
    assert not report.time.paused
    assert report.removed.generations == (1 if jump > 0 else 0)
    assert len(house.remote.objects) == (1 if jump > 0 else 2)


async def test_a_clock_set_forward_while_it_was_down_counts_up_to_a_day(house: House) -> None:
    await house.world.create(Retention(keep_seconds=2 * 86_400, minimum_generations=1))
    for _ in range(2):
        await house.world.publish(1, 0, "base")
    await house.round()
    house.clock.wall_seconds += 365 * 86_400
    house.collector = house.made()
    assert (await house.round()).removed.generations == 0


async def test_who_asks_is_answered_and_told_of_failures(house: House) -> None:
    running = asyncio.create_task(house.collector.run())
    async with asyncio.timeout(10):
        for _ in range(2):  # between them the first round by itself ends
            assert (await house.collector.ask(RoundRequest())).waiting == 0
        await house.remote.add("k")
        await house.store.commit(batch(retire("k", eligible_at_us=5), ops.DoomBlob(key="k")))
        house.remote.unavailable = True
        with pytest.raises(RemoteUnavailable):
            await house.collector.ask(RoundRequest())
        house.remote.unavailable = False
        assert (await house.collector.ask(RoundRequest())).collected.deleted == 1
        await house.store.commit(batch(retire("k", eligible_at_us=5), ops.DoomBlob(key="k")))
        house.owner.lost = True
        with pytest.raises(NotReady):
            await house.collector.ask(RoundRequest())
        with pytest.raises(OwnershipLost):
            await running


async def test_an_idle_round_writes_nothing(house: House) -> None:
    await two_generations(house)
    await house.round()
    writes = house.store._writer.groups
    house.pass_time(1)
    house.remote.unavailable = True
    await house.collector.round(RoundRequest())
    assert house.store._writer.groups == writes
    assert house.remote.listings == 0
