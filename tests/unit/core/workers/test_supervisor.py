"""No worker dies unseen; stops are ordered and bounded."""

import asyncio

import pytest

from app.core.base.errors import StorageFailure
from app.core.base.events import Events
from app.core.workers.supervisor import Supervisor, WorkerDied
from tests.helpers.fake_clock import FakeClock
from tests.helpers.wait import wait_until


class Loop:
    def __init__(self, name, *, on_stop=lambda name: None, stubborn=None, fail_in_stop=None):
        self.name = name
        self.error = asyncio.get_running_loop().create_future()
        self.started = asyncio.Event()
        self._on_stop = on_stop
        self._stubborn = stubborn
        self._fail_in_stop = fail_in_stop

    async def run(self) -> None:
        self.started.set()
        try:
            await self.error
        except asyncio.CancelledError:
            if self._stubborn is not None:
                await self._stubborn.wait()
            if self._fail_in_stop is not None:
                raise self._fail_in_stop from None
            self._on_stop(self.name)
            raise


class Watch:
    def __init__(self) -> None:
        self.fatal: list[BaseException] = []
        self.told: list[tuple[str, object]] = []
        self.died = asyncio.Event()
        self.clock = FakeClock()

    def supervisor(self, **options) -> Supervisor:
        def sink(name, level, fields):
            self.told.append((name, fields.get("worker")))
            if name == "supervisor.worker_died":
                self.died.set()

        return Supervisor(
            clock=self.clock, events=Events(sink), on_fatal=self.fatal.append, **options
        )


async def all_ended(supervisor: Supervisor) -> None:
    await wait_until(lambda: not any(health.running for health in supervisor.health()))


@pytest.fixture
async def watch():
    return Watch()


async def test_a_worker_that_raises_is_fatal_once(watch):
    async with watch.supervisor() as supervisor:
        first, second = Loop("first"), Loop("second")
        supervisor.start(first)
        supervisor.start(second)
        await first.started.wait()
        assert supervisor.failure is None
        bug = ValueError("bug")
        first.error.set_exception(bug)
        await watch.died.wait()
        assert supervisor.failure is bug
        assert watch.fatal == [bug]
        assert [(h.name, h.running) for h in supervisor.health()] == [
            ("first", False), ("second", True),
        ]  # fmt: skip
        watch.died.clear()
        second.error.set_exception(OSError("another"))
        await watch.died.wait()
    assert watch.fatal == [bug]
    assert watch.told == [("supervisor.worker_died", "first"), ("supervisor.worker_died", "second")]


async def test_a_worker_that_returns_is_fatal(watch):
    async with watch.supervisor() as supervisor:
        worker = Loop("janitor")
        supervisor.start(worker)
        await worker.started.wait()
        worker.error.set_result(None)
        await watch.died.wait()
    assert [type(error) for error in watch.fatal] == [WorkerDied]


async def test_a_worker_that_is_cancelled_by_others_is_fatal(watch):
    async with watch.supervisor() as supervisor:
        worker = Loop("janitor")
        supervisor.start(worker)
        await worker.started.wait()
        worker.error.cancel()
        await watch.died.wait()
    assert [type(error) for error in watch.fatal] == [WorkerDied]


async def test_stops_in_reverse_order_each_after_the_other(watch):
    order: list[str] = []
    async with watch.supervisor() as supervisor:
        workers = [Loop(name, on_stop=order.append) for name in ("a", "b", "c")]
        for worker in workers:
            supervisor.start(worker)
            await worker.started.wait()
    assert order == ["c", "b", "a"]
    assert watch.fatal == []
    assert watch.told == []
    with pytest.raises(RuntimeError, match="stopping"):
        supervisor.start(Loop("late"))
    await supervisor.stop()  # again is harmless


async def test_a_stuck_worker_does_not_hold_the_others(watch):
    release = asyncio.Event()
    order: list[str] = []
    async with watch.supervisor(stop_timeout_seconds=0.02) as supervisor:
        workers = [
            Loop("a", on_stop=order.append),
            Loop("stuck", stubborn=release),
            Loop("c", on_stop=order.append),
        ]
        for worker in workers:
            supervisor.start(worker)
            await worker.started.wait()
    assert order == ["c", "a"]
    assert watch.told == [("supervisor.worker_stuck", "stuck")]
    release.set()
    await all_ended(supervisor)


async def test_errors_while_stopping_are_told_and_only_fail_stop_ones_are_fatal(watch):
    broken_disk = StorageFailure("fsync failed")
    async with watch.supervisor() as supervisor:
        for worker in (
            Loop("a", fail_in_stop=ValueError("late")),
            Loop("b", fail_in_stop=broken_disk),
        ):
            supervisor.start(worker)
            await worker.started.wait()
    assert watch.told == [("supervisor.worker_died", "b"), ("supervisor.worker_stopped_badly", "a")]
    assert watch.fatal == [broken_disk]


async def test_a_cancelled_stop_still_tells_all(watch):
    order: list[str] = []
    release = asyncio.Event()
    supervisor = watch.supervisor(stop_timeout_seconds=60)
    for worker in (Loop("a", on_stop=order.append), Loop("stuck", stubborn=release)):
        supervisor.start(worker)
        await worker.started.wait()
    async with asyncio.TaskGroup() as group:
        stopping = group.create_task(supervisor.stop())
        await asyncio.sleep(0)
        stopping.cancel()
    await wait_until(lambda: order == ["a"])
    release.set()
    await all_ended(supervisor)


async def test_heartbeats_show_who_is_late(watch):
    supervisor = watch.supervisor()
    beat = supervisor.heartbeat("beating", late_after_seconds=60)
    watch.clock.advance(100)
    async with supervisor:
        supervisor.start(Loop("beating"))
        supervisor.start(Loop("silent"))
        with pytest.raises(RuntimeError, match="already"):
            supervisor.start(Loop("silent"))

        def seen():
            return [(h.name, h.heartbeat_age_seconds, h.late) for h in supervisor.health()]

        assert seen() == [("beating", 0, False), ("silent", None, False)]
        watch.clock.advance(60)
        assert seen()[0] == ("beating", 60, False)
        watch.clock.advance(1)
        assert seen()[0] == ("beating", 61, True)
        beat()
        assert seen()[0] == ("beating", 0, False)
