"""The share of the last hour's checkpoints that succeeded, as a gauge that needs no Prometheus.

Minutes are counted, not checkpoints: memory does not grow with them. Loop-confined.
"""

from collections import deque
from dataclasses import dataclass

from app.core.base.clock import Clock

WINDOW_MINUTES = 60


@dataclass(slots=True, kw_only=True)
class _Minute:
    at: int
    succeeded: int = 0
    failed: int = 0


class SuccessRate:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._minutes: deque[_Minute] = deque()

    def add(self, *, succeeded: bool) -> None:
        now = self._forget_old()
        if not self._minutes or self._minutes[-1].at != now:
            self._minutes.append(_Minute(at=now))
        if succeeded:
            self._minutes[-1].succeeded += 1
        else:
            self._minutes[-1].failed += 1

    def value(self) -> float:
        """1 where none ended: nothing failed."""
        self._forget_old()
        succeeded = sum(minute.succeeded for minute in self._minutes)
        ended = succeeded + sum(minute.failed for minute in self._minutes)
        return succeeded / ended if ended else 1.0

    def _forget_old(self) -> int:
        now = int(self._clock.monotonic() // 60)
        while self._minutes and self._minutes[0].at <= now - WINDOW_MINUTES:
            self._minutes.popleft()
        return now
