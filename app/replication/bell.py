"""What a follower sleeps by: how long until it looks again, and what wakes it before."""

import asyncio
import contextlib

SETTLE_SECONDS = (0.002, 0.01, 0.05, 0.25, 1.0)
"""When to look again after a change was seen: the index changes behind the log, unannounced."""
IDLE_SECONDS = 10.0
"""When to look without having been woken, where waking works."""
POLL_SECONDS = 0.25
"""And where it does not."""
MISSING_SECONDS = 1.0
BATCH_SECONDS = 0.01
"""Commits of this time go together."""


class Bell:
    def __init__(self) -> None:
        self._changed = asyncio.Event()
        self._stopping = asyncio.Event()
        self._looks = 0

    @property
    def is_stopped(self) -> bool:
        return self._stopping.is_set()

    @property
    def is_quiet(self) -> bool:
        """Nothing has come for a while, and nobody looks again soon."""
        return self._looks >= len(SETTLE_SECONDS)

    @property
    def is_idle(self) -> bool:
        return self._looks > len(SETTLE_SECONDS)

    def ring(self) -> None:
        self._changed.set()
        self._looks = 0

    def stir(self) -> None:
        """Something was seen: look again soon."""
        self._looks = 0

    def stop(self) -> None:
        self._stopping.set()
        self._changed.set()

    async def rest(self, seconds: float) -> None:
        """Until it rings, or the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        self._changed.clear()

    async def pause(self, seconds: float) -> None:
        """Unless it is stopped."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    def quiet_seconds(self, *, is_watched: bool) -> float:
        """Until the next look, longer each time."""
        self._looks += 1
        if self._looks <= len(SETTLE_SECONDS):
            return SETTLE_SECONDS[self._looks - 1]
        return IDLE_SECONDS if is_watched else POLL_SECONDS
