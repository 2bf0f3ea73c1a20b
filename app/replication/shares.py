"""What the followers of a process share: memory, and connections to the service.

Concurrency: loop-confined.
"""

import asyncio

REQUESTS_MAX = 48
"""Side by side. Those that wait are kept from the HTTP client, whose queue takes time that grows
with the square of its length.
"""
IMAGES_MAX = 8
"""Besides: one that takes hours holds up no commit of another database."""


class Shares:
    def __init__(self, carried_bytes: int) -> None:
        self.requests = asyncio.Semaphore(REQUESTS_MAX)
        self.images = asyncio.Semaphore(IMAGES_MAX)
        self._carried_bytes = carried_bytes
        self._taken: dict[object, int] = {}
        self._taken_bytes = 0

    def free_for(self, owner: object) -> int:
        """What `owner` may hold of frames that are carried, in all."""
        return max(0, self._carried_bytes - self._taken_bytes + self._taken.get(owner, 0))

    def take(self, owner: object, count: int) -> None:
        """In the place of what it had."""
        self._taken_bytes += count - self._taken.pop(owner, 0)
        if count:
            self._taken[owner] = count
