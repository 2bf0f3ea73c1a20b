"""An event loop on which waiting costs nothing and everything happens in one order.

Time jumps to the next timer when nothing is ready. What would run in a thread runs on the loop, a
seeded moment later, whole; who waits for it may be cancelled or overtaken meanwhile, as by a real
thread. Tasks and futures hash by their order of birth, so that sets of them have one order, too.
"""

import asyncio
import contextvars
import heapq
import itertools
import random
from collections import deque
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
    def __hash__(self) -> int:
        return _birth_of(self)


class _Future(asyncio.Future[Any]):
    def __hash__(self) -> int:
        return _birth_of(self)


def _birth_of(one: Any) -> int:
    """When it was first asked for, counted by its loop."""
    try:
        return one._birth  # type: ignore[no-any-return]
    except AttributeError:
        one._birth = birth = next(one.get_loop().births)
        return birth  # type: ignore[no-any-return]


class _Call:
    """A handle, of a call that is due or that waits for its time."""

    __slots__ = ("_arguments", "_callback", "_context", "_is_cancelled", "_when")

    def __init__(
        self,
        when: float,
        callback: Callable[..., object],
        arguments: tuple[Any, ...],
        context: contextvars.Context,
    ) -> None:
        self._when, self._callback, self._arguments = when, callback, arguments
        self._context, self._is_cancelled = context, False

    def when(self) -> float:
        return self._when

    def cancel(self) -> None:
        self._is_cancelled = True
        self._callback, self._arguments = _nothing, ()

    def cancelled(self) -> bool:
        return self._is_cancelled

    def run(self) -> None:
        self._context.run(self._callback, *self._arguments)


def _nothing() -> None:
    """What a cancelled call does."""


class VirtualLoop(asyncio.BaseEventLoop):
    """Only what `BaseEventLoop` does not do without files: due calls in turn, and time."""

    def __init__(self, *, now: float, source: random.Random) -> None:
        super().__init__()
        self._now = now
        self._source = source
        self._due: deque[_Call] = deque()
        self._timers: list[tuple[float, int, _Call]] = []
        self._order = itertools.count()
        self._pending: dict[object, dict[int, Callable[[], None]]] = {}
        self._calls = itertools.count()
        self.births = itertools.count()
        self.steps = 0
        """Turns of the loop."""
        self.set_task_factory(self._make_task)  # type: ignore[arg-type]

    def time(self) -> float:
        return self._now

    def call_soon(  # type: ignore[override]
        self,
        callback: Callable[..., object],
        *arguments: Any,
        context: contextvars.Context | None = None,
    ) -> _Call:
        call = _Call(self._now, callback, arguments, context or contextvars.copy_context())
        self._due.append(call)
        return call

    def call_later(  # type: ignore[override]
        self,
        delay: float,
        callback: Callable[..., object],
        *arguments: Any,
        context: contextvars.Context | None = None,
    ) -> _Call:
        return self.call_at(self._now + delay, callback, *arguments, context=context)

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *arguments: Any,
        context: contextvars.Context | None = None,
    ) -> _Call:
        call = _Call(when, callback, arguments, context or contextvars.copy_context())
        heapq.heappush(self._timers, (when, next(self._order), call))
        return call

    def _run_once(self) -> None:
        """One turn: all that is due, and where nothing is, time jumps to the next timer."""
        self.steps += 1
        due, timers = self._due, self._timers
        while timers and (timers[0][2]._is_cancelled or timers[0][0] <= self._now or not due):
            when, _, call = heapq.heappop(timers)
            if not call._is_cancelled:
                self._now = max(self._now, when)
                due.append(call)
        if not due:
            raise Stuck("nothing is ready, and no timer runs")
        for _ in range(len(due)):
            call = due.popleft()
            try:
                call.run()
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # noqa: BLE001 - as any loop does
                self.call_exception_handler({"message": "a callback failed", "exception": error})

    @staticmethod
    def _make_task(
        loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], **options: Any
    ) -> _Task:
        return _Task(coroutine, loop=loop, **options)

    def create_future(self) -> _Future:
        return _Future(loop=self)

    def call_soon_threadsafe(self, *arguments: Any, **options: Any) -> Any:  # type: ignore[override]
        return self.call_soon(*arguments, **options)

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, function: Callable[..., Any], *arguments: Any
    ) -> Any:
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
