"""Pauses background reads while foreground reads are slow.

The breaker looks at the foreground fetches of a sliding window. It opens where their 99th
percentile passes the limit, and closes again only well below it, or when nobody reads any more.

Concurrency: loop-confined; judged when asked, at most a few times a second. Crash: memory only.
"""

from collections import deque
from collections.abc import Mapping

import numpy as np

from app.core.base.clock import Clock
from app.core.base.events import Events, Level

WINDOW_SECONDS = 10.0
SAMPLES_MAX = 2048
SAMPLES_MIN = 5
"""Of fewer nothing can be said."""
JUDGED_SECONDS = 0.2
RESUME_RATIO = 0.7
"""Hysteresis: closes at this part of what opens it."""
PERCENTILE = 99.0


class ForegroundBreaker:
    """Open: background reads wait. Also an event sink that takes foreground fetches."""

    def __init__(self, *, limit_seconds: float, clock: Clock, events: Events) -> None:
        self._limit_seconds = limit_seconds
        self._clock = clock
        self._events = events
        self._samples: deque[tuple[float, float]] = deque(maxlen=SAMPLES_MAX)
        self._open = False
        self._judged_at: float | None = None

    def __call__(self, name: str, level: Level, fields: Mapping[str, object]) -> None:
        del level
        if name == "page.read":
            seconds = fields["seconds"]
            assert isinstance(seconds, float)
            self.observe(seconds)

    def observe(self, seconds: float) -> None:
        """A foreground fetch took so long."""
        self._samples.append((self._clock.monotonic(), seconds))

    def is_open(self) -> bool:
        now = self._clock.monotonic()
        if self._judged_at is None or now - self._judged_at >= JUDGED_SECONDS:
            self._judged_at = now
            self._judge()
        return self._open

    def p99_seconds(self) -> float | None:
        """None: too few fetches to say."""
        begin = self._clock.monotonic() - WINDOW_SECONDS
        while self._samples and self._samples[0][0] < begin:
            self._samples.popleft()
        if len(self._samples) < SAMPLES_MIN:
            return None
        return float(np.percentile([seconds for _, seconds in self._samples], PERCENTILE))

    def _judge(self) -> None:
        p99 = self.p99_seconds()
        limit = self._limit_seconds * (RESUME_RATIO if self._open else 1.0)
        was_open, self._open = self._open, p99 is not None and p99 > limit
        if self._open != was_open:
            self._events.warning(
                "cold_scan.paused" if self._open else "cold_scan.resumed", p99_seconds=p99
            )
