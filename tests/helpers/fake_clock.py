"""A clock that moves only when a test says so."""

import asyncio
import heapq
import itertools


class FakeClock:
    """`advance` moves both clocks and wakes who slept long enough.

    `jump_wall` and `set_wall_ns` move the wall alone, as an operator or a time server would.
    """

    def __init__(
        self, *, wall_ns: int = 1_760_000_000_000_000_000, monotonic: float = 1_000.0
    ) -> None:
        self._wall_ns = wall_ns
        self._monotonic = monotonic
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._changed: set[asyncio.Future[None]] = set()

    def wall_ns(self) -> int:
        return self._wall_ns

    def monotonic(self) -> float:
        return self._monotonic

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._monotonic + seconds, next(self._order), woken))
        self._tell()
        await woken

    def advance(self, seconds: float) -> None:
        """Wakes sleepers in the order of their deadlines. One that sleeps again as it wakes counts
        from the new time: to see several rounds of a loop, advance several times.
        """
        assert seconds >= 0
        self._monotonic += seconds
        self._wall_ns += round(seconds * 1e9)
        while self._sleepers and self._sleepers[0][0] <= self._monotonic:
            _, _, woken = heapq.heappop(self._sleepers)
            if not woken.done():
                woken.set_result(None)

    def jump_wall(self, seconds: float) -> None:
        self._wall_ns += round(seconds * 1e9)

    def set_wall_ns(self, wall_ns: int) -> None:
        self._wall_ns = wall_ns

    @property
    def sleepers(self) -> int:
        return sum(not woken.done() for _, _, woken in self._sleepers)

    async def until_sleeping(self, count: int = 1) -> None:
        """Waits, without any time passing, until at least `count` tasks sleep."""
        while self.sleepers < count:
            changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._changed.add(changed)
            try:
                await changed
            finally:
                self._changed.discard(changed)

    def _tell(self) -> None:
        for changed in self._changed:
            if not changed.done():
                changed.set_result(None)
