"""Frees WAL that readers had pinned when its generation became durable."""

from app.core.base.clock import Clock
from app.core.base.errors import BopError
from app.core.base.events import Events
from app.core.checkpoint.wal_release import WalRelease

SWEEP_SECONDS = 30.0


class WalSweep:
    name = "wal_sweep"

    def __init__(self, release: WalRelease, *, clock: Clock, events: Events) -> None:
        self._release = release
        self._clock = clock
        self._events = events

    async def run(self) -> None:
        while True:
            try:
                await self._release.release_all()
            except BopError as error:
                self._events.warning("wal.sweep_failed", code=error.code, detail=str(error))
            await self._clock.sleep(SWEEP_SECONDS)
