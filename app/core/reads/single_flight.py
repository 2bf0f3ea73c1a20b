"""One fetch of a thing at a time: who asks for what is being fetched waits for that.

Concurrency: belongs to the event loop. Cancellation: a fetch goes on as long as anyone waits for
it, and is cancelled with the last one who leaves. Every fetch is owned by the given scope.
"""

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

from app.core.base.tasks import TaskScope

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _Flight(Generic[V]):
    __slots__ = ("task", "waiters")

    def __init__(self, task: asyncio.Task[V]) -> None:
        self.task = task
        self.waiters = 0


class SingleFlight(Generic[K, V]):
    def __init__(self, scope: TaskScope) -> None:
        self._scope = scope
        self._flights: dict[K, _Flight[V]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def __contains__(self, key: K) -> bool:
        return key in self._flights

    async def run(self, key: K, fetch: Callable[[], Coroutine[Any, Any, V]]) -> V:
        """The result of the `fetch` that is under way for `key`, or of this one. Raises what it
        raises; the next call tries anew.
        """
        flight = self._flights.get(key)
        if flight is None:
            flight = _Flight(self._scope.start(fetch(), name="flight"))
            self._flights[key] = flight
        flight.waiters += 1
        try:
            # Shielded: one of several waiters may leave without ending it for the others.
            return await asyncio.shield(flight.task)
        finally:
            flight.waiters -= 1
            if flight.waiters == 0 or flight.task.done():
                if self._flights.get(key) is flight:
                    del self._flights[key]
                flight.task.cancel()  # of one that is done: nothing
