"""An event loop on which waiting costs nothing and everything happens in one order.

Time jumps to the next timer when nothing is ready. What would run in a thread runs on the loop, a
seeded moment later, whole; who waits for it may be cancelled or overtaken meanwhile, as by a real
thread. Tasks and futures hash by their order of birth, so that sets of them have one order, too.
"""

import asyncio
import itertools
import random
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

import pytest

from app.core.base.tasks import BlockingPool
from app.core.stores.manifest.ops import ManifestBatch
from app.core.stores.manifest.writer import ManifestWriter, Reply

THREAD_SECONDS = 0.002
"""What a call in a thread takes on average."""


class Stuck(AssertionError):
    """Somebody waits, and nothing will ever happen."""


class _Task(asyncio.Task[Any]):
    _births = itertools.count()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._birth = next(self._births)
        super().__init__(*arguments, **options)

    def __hash__(self) -> int:
        return self._birth


class _Future(asyncio.Future[Any]):
    _births = itertools.count()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._birth = next(self._births)
        super().__init__(*arguments, **options)

    def __hash__(self) -> int:
        return self._birth


class _JumpingSelector(selectors.SelectSelector):
    """Instead of waiting for a file, tells the loop how long it would have waited."""

    def __init__(self) -> None:
        super().__init__()
        self.jump: Callable[[float], None] = lambda seconds: None

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Stuck("nothing is ready, and no timer runs")
        if timeout > 0:
            self.jump(timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self, *, now: float, source: random.Random) -> None:
        selector = _JumpingSelector()
        super().__init__(selector)
        selector.jump = self._jump
        self._now = now
        self._source = source
        self._pending: dict[object, dict[int, Callable[[], None]]] = {}
        self._calls = itertools.count()
        self.steps = 0
        """Turns of the loop."""
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        return self._now

    def _jump(self, seconds: float) -> None:
        self._now += seconds

    def _run_once(self) -> None:
        self.steps += 1
        super()._run_once()  # type: ignore[misc] # the one place where each turn passes

    @staticmethod
    def _make_task(
        loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], **options: Any
    ) -> _Task:
        return _Task(coroutine, loop=loop, **options)

    def create_future(self) -> _Future:
        return _Future(loop=self)

    def call_soon_threadsafe(self, *arguments: Any, **options: Any) -> Any:
        return self.call_soon(*arguments, **options)

    def run_in_executor(self, executor: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        """Also what `asyncio.to_thread` calls."""
        future = self.create_future()

        def run() -> None:
            try:
                result = function(*arguments)
            except BaseException as error:  # noqa: BLE001 - it is the waiter's, as in a thread
                if not future.done():
                    future.set_exception(error)
                    future.exception()  # one that nobody waits for is no complaint of the loop's
            else:
                if not future.done():
                    future.set_result(result)

        self.call_in_thread(executor, run)
        return future

    def call_in_thread(self, owner: object, run: Callable[[], None]) -> None:
        call, waiting = next(self._calls), self._pending.setdefault(owner, {})
        waiting[call] = run

        def start() -> None:
            if (it := waiting.pop(call, None)) is not None:
                it()

        self.call_later(self._source.expovariate(1 / THREAD_SECONDS), start)

    def finish_threads_of(self, owner: object) -> None:
        """What was begun ends now, as when a pool is joined."""
        waiting = self._pending.get(owner, {})
        while waiting:
            waiting.pop(next(iter(waiting)))()


def without_threads(patch: pytest.MonkeyPatch) -> None:
    """Pools and the manifest's writer run on the VirtualLoop."""
    patch.setattr(BlockingPool, "__init__", _pool_init)
    patch.setattr(BlockingPool, "submit", _pool_submit)
    patch.setattr(BlockingPool, "close_blocking", _pool_close)
    patch.setattr(ManifestWriter, "start", lambda writer: None)
    patch.setattr(ManifestWriter, "submit", _writer_submit(ManifestWriter.submit))
    patch.setattr(ManifestWriter, "close_blocking", _writer_close(ManifestWriter.close_blocking))


def _pool_init(pool: Any, name: str, *, threads: int) -> None:
    del threads
    pool._executor = f"{name}-{id(pool)}"  # only a name for `run_in_executor`
    pool._closed = False


def _pool_submit(pool: Any, function: Callable[..., object], *arguments: object) -> None:
    if pool._closed:
        raise RuntimeError("cannot schedule new futures after shutdown")
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop.call_in_thread(pool._executor, lambda: _told(function, arguments))


def _told(function: Callable[..., object], arguments: tuple[object, ...]) -> None:
    function(*arguments)


def _pool_close(pool: Any) -> None:
    pool._closed = True
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop.finish_threads_of(pool._executor)


def _commit_waiting(writer: Any) -> None:
    """What the writer's thread does until nothing waits."""
    group: list[Any] = []
    try:
        while not writer._queue.empty():
            group, _ = writer._gather()
            if group:
                writer._commit(group)
    except BaseException as error:  # noqa: BLE001 - as the thread does
        writer._fail(group, error)


def _writer_submit(submit: Callable[..., None]) -> Callable[..., None]:
    def submit_on_loop(writer: Any, batch: ManifestBatch, reply: Reply) -> None:
        submit(writer, batch, reply)
        if isinstance(reply, Future):  # a worker thread waits for it where it stands
            _commit_waiting(writer)
        elif writer.waiting() == 1:  # those that come meanwhile share its transaction
            loop = asyncio.get_running_loop()
            assert isinstance(loop, VirtualLoop)
            loop.call_in_thread(f"writer-{id(writer)}", lambda: _commit_waiting(writer))

    return submit_on_loop


def _writer_close(close: Callable[[Any], None]) -> Callable[[Any], None]:
    def close_on_loop(writer: Any) -> None:
        _commit_waiting(writer)
        close(writer)

    return close_on_loop
