"""Begins checkpoints without being asked: by timer, by WAL pressure, for want of room.

Invariants: a database without unpublished WAL costs nothing: no timer, no look, no request to the
remote store. I9: what the quota refuses is answered by checkpoints of the oldest WAL. Flags are
read when a checkpoint is due; a change re-arms the tenant's timers.
Concurrency: one loop; it sleeps until the next timer or until the WAL's side tells it something.
Cancellation: a request that was begun is in the queue or it is not.
Crash: nothing is kept; recovery tells anew what is dirty.
"""

import asyncio
from dataclasses import dataclass

from app.core.base.clock import Clock
from app.core.base.errors import BopError
from app.core.base.events import Events
from app.core.coordination.checkpoint_demand import CheckpointDemand
from app.core.coordination.flags import flags_of
from app.core.coordination.wal_backlog import WalBacklog
from app.core.jobs.checkpoint_requests import CheckpointRequests
from app.core.jobs.queue import JobQueue
from app.core.stores.manifest.records import DatabaseRecord
from app.core.stores.manifest.store import ManifestStore
from app.core.workers.checkpoint_schedule import CheckpointSchedule, next_due

TIMER, WAL_PRESSURE = "timer", "wal_pressure"
PRINCIPAL = "service"
AGAIN_SECONDS = 2.0
"""What is under pressure and cannot begin yet is looked at again after that."""
STARVED_AT_ONCE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """A database with unpublished WAL whose tenant lets it be checkpointed."""

    record: DatabaseRecord
    interval_seconds: float
    """0: only on demand and by WAL pressure."""


class CheckpointTriggers:
    name = "checkpoint_triggers"

    def __init__(
        self,
        manifest: ManifestStore,
        queue: JobQueue,
        requests: CheckpointRequests,
        *,
        backlog: WalBacklog,
        demand: CheckpointDemand,
        clock: Clock,
        events: Events,
        interval_seconds: float,
    ) -> None:
        """`interval_seconds` is the default of the tenants' flag."""
        self._manifest = manifest
        self._queue = queue
        self._requests = requests
        self._backlog = backlog
        self._demand = demand
        self._clock = clock
        self._events = events
        self._interval_seconds = interval_seconds
        self._timers = CheckpointSchedule()
        self._pressed = CheckpointSchedule()
        self._starved_until = float("-inf")

    async def run(self) -> None:
        while True:
            await self.run_once()
            due = self.next_due()
            delay = None if due is None else max(due - self._clock.monotonic(), 0.0)
            try:
                async with asyncio.timeout(delay):
                    await self._demand.wait()
            except TimeoutError:
                continue

    def next_due(self) -> float | None:
        """When `run_once` has something to do, unless something is told before."""
        times = (self._timers.next_due(), self._pressed.next_due())
        return min((time for time in times if time is not None), default=None)

    def flags_changed(self, tenant: str) -> None:
        """Timers of the tenant's dirty databases start over with what the flags say now."""
        for entry in self._backlog.dirty(tenant):
            self._timers.disarm(entry.db_id)
            self._demand.dirty(entry.db_id)

    async def run_once(self) -> None:
        """Takes what was told, and asks for the checkpoints that are due."""
        now = self._clock.monotonic()
        for db_id in self._demand.take_dirty():
            if db_id not in self._timers:
                self._arm(db_id, now=now)
        wanted_now = self._demand.take_pressed() | self._starving(now)
        for db_id in self._pressed.take_due(now):
            entry = self._backlog.get(db_id)
            if entry is not None and entry.pressed_since is not None:
                wanted_now.add(db_id)
        for db_id in sorted(wanted_now, key=self._backlog.dirty_since):
            if not await self._begin(db_id, reason=WAL_PRESSURE):
                self._pressed.arm(db_id, due=now + AGAIN_SECONDS)
        for db_id in self._timers.take_due(now):
            await self._begin(db_id, reason=TIMER)
            self._arm(db_id, now=now)

    def _tell_busy(self, db_id: int, error: BopError) -> None:
        """The manifest has no reader to spare: it is looked at again."""
        self._events.warning(
            "checkpoint.trigger_waits", db_id=db_id, code=error.code, detail=str(error)
        )

    def _arm(self, db_id: int, *, now: float) -> None:
        """Nothing to arm: clean, switched off, or gone. Then it is told of when that changes."""
        try:
            wanted = self._wanted(db_id)
        except BopError as error:
            self._tell_busy(db_id, error)
            self._timers.arm(db_id, due=now + AGAIN_SECONDS)
            return
        if wanted is not None and wanted.interval_seconds:
            due = next_due(db_id, interval_seconds=wanted.interval_seconds, now=now)
            self._timers.arm(db_id, due=due)

    def _starving(self, now: float) -> set[int]:
        """The databases whose checkpoints free room soonest: those with the oldest WAL."""
        starved = self._demand.take_starved()
        if not starved or now < self._starved_until:
            return set()
        self._starved_until = now + AGAIN_SECONDS
        return {
            entry.db_id
            for tenant in starved
            for entry in self._backlog.dirty(tenant)[:STARVED_AT_ONCE]
        }

    def _wanted(self, db_id: int) -> _Wanted | None:
        entry = self._backlog.get(db_id)
        if entry is None or entry.dirty_since is None:
            return None
        with self._manifest.read() as view:
            record = view.database(db_id)
            flags = flags_of(view, entry.tenant)
        if record is None or record.state == "tombstoned" or not flags.enable_checkpoints:
            return None
        interval = flags.checkpoint_interval_seconds
        return _Wanted(
            record=record,
            interval_seconds=self._interval_seconds if interval is None else interval,
        )

    async def _begin(self, db_id: int, *, reason: str) -> bool:
        """False: it is still wanted, and cannot begin now."""
        try:
            wanted = self._wanted(db_id)
        except BopError as error:
            self._tell_busy(db_id, error)
            return False
        if wanted is None or wanted.record.health == "corrupt_wal":
            return True
        if self._queue.draining or self._queue.works_on(wanted.record, "create_checkpoint"):
            return False
        try:
            await self._requests.request(wanted.record, reason=reason, principal=PRINCIPAL)
        except BopError as error:
            self._events.warning(
                "checkpoint.not_triggered", tenant=wanted.record.tenant,
                database=wanted.record.name, reason=reason, code=error.code, detail=str(error),
            )  # fmt: skip
            return False
        return True
