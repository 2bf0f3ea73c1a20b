"""Retries, the budget and the limit of concurrency, as values and under a fake clock."""

import asyncio
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.base.clock import SeededRandomness
from app.core.base.errors import (
    BopError,
    CorruptBlob,
    DiskFull,
    OutcomeUnknown,
    RemoteUnavailable,
)
from app.core.stores.remote.protocol import (
    BlobMissing,
    RemoteMisconfigured,
    RemoteThrottled,
    UploadCorrupted,
)
from app.core.stores.remote.requests import (
    ConcurrencyLimit,
    Retrier,
    RetryBudget,
    RetryPolicy,
)
from tests.helpers.fake_clock import FakeClock
from tests.helpers.remote import EventLog

POLICY = RetryPolicy(attempts_max=4, backoff_base_seconds=1.0, backoff_cap_seconds=3.0)


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (RemoteUnavailable(), 4), (RemoteThrottled(), 4), (OutcomeUnknown(), 4),
        (UploadCorrupted(), 2), (CorruptBlob(), 2),
        (RemoteMisconfigured(), 1), (BlobMissing(), 1), (DiskFull(), 1),
    ],
)  # fmt: skip
def test_which_errors_are_tried_again_how_often(error: BopError, attempts: int) -> None:
    assert [POLICY.gives_up(error, attempt=attempt) for attempt in range(1, attempts + 1)] == [
        *[False] * (attempts - 1),
        True,
    ]


class Bench:
    def __init__(self, *, budget: RetryBudget | None = None) -> None:
        self.clock = FakeClock()
        self.log = EventLog()
        self.budget = budget or RetryBudget()
        self.retrier = Retrier(
            POLICY, budget=self.budget, clock=self.clock, randomness=SeededRandomness(5),
            events=self.log.events,
        )  # fmt: skip


async def test_waits_with_full_jitter_and_then_succeeds() -> None:
    bench = Bench()
    times: list[float] = []

    async def request() -> str:
        times.append(bench.clock.monotonic())
        if len(times) < 4:
            raise RemoteUnavailable("no")
        return "done"

    async with asyncio.TaskGroup() as group:
        task = group.create_task(bench.retrier.run("get_blob", request))
        for _ in range(3):
            await bench.clock.until_sleeping()
            bench.clock.advance(3.0)
    assert task.result() == "done"
    waits = [entry["wait_seconds"] for entry in bench.log.named("remote.retried")]
    assert len(waits) == 3
    for wait, cap in zip(waits, (1.0, 2.0, 3.0), strict=True):
        assert 0.0 <= wait <= cap
    assert len(set(waits)) == 3


async def test_the_last_error_is_raised_and_nothing_waits_after_it() -> None:
    bench = Bench()
    calls = 0

    async def request() -> None:
        nonlocal calls
        calls += 1
        raise RemoteUnavailable(f"number {calls}")

    async def drive() -> None:
        with pytest.raises(RemoteUnavailable, match="number 4"):
            await bench.retrier.run("get_blob", request)

    async with asyncio.TaskGroup() as group:
        group.create_task(drive())
        for _ in range(3):
            await bench.clock.until_sleeping()
            bench.clock.advance(3.0)
    assert calls == 4


async def test_an_empty_budget_ends_retries_and_success_fills_it() -> None:
    bench = Bench(budget=RetryBudget(capacity=0.5, refund=0.25))

    async def fails() -> None:
        raise RemoteUnavailable("no")

    async def works() -> None:
        return None

    with pytest.raises(RemoteUnavailable):
        await bench.retrier.run("get_blob", fails)
    assert bench.log.named("remote.retried") == []
    bench = Bench(budget=RetryBudget(capacity=2.0, refund=0.5))
    assert bench.budget.take()
    assert bench.budget.take()
    assert not bench.budget.take()
    for _ in range(10):
        await bench.retrier.run("get_blob", works)
    assert bench.budget.tokens == 2.0


async def test_bugs_are_not_tried_again() -> None:
    bench = Bench()

    async def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await bench.retrier.run("get_blob", broken)


async def throttle(limit: ConcurrencyLimit) -> None:
    with pytest.raises(RemoteThrottled):
        async with limit.slot():
            raise RemoteThrottled


async def test_throttling_halves_and_success_adds() -> None:
    limit = ConcurrencyLimit(ceiling=16)
    await throttle(limit)
    assert limit.limit == 8
    await throttle(limit)
    await throttle(limit)
    await throttle(limit)
    await throttle(limit)
    assert limit.limit == 1
    for _ in range(3):
        async with limit.slot():
            pass
    assert limit.limit == 2
    for _ in range(1000):
        async with limit.slot():
            pass
    assert limit.limit == 16


async def test_one_burst_of_throttling_cuts_once() -> None:
    limit = ConcurrencyLimit(ceiling=16)
    release = asyncio.Event()

    async def request() -> None:
        with contextlib.suppress(RemoteThrottled):
            async with limit.slot():
                await release.wait()
                raise RemoteThrottled

    async with asyncio.TaskGroup() as group:
        for _ in range(16):
            group.create_task(request())
        await asyncio.sleep(0)
        release.set()
    assert limit.limit == 8


async def test_other_errors_leave_the_limit() -> None:
    limit = ConcurrencyLimit(ceiling=4)
    with pytest.raises(RemoteUnavailable):
        async with limit.slot():
            raise RemoteUnavailable
    assert (limit.limit, limit.in_flight) == (4, 0)


async def test_too_many_waiters_are_refused_at_once() -> None:
    limit = ConcurrencyLimit(ceiling=1, waiters_max=1)
    async with limit.slot(), asyncio.TaskGroup() as group:

        async def wait() -> None:
            async with limit.slot():
                pass

        waiter = group.create_task(wait())
        await asyncio.sleep(0)
        with pytest.raises(RemoteUnavailable):
            async with limit.slot():
                pass
        waiter.cancel()
    assert limit.in_flight == 0


class Crowd:
    """Requests that stay inside until told to end."""

    def __init__(self, limit: ConcurrencyLimit, *, ceiling: int) -> None:
        self.limit = limit
        self.ceiling = ceiling
        self.inside: list[asyncio.Future[bool]] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def request(self) -> None:
        end: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        with contextlib.suppress(RemoteThrottled):
            async with self.limit.slot():
                self.inside.append(end)
                try:
                    if await end:
                        raise RemoteThrottled
                finally:
                    self.inside.remove(end)

    async def step(self, name: str) -> None:
        match name:
            case "start":
                self.tasks.append(asyncio.get_running_loop().create_task(self.request()))
            case "cancel":
                for task in self.tasks[-2:]:
                    task.cancel()
            case _:
                for end in self.inside[:1]:
                    end.set_result(name == "throttle")
        for _ in range(6):
            await asyncio.sleep(0)
        assert self.limit.in_flight == len(self.inside) <= self.ceiling

    async def drain(self) -> None:
        while self.inside:
            await self.step("finish")
        await asyncio.gather(*self.tasks, return_exceptions=True)
        assert self.limit.in_flight == 0


@given(st.integers(1, 4), st.lists(st.sampled_from(["start", "finish", "cancel", "throttle"])))
def test_never_above_the_limit_and_nothing_leaks(ceiling: int, steps: list[str]) -> None:
    async def run() -> None:
        crowd = Crowd(ConcurrencyLimit(ceiling=ceiling), ceiling=ceiling)
        for name in steps:
            await crowd.step(name)
        async with asyncio.timeout(5):
            await crowd.drain()

    asyncio.run(run())
