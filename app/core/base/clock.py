"""Time and randomness come in from outside, so that a seed replays a run and tests never sleep."""

import asyncio
import random
import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Wall time is for people and retention; safety is decided by `monotonic` alone (I16)."""

    def wall_ns(self) -> int:
        """Nanoseconds since the Unix epoch."""
        ...

    def monotonic(self) -> float:
        """Seconds since some fixed point of this process."""
        ...

    async def sleep(self, seconds: float) -> None: ...


class SystemClock:
    def wall_ns(self) -> int:
        return time.time_ns()

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Randomness(Protocol):
    def uniform(self, low: float, high: float) -> float: ...

    def bits(self, count: int) -> int:
        """An integer of `count` random bits."""
        ...


class SystemRandomness:
    def __init__(self) -> None:
        self._source = random.SystemRandom()

    def uniform(self, low: float, high: float) -> float:
        return self._source.uniform(low, high)

    def bits(self, count: int) -> int:
        return self._source.getrandbits(count)


class SeededRandomness:
    """For tests and simulation: the same seed gives the same run."""

    def __init__(self, seed: int) -> None:
        self._source = random.Random(seed)

    def uniform(self, low: float, high: float) -> float:
        return self._source.uniform(low, high)

    def bits(self, count: int) -> int:
        return self._source.getrandbits(count)


_DOUBLINGS_MAX = 64
"""Some try for days: beyond 1,023 doublings a float overflows."""


def full_jitter(
    randomness: Randomness, *, attempt: int, base_seconds: float, cap_seconds: float
) -> float:
    """Seconds to wait before attempt `attempt` + 1 (first attempt is 1).

    Exponential backoff with full jitter, as in the AWS Architecture Blog's article of that name.
    """
    doublings = min(attempt - 1, _DOUBLINGS_MAX)
    return randomness.uniform(0.0, min(cap_seconds, base_seconds * 2.0**doublings))


def wall_us(clock: Clock) -> int:
    """Microseconds since the Unix epoch: the unit of every stored timestamp."""
    return clock.wall_ns() // 1000


def rfc3339(timestamp_us: int) -> str:
    """UTC with `Z` and microseconds."""
    moment = datetime.fromtimestamp(timestamp_us // 1_000_000, tz=UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{timestamp_us % 1_000_000:06d}Z"
