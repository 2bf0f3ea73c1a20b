"""Removes scratch directories that no job needs, and gives back what dead jobs held.

Invariants: I13: what a crash or a bug left in scratch goes. I9: reservations of jobs that are no
more are released. A job counts as live until it has ended, whether it runs or waits; the wall clock
only delays a removal, it never decides that a live job's directory may go (I16).
Concurrency: one round at a time; live jobs are asked for again right before each removal.
Cancellation: between or after removals; the next round goes on.
Crash: a removal that was interrupted is finished by the next round.
"""

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from app.core.base import failpoints
from app.core.base.clock import Clock
from app.core.base.errors import BopError
from app.core.base.events import Events
from app.core.stores.local.scratch import ScratchEntry, ScratchStore

MAX_AGE_SECONDS = 3600.0
INTERVAL_SECONDS = 300.0


class JobRoom(Protocol):
    """The part of the quota that the janitor needs: what jobs hold."""

    def holders(self) -> Collection[str]: ...

    def release_job(self, job_id: str) -> int: ...

    def forget_scratch(self, job_id: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class JanitorReport:
    scanned: int
    removed: tuple[str, ...]
    failed: tuple[str, ...]
    removed_bytes: int
    released_bytes: int
    """Reservations of jobs that are no more; above 0 it was a leak, and is told as one."""


def abandoned(
    entries: Collection[ScratchEntry], *, live: Collection[str], max_age_seconds: float
) -> list[ScratchEntry]:
    """What may go: half-removed directories at once, others of no live job when old enough."""
    return [
        entry
        for entry in entries
        if entry.removing or (entry.job_id not in live and entry.age_seconds >= max_age_seconds)
    ]


class ScratchJanitor:
    name = "scratch_janitor"

    def __init__(
        self,
        scratch: ScratchStore,
        *,
        live_jobs: Callable[[], Collection[str]],
        room: JobRoom,
        clock: Clock,
        events: Events,
        max_age_seconds: float = MAX_AGE_SECONDS,
        interval_seconds: float = INTERVAL_SECONDS,
        heartbeat: Callable[[], None] = lambda: None,
    ) -> None:
        """`live_jobs` answers from memory: every job that has not ended."""
        self._scratch = scratch
        self._live_jobs = live_jobs
        self._room = room
        self._clock = clock
        self._events = events
        self._max_age_seconds = max_age_seconds
        self._interval_seconds = interval_seconds
        self._heartbeat = heartbeat
        self._round = asyncio.Lock()

    async def run(self) -> None:
        while True:
            try:
                await self.run_once()
            except (BopError, OSError) as error:
                self._events.error("janitor.failed", error=repr(error))
            self._heartbeat()
            await self._clock.sleep(self._interval_seconds)

    async def run_at_start(self) -> JanitorReport:
        """Nothing runs yet, so nothing has to be old: all that belongs to no live job goes."""
        return await self.run_once(max_age_seconds=0.0)

    async def run_once(self, *, max_age_seconds: float | None = None) -> JanitorReport:
        """One round. A directory that cannot be removed is told and left for the next."""
        limit = self._max_age_seconds if max_age_seconds is None else max_age_seconds
        async with self._round:
            entries = await self._scratch.list()
            removed: list[str] = []
            failed: list[str] = []
            removed_bytes = 0
            for entry in abandoned(entries, live=self._live_jobs(), max_age_seconds=limit):
                if not entry.removing and entry.job_id in self._live_jobs():
                    continue
                failpoints.fp("janitor.before_remove")
                try:
                    removed_bytes += await self._remove(entry)
                except (BopError, OSError) as error:
                    failed.append(entry.job_id)
                    self._events.error(
                        "janitor.not_removed", job_id=entry.job_id, error=repr(error)
                    )  # fmt: skip
                else:
                    if entry.job_id not in self._live_jobs():  # a live one gives back its own
                        self._room.forget_scratch(entry.job_id)
                    removed.append(entry.job_id)
                    self._events.info(
                        "janitor.removed", job_id=entry.job_id, bytes=entry.bytes,
                        age_seconds=round(entry.age_seconds, 1),
                    )  # fmt: skip
            return JanitorReport(
                scanned=len(entries),
                removed=tuple(removed),
                failed=tuple(failed),
                removed_bytes=removed_bytes,
                released_bytes=self._release_dead(),
            )

    async def _remove(self, entry: ScratchEntry) -> int:
        if entry.removing:  # a live job may have made its directory anew beside it
            return await self._scratch.finish_removal(entry.job_id)
        return await self._scratch.remove(entry.job_id)

    def _release_dead(self) -> int:
        """A job gives back its room before it ends; who holds some afterwards has leaked it."""
        live = self._live_jobs()
        released_bytes = 0
        for job_id in set(self._room.holders()).difference(live):
            freed = self._room.release_job(job_id)
            released_bytes += freed
            self._events.warning("quota.leak_released", job_id=job_id, bytes=freed)
        return released_bytes
