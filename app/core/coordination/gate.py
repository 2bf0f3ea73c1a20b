"""A gate that closes to newcomers and waits for those inside.

Invariants: once `close` was called nobody enters; when it returns True nobody is inside.
Concurrency: confined to the event loop's thread; any number of tasks may wait in `close`.
Cancellation: a cancelled `close` leaves the gate closed; those inside go on.
Crash: nothing is kept.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from app.core.base.errors import BopError, NotReady


def _shutting_down() -> BopError:
    return NotReady("The service is shutting down.")


class Gate:
    def __init__(self, *, refusal: Callable[[], BopError] = _shutting_down) -> None:
        """`refusal` makes the error that newcomers meet once the gate is closed."""
        self._refusal = refusal
        self._inside = 0
        self._closed = False
        self._empty = asyncio.Event()
        self._empty.set()

    def __repr__(self) -> str:
        return f"<Gate {'closed' if self._closed else 'open'}, {self._inside} inside>"

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def inside(self) -> int:
        return self._inside

    @contextmanager
    def enter(self) -> Iterator[None]:
        if self._closed:
            raise self._refusal()
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if self._inside == 0:
                self._empty.set()

    async def close(self, *, timeout_seconds: float) -> bool:
        """Closes at once, then waits. False: somebody is still inside; the gate stays closed."""
        self._closed = True
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._empty.wait()
        except TimeoutError:
            return self._inside == 0
        return True
