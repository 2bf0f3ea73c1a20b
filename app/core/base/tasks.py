"""Tasks with an owner, and a bounded pool for calls that block.

Nothing else creates tasks: a task without an owner outlives its purpose and hides its error.
"""

import asyncio
import contextlib
import contextvars
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar, TypeVarTuple

from app.core.base.errors import FatalError

S = TypeVar("S")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class TaskScope:
    """Owns tasks started in it: leaving the scope cancels and joins them all.

    `on_error` is told of a task that failed while the scope was open; failures never vanish.
    """

    def __init__(self, name: str, *, on_error: Callable[[BaseException], None]) -> None:
        self._name = name
        self._on_error = on_error
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def start(self, coroutine: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
        if self._closed:
            coroutine.close()
            raise RuntimeError(f"{self._name} is closed")
        task = asyncio.get_running_loop().create_task(coroutine, name=f"{self._name}.{name}")
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def __len__(self) -> int:
        return len(self._tasks)

    async def join(self) -> None:
        """Waits for every task now running, without cancelling any."""
        if self._tasks:
            await asyncio.wait(set(self._tasks))

    async def aclose(self) -> None:
        self._closed = True
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(set(self._tasks))

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_error(error)


async def run_beside(main: Coroutine[Any, Any, T], companion: Coroutine[Any, Any, None]) -> T:
    """The result of `main`. If `companion` ends or fails first, `main` is cancelled and
    the companion's error raised; when `main` ends, the companion is cancelled. Both are joined. A
    FatalError that one of them ends in is raised whatever came first (I16).
    """
    loop = asyncio.get_running_loop()
    main_task, side_task = loop.create_task(main), loop.create_task(companion)
    both: tuple[asyncio.Task[Any], ...] = (main_task, side_task)
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        main_was_first = main_task.done()
    finally:
        for task in both:
            task.cancel()
        await asyncio.wait(both)
        for task in both:
            if not task.cancelled() and isinstance(failure := task.exception(), FatalError):
                raise failure
    if not main_was_first:
        side_task.result()
    return main_task.result()


async def for_each(
    items: Iterable[S], function: Callable[[S], Coroutine[Any, Any, T]], *, limit: int
) -> list[T]:
    """Results in the order of `items`, at most `limit` at a time. The first error cancels the
    others, waits for them, and is raised itself (not as a group), unless one is a FatalError.
    """
    gate = asyncio.Semaphore(limit)

    async def one(item: S) -> T:
        async with gate:
            return await function(item)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(item)) for item in items]
    except BaseExceptionGroup as errors:
        gravest = _gravest(errors)
        raise gravest from gravest.__cause__
    return [task.result() for task in tasks]


async def both(first: Coroutine[Any, Any, S], second: Coroutine[Any, Any, T]) -> tuple[S, T]:
    """Runs the two side by side. The first error cancels the other, waits for it, and is raised
    itself (not as a group), unless the other's is a FatalError.
    """
    try:
        async with asyncio.TaskGroup() as group:
            one, two = group.create_task(first), group.create_task(second)
    except BaseExceptionGroup as errors:
        gravest = _gravest(errors)
        raise gravest from gravest.__cause__
    return one.result(), two.result()


def _gravest(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    fatal = (error for error in errors.exceptions if isinstance(error, FatalError))
    return next(fatal, errors.exceptions[0])


async def uninterrupted(step: Coroutine[Any, Any, T]) -> T:
    """Runs `step` to its end even when the caller is cancelled; the cancellation is raised then,
    unless the step ended in a FatalError, which no cancellation may hide (I16).

    For short steps that record what they did on disk: half of one would leave the record wrong.
    """
    task = asyncio.get_running_loop().create_task(step)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        if not task.cancelled() and isinstance(failure := task.exception(), FatalError):
            raise failure from None
        raise


async def acquired(step: Coroutine[Any, Any, T], *, give_back: Callable[[T], None]) -> T:
    """What `step` opens; where the caller was cancelled meanwhile it is given back."""
    held: list[T] = []

    async def keep() -> None:
        held.append(await step)

    try:
        await uninterrupted(keep())
    except BaseException:
        for one in held:
            give_back(one)
        raise
    return held[0]


class BlockingPool:
    """A bounded thread pool for functions whose names end in `_blocking`."""

    def __init__(self, name: str, *, threads: int) -> None:
        self._executor = ThreadPoolExecutor(max_workers=threads, thread_name_prefix=name)

    async def run(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Runs `function` in the pool. A caller that is cancelled leaves at once; the call itself
        cannot be interrupted and ends on its own.
        """
        return await self.begin(function, *args)

    def begin(self, function: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        """The same, to be awaited later."""
        loop = asyncio.get_running_loop()
        run = contextvars.copy_context().run  # what the thread tells belongs to the caller's job
        return loop.run_in_executor(self._executor, run, function, *args)

    def submit(self, function: Callable[[*Ts], object], *args: *Ts) -> None:
        """Starts `function`, which reports its own outcome."""
        self._executor.submit(function, *args)

    def close_blocking(self) -> None:
        """Waits for what runs; nothing queued is dropped."""
        self._executor.shutdown(wait=True)
