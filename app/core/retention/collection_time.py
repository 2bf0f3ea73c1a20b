"""The collector's time: what expires is judged by it, never by the wall clock alone. Pure.

It is kept in the manifest and advances with the monotonic clock while the process runs; what the
wall clock says has passed while it did not is believed up to a cap. So a clock set forward brings
nothing down early. A jump of the wall clock under a running process stops collection until an
operator has looked: timestamps from before and after it do not compare.
"""

from dataclasses import dataclass, replace

import msgspec

META_NAME = "collection_time"
DOWNTIME_US_MAX = 24 * 3600 * 1_000_000
SLEW_US_MAX = 2_000_000
"""What a time server does without anyone calling it a jump."""
JUMP_US_MAX = 300 * 1_000_000


class StoredTime(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    time_us: int
    wall_us: int
    paused: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectionTime:
    time_us: int
    wall_us: int
    monotonic: float
    paused: bool = False

    @property
    def now_us(self) -> int:
        """What timestamps are compared with: on either side of a small step, the later end."""
        return min(self.time_us, self.wall_us)

    @property
    def stored(self) -> StoredTime:
        return StoredTime(time_us=self.time_us, wall_us=self.wall_us, paused=self.paused)

    def advanced(self, *, wall_us: int, monotonic: float) -> "CollectionTime":
        expected_us = self.time_us + int((monotonic - self.monotonic) * 1_000_000)
        stepped_us = (wall_us - self.wall_us) - (expected_us - self.time_us)
        in_step = self.time_us == self.wall_us and abs(stepped_us) <= SLEW_US_MAX
        return CollectionTime(
            time_us=wall_us if in_step else expected_us,
            wall_us=wall_us,
            monotonic=monotonic,
            paused=self.paused or abs(stepped_us) > JUMP_US_MAX,
        )

    def accepted(self) -> "CollectionTime":
        """An operator says that the wall clock is right."""
        return replace(self, time_us=self.wall_us, paused=False)


def started(stored: StoredTime | None, *, wall_us: int, monotonic: float) -> CollectionTime:
    """At the start of a process. Without a stored time there is nothing that could be early."""
    if stored is None:
        return CollectionTime(time_us=wall_us, wall_us=wall_us, monotonic=monotonic)
    down_us = wall_us - stored.wall_us
    if 0 <= down_us <= DOWNTIME_US_MAX and stored.time_us == stored.wall_us:
        time_us = wall_us
    else:
        time_us = stored.time_us + min(max(down_us, 0), DOWNTIME_US_MAX)
    return CollectionTime(
        time_us=time_us, wall_us=wall_us, monotonic=monotonic, paused=stored.paused
    )
