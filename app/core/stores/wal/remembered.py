"""Idempotent appends: which keys were seen, and what they were answered.

Bounded by count and age. Age is counted by the monotonic clock within a process, so that a jump
of the wall clock forgets no key early; over a restart the wall clock is all there is.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from app.core.base.clock import Clock, wall_us

REMEMBERED_COUNT_MAX = 10_000
REMEMBERED_SECONDS = 24 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RememberedAppend:
    key_hash: bytes
    body_hash: bytes
    first_lsn: int
    last_lsn: int
    payload_bytes: int
    appended_at_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentAppend:
    """A keyed append and the segment where it begins (None: no longer in the WAL). Its answer is
    kept in the manifest before that segment goes.
    """

    append: RememberedAppend
    segment_id: int | None


@dataclass(frozen=True, slots=True)
class _Kept:
    append: RememberedAppend
    segment_id: int | None
    expires_at: float  # monotonic


class RememberedAppends:
    def __init__(self, clock: Clock, *, count_max: int = REMEMBERED_COUNT_MAX) -> None:
        self._clock = clock
        self._count_max = count_max
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()  # oldest first

    def __len__(self) -> int:
        return len(self._kept)

    def restore(self, appends: Iterable[SegmentAppend]) -> None:
        """At open: appends of the manifest and of the segments, in any order."""
        now, now_us = self._clock.monotonic(), wall_us(self._clock)
        for found in sorted(appends, key=lambda found: found.append.first_lsn):
            age_seconds = max(0.0, (now_us - found.append.appended_at_us) / 1e6)
            if age_seconds < REMEMBERED_SECONDS:
                self._keep(found, expires_at=now + REMEMBERED_SECONDS - age_seconds)

    def add(self, append: RememberedAppend, *, segment_id: int) -> None:
        self._keep(
            SegmentAppend(append=append, segment_id=segment_id),
            expires_at=self._clock.monotonic() + REMEMBERED_SECONDS,
        )

    def get(self, key_hash: bytes) -> RememberedAppend | None:
        kept = self._kept.get(key_hash)
        if kept is None:
            return None
        if kept.expires_at <= self._clock.monotonic():
            del self._kept[key_hash]
            return None
        return kept.append

    def of_segment(self, segment_id: int) -> tuple[RememberedAppend, ...]:
        return tuple(kept.append for kept in self._kept.values() if kept.segment_id == segment_id)

    def _keep(self, found: SegmentAppend, *, expires_at: float) -> None:
        key = found.append.key_hash
        self._kept.pop(key, None)
        self._kept[key] = _Kept(found.append, found.segment_id, expires_at)
        if len(self._kept) > self._count_max:
            self._kept.popitem(last=False)
