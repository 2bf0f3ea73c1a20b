"""What waits to be written, and how much of it goes into one flush. Loop-confined."""

import asyncio
from collections import deque
from dataclasses import dataclass, field

from app.core.base.errors import Backpressure
from app.core.stores.wal.draft import Draft
from app.core.stores.wal.requests import Appended, AppendRequest
from app.core.stores.wal.room import Hold

QUEUE_BYTES_MAX = 256 * 1024 * 1024
QUEUE_COUNT_MAX = 8192
GROUP_BYTES_MAX = 16 * 1024 * 1024
GROUP_COUNT_MAX = 1024


@dataclass(slots=True, eq=False)
class WaitingAppend:
    request: AppendRequest
    payload_bytes: int
    answer: asyncio.Future[Appended]
    hold: Hold
    draft: Draft | None = None


@dataclass(slots=True, eq=False)
class WaitingSeal:
    done: asyncio.Future[None]


@dataclass(slots=True)
class Group:
    """One flush: appends in their order, then perhaps a seal of all that is there by then."""

    appends: list[WaitingAppend] = field(default_factory=list)
    seal: WaitingSeal | None = None


class AppendQueue:
    def __init__(
        self, *, bytes_max: int = QUEUE_BYTES_MAX, count_max: int = QUEUE_COUNT_MAX
    ) -> None:
        self._bytes_max = bytes_max
        self._count_max = count_max
        self._waiting: deque[WaitingAppend | WaitingSeal] = deque()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, waiting: WaitingAppend) -> None:
        """An append of any size fits an empty queue. Raises Backpressure."""
        if self._waiting and (
            self._bytes + waiting.payload_bytes > self._bytes_max
            or len(self._waiting) >= self._count_max
        ):
            raise Backpressure(
                "Too many appends of this database wait for the disk.", retry_after_seconds=1
            )
        self._waiting.append(waiting)
        self._bytes += waiting.payload_bytes

    def put_seal(self, waiting: WaitingSeal) -> None:
        self._waiting.append(waiting)

    def take(self) -> Group:
        group = Group()
        size = 0
        while self._waiting:
            head = self._waiting[0]
            if isinstance(head, WaitingSeal):
                group.seal = head
                self._waiting.popleft()
                break
            if group.appends and (
                size + head.payload_bytes > GROUP_BYTES_MAX or len(group.appends) >= GROUP_COUNT_MAX
            ):
                break
            self._waiting.popleft()
            group.appends.append(head)
            size += head.payload_bytes
        self._bytes -= size
        return group

    def take_all(self) -> list[WaitingAppend | WaitingSeal]:
        taken = list(self._waiting)
        self._waiting.clear()
        self._bytes = 0
        return taken


def fail(
    future: "asyncio.Future[Appended] | asyncio.Future[None]", error: Exception | None
) -> None:
    """The callers may all have left: an error that nobody takes is no complaint of the loop's."""
    assert error is not None
    if not future.done():
        future.set_exception(error)
        future.exception()
