"""The limiter of background reads, on a clock that only tests move."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from app.core.base.events import Events
from app.core.coordination.bandwidth import (
    BURST_SECONDS,
    ByteBucket,
    ReadLimits,
    RemoteReadLimiter,
)
from app.core.stores.remote.limited import LimitedReads
from tests.helpers.fake_clock import FakeClock
from tests.helpers.memory_remote import MemoryRemote

KB = 1000


class Switch:
    def __init__(self):
        self.open = False

    def is_open(self):
        return self.open


class Readers:
    """Scans that read without end; how much each got is counted."""

    def __init__(self, limiter, clock, group):
        self.limiter, self.clock, self.group = limiter, clock, group
        self.got: dict[str, int] = {}
        self.stack = AsyncExitStack()

    async def add(self, name, *, tenant="acme", piece=10 * KB, width=1, rate=None,
                  priority="normal"):  # fmt: skip
        scan = await self.stack.enter_async_context(
            self.limiter.scan(tenant, bytes_per_second=rate, priority=priority)
        )
        self.got[name] = 0
        for _ in range(width):
            self.group.create_task(self.read(name, scan, piece))

    async def read(self, name, scan, piece):
        while True:
            async with scan.request(piece):
                self.got[name] += piece
            await asyncio.sleep(0)

    async def run(self, seconds, step=0.01):
        for _ in range(round(seconds / step)):
            self.clock.advance(step)
            for _ in range(12):
                await asyncio.sleep(0)


@pytest.fixture
def clock():
    return FakeClock()


class Stop(Exception):
    pass


class Bench:
    """`async with Bench(…) as readers:`; the readers' tasks are gone behind it."""

    def __init__(self, clock, *, rate=None, requests=8, total=16, pause=None, told=None):
        self.clock = clock
        self.limiter = RemoteReadLimiter(
            ReadLimits(bytes_per_second=rate, requests_max=requests, requests_total_max=total),
            pause=pause, clock=clock,
            events=Events(*([] if told is None else [lambda *event: told.append(event)])),
        )  # fmt: skip

    async def __aenter__(self):
        await self.limiter.__aenter__()
        self.group = asyncio.TaskGroup()
        await self.group.__aenter__()
        self.readers = Readers(self.limiter, self.clock, self.group)
        return self.readers

    async def __aexit__(self, *error):
        for task in list(self.group._tasks):
            task.cancel()
        await self.group.__aexit__(*error)
        await self.readers.stack.aclose()
        assert self.limiter.active_scans == 0
        assert self.limiter._in_flight == 0
        await self.limiter.__aexit__(*error)


@pytest.mark.parametrize("piece", [1 * KB, 10 * KB, 40 * KB])
async def test_a_tenants_ceiling_is_held_within_ten_percent(clock, piece):
    async with Bench(clock, rate=200 * KB) as readers:
        await readers.add("a", piece=piece, width=4)
        await readers.add("b", piece=piece)
        await readers.run(10)
        total = sum(readers.got.values())
    assert 0.97 * 2000 * KB <= total <= 1.1 * 2000 * KB


async def test_a_scans_own_ceiling_has_a_burst_of_less_than_a_second(clock):
    async with Bench(clock) as readers:
        await readers.add("a", rate=100 * KB, piece=5 * KB, width=8)
        await readers.run(0.01)
        at_once = readers.got["a"]
        await readers.run(9.99)
        assert at_once <= BURST_SECONDS * 100 * KB + 5 * KB
        assert 0.97 * 1000 * KB <= readers.got["a"] <= 1000 * KB + BURST_SECONDS * 100 * KB


async def test_scans_of_a_tenant_share_by_bytes_whatever_their_requests(clock):
    async with Bench(clock, rate=400 * KB) as readers:
        await readers.add("small", piece=2 * KB, width=2)
        await readers.add("large", piece=50 * KB, width=8)
        await readers.run(10)
        small, large = readers.got["small"], readers.got["large"]
    assert 0.9 < small / large < 1.1


async def test_one_that_comes_later_is_not_paid_for_the_time_before(clock):
    async with Bench(clock, rate=400 * KB) as readers:
        await readers.add("early")
        await readers.run(5)
        await readers.add("late")
        before = readers.got["early"]
        await readers.run(5)
        early, late = readers.got["early"] - before, readers.got["late"]
    assert 0.9 < early / late < 1.1


async def test_a_low_scan_gets_a_quarter_of_a_normal_one(clock):
    async with Bench(clock, rate=400 * KB) as readers:
        await readers.add("low", priority="low", piece=4 * KB, width=4)
        await readers.add("normal", piece=4 * KB, width=4)
        await readers.run(10)
        assert 3.5 < readers.got["normal"] / readers.got["low"] < 4.5


async def test_a_scan_with_a_ceiling_leaves_the_rest_to_others(clock):
    async with Bench(clock, rate=400 * KB) as readers:
        await readers.add("bounded", rate=50 * KB, piece=5 * KB)
        await readers.add("free")
        await readers.run(10)
        assert readers.got["bounded"] <= 525 * KB
        assert readers.got["free"] >= 3300 * KB


async def test_tenants_do_not_share_a_ceiling(clock):
    async with Bench(clock, rate=100 * KB) as readers:
        await readers.add("a", tenant="acme")
        await readers.add("b", tenant="bolt")
        await readers.run(5)
        assert all(470 * KB <= got <= 550 * KB for got in readers.got.values())


async def test_requests_at_once_are_bounded_for_a_tenant_and_for_all(clock):
    held: list[asyncio.Event] = []

    async def hold(scan):
        async with scan.request(1):
            held.append(asyncio.Event())
            await held[-1].wait()

    async with Bench(clock, requests=3, total=4) as readers, asyncio.TaskGroup() as group:
        limiter = readers.limiter
        async with (
            limiter.scan("acme", bytes_per_second=None, priority="normal") as one,
            limiter.scan("bolt", bytes_per_second=None, priority="normal") as other,
        ):
            tasks = [group.create_task(hold(one)) for _ in range(5)]
            await asyncio.sleep(0)
            assert len(held) == 3
            tasks += [group.create_task(hold(other)) for _ in range(2)]
            await asyncio.sleep(0)
            assert len(held) == 4
            held[0].set()
            for _ in range(5):
                await asyncio.sleep(0)
            assert len(held) == 5
            while not all(task.done() for task in tasks):
                for event in held:
                    event.set()
                await asyncio.sleep(0)


async def test_a_waiter_that_leaves_holds_up_nobody(clock):
    async with Bench(clock, rate=100 * KB) as readers, asyncio.TaskGroup() as group:
        limiter = readers.limiter
        async with limiter.scan("acme", bytes_per_second=None, priority="normal") as scan:

            async def read(size):
                async with scan.request(size):
                    return size

            assert await read(25 * KB) == 25 * KB
            first = group.create_task(read(25 * KB))
            second = group.create_task(read(10 * KB))
            await asyncio.sleep(0)
            first.cancel()
            for _ in range(3):
                await asyncio.sleep(0)
            clock.advance(0.101)
            assert await second == 10 * KB


async def test_one_that_is_cancelled_as_its_turn_comes_gets_none(clock):
    async with Bench(clock, requests=1) as readers, asyncio.TaskGroup() as group:
        limiter = readers.limiter
        async with limiter.scan("acme", bytes_per_second=None, priority="normal") as scan:

            async def read():
                async with scan.request(1):
                    return True

            async with scan.request(1):
                waiting, behind = group.create_task(read()), group.create_task(read())
                await asyncio.sleep(0)
                waiting.cancel()  # it learns of it only after the request was given back
            assert await behind
            assert waiting.cancelled()


async def test_a_pause_holds_every_scan_and_ends(clock):
    switch = Switch()
    async with Bench(clock, pause=switch) as readers:
        await readers.add("a", rate=100 * KB, piece=KB)
        await readers.run(1)
        switch.open = True
        before = readers.got["a"]
        await readers.run(2)
        assert readers.got["a"] <= before + KB
        switch.open = False
        await readers.run(1)
        assert readers.got["a"] >= before + 90 * KB


async def test_a_tenant_that_scans_in_small_parts_gets_no_more(clock):
    got = 0
    async with Bench(clock, rate=100 * KB) as readers:
        limiter = readers.limiter

        async def often():
            nonlocal got
            while True:
                async with (
                    limiter.scan("acme", bytes_per_second=None, priority="normal") as scan,
                    scan.request(10 * KB),
                ):
                    got += 10 * KB

        readers.group.create_task(often())
        await readers.run(5)
        assert got <= 1.1 * 500 * KB
    clock.advance(60)
    async with limiter.scan("bolt", bytes_per_second=None, priority="normal"):
        assert list(limiter._tenants) == ["bolt"]


async def test_what_was_read_is_told_second_by_second(clock):
    told = []
    async with Bench(clock, rate=100 * KB, told=told) as readers:
        await readers.add("a", piece=5 * KB)
        await readers.run(5)
    rates = [fields["bytes_per_second"] for name, _, fields in told if name == "cold_scan.measured"]
    assert len(rates) in {4, 5}
    assert all(90 * KB <= rate <= 130 * KB for rate in rates)


async def test_a_large_read_is_cut_to_what_a_burst_holds(clock):
    remote = MemoryRemote()
    remote.objects["blob"] = bytes(range(256)) * 400
    async with Bench(clock) as readers:
        limiter = readers.limiter
        async with limiter.scan("acme", bytes_per_second=40 * KB, priority="normal") as scan:
            assert scan.piece_bytes_max == 5 * KB
            store = LimitedReads(remote, scan)
            task = readers.group.create_task(store.get_blob("blob", first=100, length=42 * KB))
            await readers.run(0.7)
            assert not task.done()
            await readers.run(0.2)
            assert task.result() == remote.objects["blob"][100 : 100 + 42 * KB]


def test_a_bucket_without_a_rate_never_waits(clock):
    bucket = ByteBucket(None, clock=clock)
    bucket.take(1 << 60)
    assert bucket.wait_seconds(1 << 60) == 0
    assert bucket.is_full
