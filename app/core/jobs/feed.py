"""Wakes whoever waits for a job to change. Loop-confined."""

import asyncio
from collections import defaultdict


class JobFeed:
    """Waiters per job; a change wakes all of them once, and they look at the manifest again."""

    def __init__(self) -> None:
        self._waiters: dict[str, set[asyncio.Future[None]]] = defaultdict(set)

    def notify(self, job_id: str) -> None:
        for waiter in self._waiters.pop(job_id, ()):
            if not waiter.done():
                waiter.set_result(None)

    def subscribe(self, job_id: str) -> asyncio.Future[None]:
        """Resolved by the next change. Take it before reading, so that none is missed."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[job_id].add(waiter)
        return waiter

    def unsubscribe(self, job_id: str, waiter: asyncio.Future[None]) -> None:
        waiters = self._waiters.get(job_id)
        if waiters is not None:
            waiters.discard(waiter)
            if not waiters:
                del self._waiters[job_id]
