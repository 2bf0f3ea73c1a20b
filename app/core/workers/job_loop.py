"""Claims jobs and runs them, as many side by side as the settings allow.

Invariants: nothing is claimed before the remote prefix is, nor after `stop_claiming`. I16: a
manifest that takes no writes just now (its disk or map is full) holds claims up and ends nothing.
Concurrency: one loop; runners are tasks of its scope.
Cancellation: runners are cancelled and joined; their rows stay in flight and are resumed.
Crash: see jobs.queue.
"""

import asyncio
from collections.abc import Awaitable, Callable

from app.core.base.clock import Clock
from app.core.base.errors import BopError
from app.core.base.events import Events
from app.core.base.tasks import TaskScope
from app.core.jobs.queue import JobQueue
from app.core.jobs.runner import JobRunner

REFUSED_SECONDS = 1.0
"""After which a claim that was turned away is made again."""


class JobLoop:
    name = "job_loop"

    def __init__(
        self,
        queue: JobQueue,
        runner: JobRunner,
        *,
        ready: Callable[[], Awaitable[None]],
        clock: Clock,
        events: Events,
        concurrency: int,
    ) -> None:
        """Claims nothing until `ready()` returns."""
        self._queue = queue
        self._runner = runner
        self._clock = clock
        self._events = events
        self._ready = ready
        self._concurrency = concurrency
        self._claiming = True
        self._idle = asyncio.Event()
        self._idle.set()
        self._failure: asyncio.Future[None] | None = None
        self._scope: TaskScope | None = None

    def stop_claiming(self) -> None:
        self._claiming = False
        self._queue.wake()

    async def drain(self, *, seconds: float) -> None:
        """Claims no more and lets running jobs end; those that do not are resumed at next start."""
        self.stop_claiming()
        if self._scope is not None and self._working(self._scope) <= 0:
            return
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return

    async def run(self) -> None:
        self._failure = asyncio.get_running_loop().create_future()
        await self._ready()
        async with TaskScope("jobs", on_error=self._failed) as scope:
            self._scope = scope
            while True:
                if self._failure.done():
                    self._failure.result()
                try:
                    await self._claim(scope)
                except BopError as error:
                    self._events.warning("job.not_claimed", code=error.code, detail=str(error))
                    await self._clock.sleep(REFUSED_SECONDS)
                else:
                    await self._wait()

    async def _claim(self, scope: TaskScope) -> None:
        while self._claiming and self._working(scope) < self._concurrency:
            job = await self._queue.claim()
            if job is None:
                return
            self._idle.clear()
            task = scope.start(self._runner.run(job), name=job.job_id)
            task.add_done_callback(lambda _: self._ended(scope))

    async def _wait(self) -> None:
        ready_at = self._queue.next_eligible_at() if self._claiming else None
        delay = None if ready_at is None else max(ready_at - self._clock.monotonic(), 0.005)
        try:
            async with asyncio.timeout(delay):
                await self._queue.wait_for_work()
        except TimeoutError:
            return

    def _working(self, scope: TaskScope) -> int:
        """Jobs but those that wait aside: these take nobody's place, hold up no shutdown, and are
        resumed at the next start.
        """
        return len(scope) - self._queue.aside_count

    def _ended(self, scope: TaskScope) -> None:
        if self._working(scope) <= 0:
            self._idle.set()
        self._queue.wake()

    def _failed(self, error: BaseException) -> None:
        if self._failure is not None and not self._failure.done():
            self._failure.set_exception(error)
        self._queue.wake()
