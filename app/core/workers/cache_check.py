"""Hashes what the hot cache found on the disk at start: after a power cut a file may hold rubbish.

Invariants: I10 does not rest on it, since readers check every block; it saves them the detour.
Concurrency: one file at a time, in the pool. Cancellation: between files. Crash: the next start
looks at all of them again.
"""

import asyncio

from app.core.base.events import Events
from app.core.stores.local.hot_cache import HotCache


class CacheCheck:
    name = "cache_check"

    def __init__(self, hot_cache: HotCache, *, events: Events) -> None:
        self._hot_cache = hot_cache
        self._events = events
        self._found = hot_cache.names()

    async def run(self) -> None:
        await self.run_once()
        await asyncio.get_running_loop().create_future()  # a worker ends only when it is stopped

    async def run_once(self) -> int:
        """How many files were dropped."""
        dropped = 0
        for name in reversed(self._found):  # those in use come first
            dropped += not await self._hot_cache.verify(name)
        if self._found:
            self._events.info("hot_cache.verified", files=len(self._found), dropped=dropped)
        return dropped
