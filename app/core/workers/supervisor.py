"""Owns the loops that work without a request; none of them dies unseen.

Invariants: a worker that returns or raises while the supervisor is open is fatal: it is told as
`supervisor.worker_died`, readiness goes down, and `on_fatal` is called once, with the first death.
What a worker can live with (a BopError of one round) it handles itself.
Concurrency: one task per worker; confined to the event loop.
Cancellation: leaving stops the workers in the reverse order of their start, each by cancelling it
and joining it within a bound; one that does not end is told as `supervisor.worker_stuck`.
Crash: nothing is kept.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from app.core.base.clock import Clock
from app.core.base.errors import FatalError
from app.core.base.events import Events
from app.core.base.tasks import TaskScope

Heartbeat = Callable[[], None]


class Worker(Protocol):
    @property
    def name(self) -> str: ...

    async def run(self) -> None:
        """Works until it is cancelled."""
        ...


class WorkerDied(FatalError):
    """A loop ended that should have run until it was stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerHealth:
    name: str
    running: bool
    heartbeat_age_seconds: float | None
    """Since its last heartbeat, or its start; None if it was given no heartbeat."""
    late: bool
    """No heartbeat for longer than it said it would take."""


@dataclass(slots=True)
class _Pulse:
    late_after_seconds: float
    at: float


class Supervisor:
    def __init__(
        self,
        *,
        clock: Clock,
        events: Events,
        on_fatal: Callable[[BaseException], None],
        stop_timeout_seconds: float = 10.0,
    ) -> None:
        """`on_fatal` must not block; it starts the ordered end of the process.

        `stop_timeout_seconds` bounds the whole stop, all workers together.
        """
        self._clock = clock
        self._events = events
        self._on_fatal = on_fatal
        self._stop_timeout_seconds = stop_timeout_seconds
        self._scope = TaskScope("workers", on_error=self._died_outside_run)
        self._tasks: dict[str, asyncio.Task[None]] = {}  # in the order of their start
        self._pulses: dict[str, _Pulse] = {}
        self._failure: BaseException | None = None
        self._stopping = False

    def __repr__(self) -> str:
        state = "failed" if self._failure else "stopping" if self._stopping else "open"
        return f"<Supervisor {state}, {len(self._scope)} workers>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    @property
    def failure(self) -> BaseException | None:
        """The first death; not None means not ready."""
        return self._failure

    def heartbeat(self, name: str, *, late_after_seconds: float) -> Heartbeat:
        """What the worker `name` calls once a round. Give it to the worker when making it."""
        pulse = _Pulse(late_after_seconds, self._clock.monotonic())
        self._pulses[name] = pulse

        def beat() -> None:
            pulse.at = self._clock.monotonic()

        return beat

    def start(self, worker: Worker) -> None:
        if self._stopping:
            raise RuntimeError("the supervisor is stopping")
        if worker.name in self._tasks:
            raise RuntimeError(f"there is a worker {worker.name} already")
        if worker.name in self._pulses:
            self._pulses[worker.name].at = self._clock.monotonic()
        self._tasks[worker.name] = self._scope.start(self._watch(worker), name=worker.name)

    def health(self) -> tuple[WorkerHealth, ...]:
        now = self._clock.monotonic()
        shown: list[WorkerHealth] = []
        for name, task in self._tasks.items():
            pulse = self._pulses.get(name)
            age_seconds = None if pulse is None else now - pulse.at
            shown.append(
                WorkerHealth(
                    name=name,
                    running=not task.done(),
                    heartbeat_age_seconds=age_seconds,
                    late=pulse is not None and now - pulse.at > pulse.late_after_seconds,
                )
            )
        return tuple(shown)

    async def stop(self) -> None:
        """Returns when all workers have ended or the bound has passed. Again is harmless."""
        self._stopping = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._stop_timeout_seconds
        try:
            for name, task in reversed(self._tasks.items()):
                if task.done():
                    continue
                task.cancel()
                # Past the bound each still gets a moment, so that one stuck worker is not many.
                await asyncio.wait({task}, timeout=max(deadline - loop.time(), 0.01))
                if not task.done():
                    self._events.error("supervisor.worker_stuck", worker=name)
        finally:
            for task in self._tasks.values():  # when the stop itself is cancelled
                task.cancel()

    async def _watch(self, worker: Worker) -> None:
        try:
            await worker.run()
        except asyncio.CancelledError:
            if not self._stopping:
                self._died(worker.name, WorkerDied(f"The worker {worker.name} was cancelled."))
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, this is where it is told
            if self._stopping and not isinstance(error, FatalError):
                self._events.error(
                    "supervisor.worker_stopped_badly", worker=worker.name, error=repr(error)
                )
            else:
                self._died(worker.name, error)
        else:
            # One that returns while it is being stopped has ended in order.
            if not self._stopping:
                self._died(worker.name, WorkerDied(f"The worker {worker.name} returned."))

    def _died(self, name: str, error: BaseException) -> None:
        self._events.error("supervisor.worker_died", worker=name, error=repr(error))
        if self._failure is None:
            self._failure = error
            self._on_fatal(error)

    def _died_outside_run(self, error: BaseException) -> None:
        """`on_fatal` itself raised: there is nobody left to tell but the log."""
        self._events.error("supervisor.on_fatal_failed", error=repr(error))
