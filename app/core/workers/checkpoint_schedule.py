"""When a database's timer is due. Pure.

Every database has a place of its own within the interval, so that a thousand that became dirty
together are checkpointed one after the other. Places follow the golden ratio: those of any run of
ids lie evenly apart, and the same database has the same place in every process.
"""

import heapq
import math

_GOLDEN = (math.sqrt(5) - 1) / 2


def phase_of(db_id: int) -> float:
    """The database's place, in [0, 1) of an interval."""
    return (db_id * _GOLDEN) % 1.0


def next_due(db_id: int, *, interval_seconds: float, now: float) -> float:
    """The first moment after `now` at the database's place; at most an interval away."""
    phase = phase_of(db_id) * interval_seconds
    periods = math.floor((now - phase) / interval_seconds) + 1
    due = phase + periods * interval_seconds
    return due if due > now else due + interval_seconds


class CheckpointSchedule:
    """The databases whose timer runs. Only dirty ones are here; the others cost nothing."""

    def __init__(self) -> None:
        self._due: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._due)

    def __contains__(self, db_id: int) -> bool:
        return db_id in self._due

    def arm(self, db_id: int, *, due: float) -> None:
        """In place of what was set before."""
        self._due[db_id] = due
        heapq.heappush(self._heap, (due, db_id))

    def disarm(self, db_id: int) -> None:
        self._due.pop(db_id, None)

    def next_due(self) -> float | None:
        self._drop_stale()
        return self._heap[0][0] if self._heap else None

    def take_due(self, now: float) -> list[int]:
        """Those whose time has come, in its order; they are armed no longer."""
        taken: list[int] = []
        while (due := self.next_due()) is not None and due <= now:
            _, db_id = heapq.heappop(self._heap)
            del self._due[db_id]
            taken.append(db_id)
        return taken

    def _drop_stale(self) -> None:
        while self._heap and self._due.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
