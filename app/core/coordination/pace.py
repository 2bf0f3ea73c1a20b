"""Bytes a second for work that has all the time in the world: verification.

Concurrency: loop-confined; those who share a pace take turns as they wake. Cancellation: nothing
was taken. Crash: nothing is kept.
"""

from collections.abc import Callable

from app.core.base.clock import Clock
from app.core.coordination.bandwidth import PAUSE_SECONDS, ByteBucket, Pause


class Pace:
    def __init__(self, bytes_per_second: int | None, *, pause: Pause, clock: Clock) -> None:
        self._bucket = ByteBucket(bytes_per_second, clock=clock)
        self._pause = pause
        self._clock = clock

    async def take(self, size_bytes: int, *, on_wait: Callable[[], None]) -> None:
        """Returns when so many may be read; `on_wait` is told now and then that this is no stall.
        What is larger than a burst is paid for afterwards, by who comes next.
        """
        while True:
            on_wait()
            if self._pause.is_open():
                await self._clock.sleep(PAUSE_SECONDS)
                continue
            seconds = self._bucket.wait_seconds(size_bytes)
            if seconds == 0:
                self._bucket.take(size_bytes)
                return
            await self._clock.sleep(min(seconds, 1.0))
