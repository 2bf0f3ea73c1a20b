"""Stores what the manifest says of snapshots and forks and the bucket does not have yet.

Invariants: I3, see `checkpoint/history_objects.py`. Concurrency: one round at a time; `wake` from
the event loop. Cancellation: at any await. Crash: the round at start finds the rest.
"""

import asyncio
from collections.abc import Awaitable, Callable

from app.core.base.clock import Clock
from app.core.base.errors import BopError
from app.core.base.events import Events
from app.core.checkpoint.history_objects import HistoryObjects

RETRY_SECONDS = 5.0
SWEEP_SECONDS = 60.0


class HistoryUpload:
    name = "history_upload"

    def __init__(
        self,
        objects: HistoryObjects,
        *,
        ready: Callable[[], Awaitable[None]],
        clock: Clock,
        events: Events,
    ) -> None:
        self.objects = objects
        self._ready = ready
        self._clock = clock
        self._events = events
        self._woken = asyncio.Event()
        self._round = asyncio.Lock()

    def wake(self) -> None:
        self._woken.set()

    async def run(self) -> None:
        await self._ready()
        while True:
            self._woken.clear()
            seconds = SWEEP_SECONDS if await self.run_once() else RETRY_SECONDS
            try:
                async with asyncio.timeout(seconds):
                    await self._woken.wait()
            except TimeoutError:
                pass

    async def run_once(self) -> bool:
        """False: something is left for another round. Raises OwnershipLost."""
        async with self._round:
            try:
                await self.objects.store_missing()
            except BopError as error:
                self._events.warning("history.upload_failed", code=error.code, detail=str(error))
                return False
            return True

    async def drain(self, *, seconds: float) -> None:
        """At the end: what was made is in the bucket, if that answers in time."""
        try:
            async with asyncio.timeout(seconds):
                await self.run_once()
        except TimeoutError:
            self._events.warning("history.upload_waits", detail="it goes on at the next start")
