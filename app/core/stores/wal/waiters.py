"""Long polls: who waits for an LSN to become durable. Loop-confined."""

import asyncio
import heapq


class LsnWaiters:
    def __init__(self) -> None:
        self._by_lsn: dict[int, set[asyncio.Future[None]]] = {}
        self._order: list[int] = []  # heap of the keys, with some that nobody waits for any more

    def __len__(self) -> int:
        return sum(map(len, self._by_lsn.values()))

    async def wait(self, lsn: int) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = self._by_lsn.get(lsn)
        if waiting is None:
            waiting = self._by_lsn[lsn] = set()
            heapq.heappush(self._order, lsn)
        waiting.add(future)
        try:
            await future
        finally:
            self._leave(lsn, future)

    def wake(self, durable_lsn: int) -> None:
        while self._order and self._order[0] <= durable_lsn:
            for future in self._by_lsn.pop(heapq.heappop(self._order), ()):
                if not future.done():
                    future.set_result(None)

    def fail(self, error: Exception) -> None:
        for waiting in self._by_lsn.values():
            for future in waiting:
                if not future.done():
                    future.set_exception(error)

    def _leave(self, lsn: int, future: asyncio.Future[None]) -> None:
        waiting = self._by_lsn.get(lsn)
        if waiting is None:
            return
        waiting.discard(future)
        if not waiting:
            del self._by_lsn[lsn]
            if len(self._order) > 2 * len(self._by_lsn) + 64:
                self._order = list(self._by_lsn)
                heapq.heapify(self._order)
