"""Collection as a loop: retention, then what is due, now and then or when asked.

Invariants: idle, it reads the manifest and asks the remote store nothing. Time is the collector's
own (`retention/collection_time.py`); after a jump of the wall clock nothing is collected until an
operator has accepted the clock.
Concurrency: one round at a time, on this worker's task; who asks for one waits for its report.
Cancellation, crash: after any commit; the next round goes on.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from app.core.base.clock import Clock, wall_us
from app.core.base.errors import BopError, NotReady
from app.core.base.events import Events
from app.core.retention.collection_time import META_NAME, CollectionTime, StoredTime, started
from app.core.retention.collector import BlobCollector, Collected
from app.core.retention.expiry import Removed
from app.core.retention.orphans import OrphanReport, OrphanSweep
from app.core.retention.policy_pass import RetentionPass
from app.core.stores.manifest.ops import ManifestBatch, PutMeta
from app.core.stores.manifest.store import ManifestStore

STORE_TIME_US = 600 * 1_000_000

Orphans = Literal["report", "delete"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRequest:
    """`everything`: databases that are not known to be due are looked at as well."""

    everything: bool = False
    accept_clock: bool = False
    orphans: Orphans | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundReport:
    time: CollectionTime
    removed: Removed = field(default_factory=Removed)
    collected: Collected = field(default_factory=Collected)
    orphans: OrphanReport | None = None
    waiting: int = 0
    """Blobs in the queue afterwards."""


_decode_time = msgspec.msgpack.Decoder(StoredTime).decode


class Collector:
    name = "collector"

    def __init__(
        self,
        manifest: ManifestStore,
        *,
        retention: RetentionPass,
        blobs: BlobCollector,
        orphans: OrphanSweep,
        clock: Clock,
        events: Events,
        interval_seconds: float,
        grace_us: int,
        orphan_age_seconds: float,
        heartbeat: Callable[[], None] = lambda: None,
    ) -> None:
        self._manifest = manifest
        self._retention = retention
        self._blobs = blobs
        self._orphans = orphans
        self._clock = clock
        self._events = events
        self._interval_seconds = interval_seconds
        self._grace_us = grace_us
        self._orphan_age_us = int(orphan_age_seconds * 1_000_000)
        self._heartbeat = heartbeat
        self._asked: list[tuple[RoundRequest, asyncio.Future[RoundReport]]] = []
        self._wake = asyncio.Event()
        self._time: CollectionTime | None = None
        self._stored: StoredTime | None = None

    @property
    def paused(self) -> bool:
        return self._time is not None and self._time.paused

    async def ask(self, request: RoundRequest) -> RoundReport:
        """A round of its own. Raises what the round met."""
        answer: asyncio.Future[RoundReport] = asyncio.get_running_loop().create_future()
        self._asked.append((request, answer))
        self._wake.set()
        return await answer

    def waiting(self) -> int:
        """Objects in the queue."""
        with self._manifest.read() as view:
            return view.gc_count()

    def lag_seconds(self) -> float:
        """How long the oldest of them is overdue."""
        with self._manifest.read() as view:
            oldest = view.gc_rows(limit=1)
        if not oldest:
            return 0.0
        return max(wall_us(self._clock) - oldest[0].eligible_at_us, 0) / 1e6

    async def run(self) -> None:
        due_at = self._clock.monotonic()
        try:
            while True:
                now = self._clock.monotonic()
                if self._asked:
                    await self._answer(*self._asked.pop(0))
                elif now >= due_at:
                    await self._round_by_itself()
                    due_at = self._clock.monotonic() + self._interval_seconds
                else:
                    await self._wait(due_at - now)
        finally:
            for _, answer in self._asked:
                if not answer.done():
                    answer.set_exception(NotReady("The service is stopping."))

    def now_us(self) -> int:
        """The time by which the next round would judge what expires."""
        wall, monotonic = wall_us(self._clock), self._clock.monotonic()
        time = self._time or started(self._load(), wall_us=wall, monotonic=monotonic)
        return time.advanced(wall_us=wall, monotonic=monotonic).now_us

    async def _round_by_itself(self) -> None:
        try:
            await self.round(RoundRequest())
        except BopError as error:
            self._events.warning("collection.failed", code=error.code, detail=str(error))
        self._heartbeat()

    async def round(self, request: RoundRequest) -> RoundReport:
        """Raises RemoteUnavailable and NotReady where something is due that needs the store."""
        time = await self._advance(accept=request.accept_clock)
        if time.paused:
            return RoundReport(time=time, waiting=self.waiting())
        now_us = time.now_us
        removed = await self._retention.run(now_us, everything=request.everything)
        orphans = None
        if request.orphans is not None:
            orphans = await self._orphans.run(
                modified_before_us=now_us - self._orphan_age_us,
                delete=request.orphans == "delete",
                eligible_at_us=now_us + self._grace_us,
            )
        # Read again: what was retired just now is due, too, where the grace period is zero.
        collected = await self._blobs.collect((await self._advance(accept=False)).now_us)
        return RoundReport(
            time=time,
            removed=removed,
            collected=collected,
            orphans=orphans,
            waiting=self.waiting(),
        )

    async def _answer(self, request: RoundRequest, answer: "asyncio.Future[RoundReport]") -> None:
        """Whatever comes of the round, who asked is told."""
        failure: BopError = NotReady("The service is stopping.")
        try:
            report = await self.round(request)
        except BopError as error:
            failure = error
        else:
            if not answer.done():
                answer.set_result(report)
        finally:
            if not answer.done():
                answer.set_exception(failure)

    async def _wait(self, seconds: float) -> None:
        """Until the next round is due, or one is asked for."""
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            return
        self._wake.clear()

    async def _advance(self, *, accept: bool) -> CollectionTime:
        wall, monotonic = wall_us(self._clock), self._clock.monotonic()
        if self._time is None:
            self._stored = self._load()
            time = started(self._stored, wall_us=wall, monotonic=monotonic)
        else:
            time = self._time.advanced(wall_us=wall, monotonic=monotonic)
        if accept:
            time = time.accepted()
        if time.paused and (self._time is None or not self._time.paused):
            self._events.error(
                "collection.paused",
                detail="The wall clock jumped. Look at it, then POST /admin/gc/run with "
                "accept_clock.",
                behind_us=time.wall_us - time.time_us,
            )
        self._time = time
        await self._store(time)
        return time

    async def _store(self, time: CollectionTime) -> None:
        """Now and then: a crash counts as downtime from here on."""
        known = self._stored
        if (
            known is not None
            and known.paused == time.paused
            and abs(time.time_us - known.time_us) < STORE_TIME_US
        ):
            return
        self._stored = time.stored
        value = msgspec.msgpack.encode(self._stored)
        await self._manifest.commit(
            ManifestBatch(ops=(PutMeta(name=META_NAME, value=value),), reason="collection.time")
        )

    def _load(self) -> StoredTime | None:
        with self._manifest.read() as view:
            raw = view.meta(META_NAME)
        return None if raw is None else _decode_time(raw)
