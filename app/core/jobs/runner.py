"""Runs one claimed job to the end of an attempt, and decides what that attempt means.

Invariants: I7, I13: whatever happens, the job's row says what is true and its handler has cleaned
up. I15: once the publishing transaction is in, the job can only go on to completion.
Concurrency: one runner per claimed job.
Cancellation: a shutdown leaves the row in flight; the next start resumes it, no attempt used up.
A request to cancel the job interrupts its handler at any `await`, unless it has published.
Crash: the same.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from app.core.base.clock import Clock, Randomness, full_jitter, wall_us
from app.core.base.errors import (
    BopError,
    DeadlineExceeded,
    DiskFull,
    ErrorKind,
    FatalError,
    InternalError,
    JobCancelled,
    ManifestBusy,
    ManifestFull,
)
from app.core.base.events import Events, bound
from app.core.base.tasks import uninterrupted
from app.core.jobs.endings import CANCELLED, ended_reason, failure_of
from app.core.jobs.queue import JobQueue, job_fields
from app.core.stores.manifest.conditions import Precondition
from app.core.stores.manifest.errors import BatchRefused, CancelRequested, RunSuperseded
from app.core.stores.manifest.ops import Op, Receipt
from app.core.stores.manifest.records import JobKind, JobRecord

SETTLE_SECONDS = 1.0
RETRYABLE = frozenset({ErrorKind.UNAVAILABLE, ErrorKind.EXHAUSTED, ErrorKind.BACKPRESSURE})


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    attempts_max: int
    backoff_base_seconds: float
    backoff_cap_seconds: float
    stall_seconds: float


class JobContext:
    """A handler's hold on its job: the current row, and the only way to change it."""

    def __init__(self, queue: JobQueue, job: JobRecord, *, on_progress: Callable[[], None]) -> None:
        self._queue = queue
        self._on_progress = on_progress
        self.job = job

    async def update(
        self,
        *,
        reason: str,
        changes: dict[str, Any],
        ops: tuple[Op, ...] = (),
        preconditions: tuple[Precondition, ...] = (),
        allow_cancelled: bool = False,
    ) -> Receipt:
        """Commits `changes` of the job with `ops`. Raises JobCancelled if someone asked to.

        A caller that is cancelled waits for the commit, which takes effect all the same: `job` is
        what the row says, and a publication is never taken for a failure (I15).
        """

        async def commit() -> Receipt:
            self.job, receipt = await self._queue.update(
                self.job,
                reason=reason,
                changes=changes,
                ops=ops,
                preconditions=preconditions,
                allow_cancelled=allow_cancelled,
            )
            return receipt

        try:
            receipt = await uninterrupted(commit())
        except CancelRequested as refused:
            self.job = self._queue.as_cancelled(self.job)
            raise JobCancelled(CANCELLED) from refused
        self._on_progress()
        return receipt

    def touch(self) -> None:
        """Something moved: the stall detector starts over."""
        self._on_progress()


class JobHandler(Protocol):
    """One kind of job. `run` is called again after any failure, with the row as it was left."""

    async def run(self, context: JobContext) -> Mapping[str, Any]:
        """Does the work and returns the job's result."""
        ...

    async def abandon(self, context: JobContext) -> tuple[tuple[Op, ...], dict[str, Any]]:
        """The job ends unpublished: cleans up, and returns ops and changes to commit with it."""
        ...

    async def pause(self, context: JobContext) -> tuple[Op, ...]:
        """The attempt failed and will be retried: gives back what it holds meanwhile."""
        ...


class JobRunner:
    def __init__(
        self,
        queue: JobQueue,
        handlers: Mapping[JobKind, JobHandler],
        *,
        clock: Clock,
        randomness: Randomness,
        events: Events,
        policy: RetryPolicy,
    ) -> None:
        self._queue = queue
        self._handlers = handlers
        self._clock = clock
        self._randomness = randomness
        self._events = events
        self._policy = policy

    async def run(self, job: JobRecord) -> None:
        """One attempt. Raises only FatalError and CancelledError; all else ends in the row."""
        handler = self._handlers[job.kind]
        context = JobContext(self._queue, job, on_progress=lambda: None)
        belongs = {"job_id": job.job_id, "tenant": job.tenant, "database": job.database}
        if job.trace_id:
            belongs["trace_id"] = job.trace_id
        try:
            with bound(**belongs):
                await self._attempt(handler, context)
        finally:
            self._queue.give_back(context.job)

    async def _attempt(self, handler: JobHandler, context: JobContext) -> None:
        try:
            result = await self._uncancelled(handler, context)
            await self._end(context, state="completed", changes={"result": dict(result)})
        except FatalError:
            raise
        except JobCancelled as cancelled:
            await self._give_up(handler, context, cancelled, state="cancelled")
        except BopError as error:
            await self._fail(handler, context, error)
        except Exception as error:  # noqa: BLE001 - a bug fails its job, not its neighbours
            self._events.error("job.crashed", error=repr(error), **job_fields(context.job))
            await self._fail(handler, context, InternalError("The job met an internal error."))

    async def _uncancelled(self, handler: JobHandler, context: JobContext) -> Mapping[str, Any]:
        """Raises JobCancelled as soon as that is asked for, what the handler waits for or not. One
        that had published by then goes on to its end (I15).
        """
        interrupt = _Interrupt(context)
        with self._queue.interrupting(context.job.job_id, interrupt):
            context.job = self._queue.as_cancelled(context.job)
            while context.job.published_generation is None:
                if context.job.cancel_requested:
                    raise JobCancelled(CANCELLED)
                try:
                    return await self._bounded(handler, context, interrupt)
                except _Interrupted:
                    interrupt.told = False
                    context.job = self._queue.as_cancelled(context.job)
            return await self._bounded(handler, context, interrupt)

    async def _bounded(
        self, handler: JobHandler, context: JobContext, interrupt: "_Interrupt"
    ) -> Mapping[str, Any]:
        """Runs the handler under its deadline and the stall detector. Raises _Interrupted."""
        loop = asyncio.get_running_loop()
        deadline = self._deadline(context.job)
        stall = self._policy.stall_seconds

        def limit() -> float:
            soonest = self._clock.monotonic() + stall
            return min(soonest, deadline) if deadline is not None else soonest

        def extend() -> None:
            if not timeout.expired() and not interrupt.told:
                timeout.reschedule(loop.time() + limit() - self._clock.monotonic())

        timeout = asyncio.timeout(limit() - self._clock.monotonic())
        context._on_progress = extend  # noqa: SLF001 - set once its timeout exists
        interrupt.timeout = timeout
        try:
            async with timeout:
                return await handler.run(context)
        except TimeoutError as error:
            if not timeout.expired():
                raise
            if interrupt.told:
                raise _Interrupted from error
            if deadline is not None and self._clock.monotonic() >= deadline:
                raise _PastDeadline("The job ran past its deadline.") from error
            raise DeadlineExceeded(
                f"Nothing moved for {stall:.0f} s; the attempt was given up."
            ) from error
        finally:
            interrupt.timeout = None
            context._on_progress = lambda: None  # noqa: SLF001 - the timeout is over

    def _deadline(self, job: JobRecord) -> float | None:
        """By the monotonic clock: the time that the job was given runs from its acceptance."""
        if job.deadline_us is None or job.published_generation is not None:
            return None
        given_seconds = (job.deadline_us - job.created_at_us) / 1e6
        return self._clock.monotonic() + given_seconds - self._queue.age_seconds(job)

    async def _fail(self, handler: JobHandler, context: JobContext, error: BopError) -> None:
        job = context.job
        published = job.published_generation is not None
        refused = isinstance(error, BatchRefused)
        retryable = refused or error.kind in RETRYABLE
        exhausted = job.attempts >= self._policy.attempts_max or isinstance(error, _PastDeadline)
        if published or (retryable and not exhausted):
            await self._retry(handler, context, error)
        else:
            await self._give_up(handler, context, error, state="failed")

    async def _retry(self, handler: JobHandler, context: JobContext, error: BopError) -> None:
        ops = await self._pause(handler, context)
        delay = full_jitter(
            self._randomness,
            attempt=context.job.attempts,
            base_seconds=self._policy.backoff_base_seconds,
            cap_seconds=self._policy.backoff_cap_seconds,
        )
        if error.retry_after_seconds is not None:
            delay = max(delay, min(error.retry_after_seconds, self._policy.backoff_cap_seconds))
        not_before_us = wall_us(self._clock) + int(delay * 1e6)
        self._events.warning(
            "job.retrying", code=error.code, detail=str(error), delay_seconds=round(delay, 3),
            **job_fields(context.job),
        )  # fmt: skip
        await self._settle(
            context,
            reason="job.retrying",
            ops=ops,
            changes={
                "state": "pending",
                "not_before_us": not_before_us,
                "error": failure_of(error),
            },
        )

    async def _give_up(
        self, handler: JobHandler, context: JobContext, error: BopError, *, state: str
    ) -> None:
        ops, changes = await self._abandon(handler, context)
        log = self._events.info if state == "cancelled" else self._events.error
        log(f"job.{state}", code=error.code, detail=str(error), **job_fields(context.job))
        await self._end(
            context, state=state, ops=ops, changes={**changes, "error": failure_of(error)}
        )

    async def _pause(self, handler: JobHandler, context: JobContext) -> tuple[Op, ...]:
        try:
            return await handler.pause(context)
        except FatalError:
            raise
        except Exception as error:  # noqa: BLE001 - as in `_abandon`
            self._tell_left(context.job, error)
            return ()

    async def _abandon(
        self, handler: JobHandler, context: JobContext
    ) -> tuple[tuple[Op, ...], dict[str, Any]]:
        """Where the handler cannot clean up, the row must say all the same how the job ended: the
        janitor takes scratch and reservation, and leases expire.
        """
        try:
            return await handler.abandon(context)
        except FatalError:
            raise
        except Exception as error:  # noqa: BLE001 - a bug fails its job, not its neighbours
            self._tell_left(context.job, error)
            return (), {}

    def _tell_left(self, job: JobRecord, error: Exception) -> None:
        self._events.error("job.not_cleaned_up", error=repr(error), **job_fields(job))

    async def _end(
        self,
        context: JobContext,
        *,
        state: str,
        changes: dict[str, Any],
        ops: tuple[Op, ...] = (),
    ) -> None:
        ended = {"state": state, "stage": None, "finished_at_us": wall_us(self._clock)}
        if state == "completed":
            ended["error"] = None
        await self._settle(
            context,
            reason=ended_reason(context.job, state),
            ops=ops,
            changes={**changes, **ended},
        )

    async def _settle(
        self, context: JobContext, *, reason: str, changes: dict[str, Any], ops: tuple[Op, ...]
    ) -> None:
        """Commits how the attempt ended, however long the manifest turns writes away."""
        while True:
            try:
                await context.update(reason=reason, changes=changes, ops=ops, allow_cancelled=True)
            except RunSuperseded as refused:
                self._events.warning(
                    "job.superseded", detail=str(refused), **job_fields(context.job)
                )
            except (ManifestBusy, ManifestFull, DiskFull) as refused:
                self._events.error("job.unsettled", detail=str(refused), **job_fields(context.job))
                await self._clock.sleep(SETTLE_SECONDS)
                continue
            return


class _Interrupt:
    """Ends the handler's timeout at once. What has published is left alone."""

    def __init__(self, context: JobContext) -> None:
        self._context = context
        self.timeout: asyncio.Timeout | None = None
        self.told = False

    def __call__(self) -> None:
        if self._context.job.published_generation is not None:
            return
        self.told = True
        if self.timeout is not None and not self.timeout.expired():
            self.timeout.reschedule(asyncio.get_running_loop().time())


class _Interrupted(Exception):
    """Someone asked for the job's end."""


class _PastDeadline(DeadlineExceeded):
    """The job's own deadline, not a stall: no further attempt."""
