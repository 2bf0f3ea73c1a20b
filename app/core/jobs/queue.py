"""The durable job queue: enqueue, claim, update, end.

Invariants: at most one job at a time may change a database (`slots.py`); the rows decide, memory
only schedules. I6: every update of a claimed job carries its `run`, so that a stale actor's commit
is refused. I7: a claim after a restart uses up no attempt.
Concurrency: loop-confined; commits are awaited, and what a commit decided is looked at again after.
Cancellation: a caller that leaves an `await` here leaves a committed row or none.
Crash: rows survive; `load` makes in-flight jobs pending again at once. Waits and ages go by the
monotonic clock (`times.py`).
"""

import asyncio
import contextlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator
from typing import Any
from weakref import WeakValueDictionary

import msgspec

from app.core.base import failpoints
from app.core.base.clock import Clock, wall_us
from app.core.base.errors import (
    Backpressure,
    JobAlreadyEnded,
    JobCancelled,
    JobNotFound,
    QueueDrained,
)
from app.core.base.events import Events, context_fields
from app.core.base.tasks import uninterrupted
from app.core.coordination.quota_levels import FreedRate
from app.core.jobs.endings import CANCELLED, failure_of
from app.core.jobs.feed import JobFeed
from app.core.jobs.slots import WAITING_KINDS, DatabaseSlots
from app.core.jobs.times import JobTimes
from app.core.stores.manifest.conditions import ExpectJobState, ExpectRun, Precondition
from app.core.stores.manifest.errors import WrongState
from app.core.stores.manifest.ops import (
    EnqueueJob,
    ManifestBatch,
    Op,
    PutMeta,
    Receipt,
    UpdateJob,
)
from app.core.stores.manifest.records import (
    ENDED_STATES,
    MUTATING_KINDS,
    DatabaseRecord,
    JobKind,
    JobRecord,
)
from app.core.stores.manifest.store import ManifestStore

DRAINING_META = "queue/draining"


class JobQueue:
    def __init__(
        self,
        manifest: ManifestStore,
        *,
        clock: Clock,
        events: Events,
        feed: JobFeed,
        depth_max: int,
        retry_wait_seconds_max: float,
        background_max: int = 1,
    ) -> None:
        """No pause between attempts is longer than `retry_wait_seconds_max`. `background_max` jobs
        that change no database run at once: those that do, and so free WAL, always find a place.
        """
        self._manifest = manifest
        self._clock = clock
        self._events = events
        self._feed = feed
        self._depth_max = depth_max
        self._background_max = background_max
        self._pending: OrderedDict[str, dict[str, JobRecord]] = OrderedDict()  # tenant → jobs
        self._claimed: dict[str, JobRecord] = {}
        self._interrupts: dict[str, Callable[[], None]] = {}
        self._slots = DatabaseSlots()
        self._times = JobTimes(clock, wait_seconds_max=retry_wait_seconds_max)
        self._aside: set[str] = set()
        self._enqueueing: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()
        self._entering: Counter[str] = Counter()  # tenant → jobs on their way into the manifest
        self._left = FreedRate()
        self._draining = False
        self._wake = asyncio.Event()

    @property
    def feed(self) -> JobFeed:
        return self._feed

    @property
    def depth(self) -> int:
        """Jobs that wait to be claimed, or for what is in their way."""
        return sum(len(jobs) for jobs in self._pending.values()) + len(self._aside)

    @property
    def aside_count(self) -> int:
        """Claimed jobs that wait without their database's slot, and take no runner's place."""
        return len(self._aside)

    @property
    def depth_max(self) -> int:
        return self._depth_max

    @property
    def draining(self) -> bool:
        """No new job is taken; those that wait and run go on to their end."""
        return self._draining

    @property
    def claimed_ids(self) -> Collection[str]:
        return self._claimed.keys()

    def unfinished_ids(self) -> set[str]:
        waiting = {job_id for jobs in self._pending.values() for job_id in jobs}
        return waiting | set(self._claimed)

    async def load(self) -> None:
        """At start: what an earlier process had in flight is pending again, at once."""
        with self._manifest.read() as view:
            unfinished = view.unfinished_jobs()
            self._draining = bool(view.meta(DRAINING_META))
        for job in unfinished:
            if job.state == "in_flight":
                changes: dict[str, Any] = {
                    "state": "pending",
                    "attempts": max(job.attempts - 1, 0),
                    "not_before_us": 0,
                }
                await self._manifest.commit(
                    ManifestBatch(
                        ops=(UpdateJob(job_id=job.job_id, changes=changes),),
                        preconditions=(ExpectJobState(job_id=job.job_id, states=("in_flight",)),),
                        reason="job.resumed",
                    )
                )
                job = msgspec.structs.replace(job, **changes)  # noqa: PLW2901
                self._events.info("job.resumed", **job_fields(job))
            self._add_pending(job)

    async def enqueue(
        self,
        job: JobRecord,
        *,
        join: bool,
        remember: Callable[[JobRecord], Op] | None = None,
        ops: tuple[Op, ...] = (),
    ) -> JobRecord:
        """Adds a pending job, durably. With `join`, a pending job of that kind and database that
        has not planned yet is answered instead. `remember` makes an op of what is answered, for
        the same commit; `ops` are committed with a new job. Raises QueueDrained, and Backpressure
        when too many wait.
        """
        lock = self._enqueueing.setdefault(job.db_id, asyncio.Lock())
        async with lock:
            if self._draining:
                raise QueueDrained
            if join and (joined := self._joinable(job)) is not None:
                if remember is not None:
                    await self._manifest.commit(
                        ManifestBatch(ops=(remember(joined),), reason="job.joined")
                    )
                return joined
            self._check_depth(job.tenant)
            asked = context_fields()
            job = msgspec.structs.replace(
                job,
                trace_id=str(asked.get("trace_id", "")),
                request_id=str(asked.get("request_id", "")),
            )
            failpoints.fp("job.before_enqueue")
            ops = (EnqueueJob(job=job), *ops)
            if remember is not None:
                ops = (*ops, remember(job))
            self._entering[job.tenant] += 1
            try:
                await self._manifest.commit(
                    ManifestBatch(ops=ops, reason="job.enqueued", db_id=job.db_id)
                )
            finally:
                self._entering = +(self._entering - Counter([job.tenant]))
            failpoints.fp("job.after_enqueue")
            self._add_pending(job)
        self._events.info("job.enqueued", **job_fields(job))
        self._feed.notify(job.job_id)
        return job

    async def set_draining(self, draining: bool) -> None:
        """Holds over restarts."""
        await self._manifest.commit(
            ManifestBatch(
                ops=(PutMeta(name=DRAINING_META, value=b"1" if draining else b""),),
                reason="queue.drained" if draining else "queue.resumed",
            )
        )
        self._draining = draining
        self._events.info("queue.drained" if draining else "queue.resumed", queue_depth=self.depth)

    def works_on(self, database: DatabaseRecord, kind: JobKind) -> bool:
        """A job of that kind waits for the database, or runs."""
        waiting = self._pending.get(database.tenant, {})
        return any(
            job.db_id == database.db_id and job.kind == kind
            for job in (*self._claimed.values(), *waiting.values())
        )

    def age_seconds(self, job: JobRecord) -> float:
        """Since an unfinished job was accepted, restarts included."""
        return self._times.age_seconds(job)

    def wait_seconds(self, job: JobRecord) -> float:
        """The rest of the pause before a pending job's next attempt."""
        return self._times.wait_seconds(job)

    def next_eligible_at(self) -> float | None:
        """When the earliest job that only waits for its time may be claimed, by the monotonic
        clock.
        """
        times = [
            self._times.ready_at(job)
            for jobs in self._pending.values()
            for job in jobs.values()
            if not self._is_blocked(job)
        ]
        return min(times, default=None)

    async def claim(self) -> JobRecord | None:
        """The next job in turn, tenant by tenant, now in flight; None if none is eligible."""
        job = self._pick(self._clock.monotonic())
        if job is None:
            return None
        self._take(job)
        changes: dict[str, Any] = {
            "state": "in_flight",
            "run": job.run + 1,
            "attempts": job.attempts + 1,
            "started_at_us": job.started_at_us or wall_us(self._clock),
        }
        try:
            await self._manifest.commit(
                ManifestBatch(
                    ops=(UpdateJob(job_id=job.job_id, changes=changes),),
                    preconditions=(ExpectJobState(job_id=job.job_id, states=("pending",)),),
                    reason="job.claimed",
                )
            )
        except BaseException:
            self._forget(job)
            self._reload(job.job_id)
            raise
        failpoints.fp("job.after_claim")
        claimed = msgspec.structs.replace(job, **changes)
        self._claimed[job.job_id] = claimed
        self._feed.notify(job.job_id)
        return claimed

    async def update(
        self,
        job: JobRecord,
        *,
        reason: str,
        changes: dict[str, Any],
        ops: tuple[Op, ...] = (),
        preconditions: tuple[Precondition, ...] = (),
        allow_cancelled: bool = False,
    ) -> tuple[JobRecord, Receipt]:
        """Changes a claimed job together with `ops`, or nothing of it (I3, I6)."""
        receipt = await self._manifest.commit(
            ManifestBatch(
                ops=(*ops, UpdateJob(job_id=job.job_id, changes=changes)),
                preconditions=(
                    ExpectRun(job_id=job.job_id, run=job.run, allow_cancelled=allow_cancelled),
                    *preconditions,
                ),
                reason=reason,
                db_id=job.db_id,
            )
        )
        changed = msgspec.structs.replace(job, **changes)
        if job.job_id in self._claimed:
            self._claimed[job.job_id] = changed
            self._slots.note(changed)
        self._feed.notify(job.job_id)
        return changed, receipt

    def give_back(self, job: JobRecord) -> None:
        """A claimed job's row is pending again (a retry) or has ended: memory follows the row."""
        self._forget(job)
        self._left.add(1, now=self._clock.monotonic())
        self._reload(job.job_id)

    def enter(self, job: JobRecord) -> bool:
        """A job that was claimed without it takes its database's slot, if that is open to it."""
        if not self._slots.is_open(job):
            return False
        self._slots.take(job)
        self._aside.discard(job.job_id)
        return True

    def holder(self, db_id: int) -> JobRecord | None:
        """The claimed job that may change the database now."""
        job_id = self._slots.holder(db_id)
        return None if job_id is None else self._claimed.get(job_id)

    def as_cancelled(self, job: JobRecord) -> JobRecord:
        """The claimed job with what its row says of its cancellation."""
        row = self._read(job.job_id)
        return msgspec.structs.replace(
            job, cancel_requested=row.cancel_requested, cancelled_by=row.cancelled_by
        )

    async def request_cancel(self, job_id: str, *, by: str | None = None) -> JobRecord:
        """A pending job that never ran has ended on return; one that left something ends at its
        next turn, without its work; one in flight is interrupted. `by` is the truncation that it
        is in the way of. Raises JobAlreadyEnded.
        """
        job = self._read(job_id)
        if job.state in ENDED_STATES:
            raise JobAlreadyEnded(f"The job is {job.state}.", state=job.state)
        if job.run == 0 and job_id in self._pending.get(job.tenant, {}):
            return await self._end_unclaimed(job)
        changes: dict[str, Any] = {"cancel_requested": True}
        if by is not None:
            changes["cancelled_by"] = by
        try:
            await self._manifest.commit(
                ManifestBatch(
                    ops=(UpdateJob(job_id=job_id, changes=changes),),
                    preconditions=(ExpectJobState(job_id=job_id, states=("pending", "in_flight")),),
                    reason="job.cancel_requested",
                )
            )
        except WrongState as refused:  # it ended meanwhile
            raise JobAlreadyEnded from refused
        if job_id not in self._claimed:
            self._reload(job_id)
            self.wake()
        elif (interrupt := self._interrupts.get(job_id)) is not None:
            interrupt()
        self._events.info("job.cancel_requested", **job_fields(job))
        self._feed.notify(job_id)
        return self._read(job_id)

    @contextlib.contextmanager
    def interrupting(self, job_id: str, interrupt: Callable[[], None]) -> Iterator[None]:
        """Meanwhile `interrupt` is called when someone asks for the claimed job's end."""
        self._interrupts[job_id] = interrupt
        try:
            yield
        finally:
            del self._interrupts[job_id]

    async def _end_unclaimed(self, job: JobRecord) -> JobRecord:
        """Nothing of it is anywhere but in its row. Nobody claims it meanwhile, or joins it."""
        cancelled = JobCancelled(CANCELLED)
        self._remove_pending(job)
        try:
            await uninterrupted(
                self._manifest.commit(
                    ManifestBatch(
                        ops=(
                            UpdateJob(
                                job_id=job.job_id,
                                changes={
                                    "state": "cancelled",
                                    "cancel_requested": True,
                                    "finished_at_us": wall_us(self._clock),
                                    "error": failure_of(cancelled),
                                },
                            ),
                        ),
                        preconditions=(ExpectJobState(job_id=job.job_id, states=("pending",)),),
                        reason="job.cancelled",
                    )
                )
            )
        finally:
            self._reload(job.job_id)
        self._left.add(1, now=self._clock.monotonic())
        self._events.info(
            "job.cancelled", code=cancelled.code, detail=str(cancelled), **job_fields(job)
        )
        self._feed.notify(job.job_id)
        return self._read(job.job_id)

    def wake(self) -> None:
        self._wake.set()

    async def wait_for_work(self) -> None:
        await self._wake.wait()
        self._wake.clear()

    def _check_depth(self, tenant: str) -> None:
        """A tenant within its part of a full queue is not refused for what others have in it."""
        waiting = self.depth + self._entering.total()
        if waiting < self._depth_max:
            return
        tenants = len({*self._pending, *+self._entering, tenant})
        mine = len(self._pending.get(tenant, {})) + self._entering[tenant]
        if mine and mine >= self._depth_max // tenants:
            seconds = self._left.seconds_until(
                waiting - self._depth_max + 1, now=self._clock.monotonic()
            )
            raise Backpressure(
                "The job queue is full.", retry_after_seconds=seconds, queue_depth=waiting
            )

    def _read(self, job_id: str) -> JobRecord:
        with self._manifest.read() as view:
            job = view.job(job_id)
        if job is None:
            raise JobNotFound(job_id=job_id)
        return job

    def _joinable(self, job: JobRecord) -> JobRecord | None:
        for other in self._pending.get(job.tenant, {}).values():
            if (
                other.kind == job.kind
                and other.db_id == job.db_id
                and other.plan is None
                and other.published_generation is None
                and not other.cancel_requested
            ):
                return other
        return None

    def _pick(self, now: float) -> JobRecord | None:
        for tenant in list(self._pending):
            for job in self._pending[tenant].values():
                if self._times.ready_at(job) <= now and not self._is_blocked(job):
                    self._pending.move_to_end(tenant)
                    return job
        return None

    def _is_blocked(self, job: JobRecord) -> bool:
        if job.kind not in MUTATING_KINDS:
            background = sum(one.kind not in MUTATING_KINDS for one in self._claimed.values())
            return background >= self._background_max
        return job.kind not in WAITING_KINDS and not self._slots.is_open(job)

    def _add_pending(self, job: JobRecord) -> None:
        self._slots.note(job)
        self._times.note(job)
        self._pending.setdefault(job.tenant, {})[job.job_id] = job
        self.wake()

    def _remove_pending(self, job: JobRecord) -> None:
        jobs = self._pending[job.tenant]
        del jobs[job.job_id]
        if not jobs:
            del self._pending[job.tenant]

    def _take(self, job: JobRecord) -> None:
        self._remove_pending(job)
        self._claimed[job.job_id] = job
        if job.kind in WAITING_KINDS:
            self._aside.add(job.job_id)
        else:
            self._slots.take(job)

    def _forget(self, job: JobRecord) -> None:
        self._claimed.pop(job.job_id, None)
        self._aside.discard(job.job_id)
        self._slots.free(job)
        self.wake()

    def _reload(self, job_id: str) -> None:
        job = self._read(job_id)
        if job.state == "pending":
            self._add_pending(job)
        else:
            self._slots.forget(job)
            self._times.forget(job_id)


def job_fields(job: JobRecord) -> dict[str, object]:
    """What a log line about a job says."""
    return {
        "job_id": job.job_id,
        "kind": job.kind,
        "tenant": job.tenant,
        "database": job.database,
        "db_id": job.db_id,
        "attempt": job.attempts,
        "run": job.run,
    }
