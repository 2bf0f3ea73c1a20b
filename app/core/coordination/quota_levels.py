"""One budget of the hierarchy, and what a refusal may honestly say. Pure; see `quota.py`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from app.core.base.errors import InvariantViolation

RETRY_AFTER_MIN_SECONDS = 1
RETRY_AFTER_MAX_SECONDS = 60
RETRY_AFTER_UNKNOWN_SECONDS = 5  # nothing was freed lately: a guess, soon enough to be useful
FREED_MEMORY_SECONDS = 30.0


class LevelName(Enum):
    GLOBAL = "global"
    TENANT = "tenant"
    JOB = "job"
    DRAIN = "drain"


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantUsage:
    tenant: str
    limit_bytes: int | None
    used_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobUsage:
    job_id: str
    tenant: str
    reserved_bytes: int
    """What it holds of the drain reserve included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaSnapshot:
    global_limit_bytes: int
    global_used_bytes: int
    drain_limit_bytes: int
    drain_used_bytes: int
    tenants: tuple[TenantUsage, ...]
    jobs: tuple[JobUsage, ...]
    files_by_kind: Mapping[str, int]


class FreedRate:
    """What became free in a second, bytes or places: an average that forgets exponentially."""

    def __init__(self) -> None:
        self._bytes = 0.0
        self._at = 0.0

    def add(self, size_bytes: int, *, now: float) -> None:
        self._bytes = self._remembered(now) + size_bytes
        self._at = now

    def per_second(self, now: float) -> float:
        return self._remembered(now) / FREED_MEMORY_SECONDS

    def seconds_until(self, missing: int, *, now: float) -> int:
        """When so much more should be free if it goes on as of late, as a Retry-After."""
        rate = self.per_second(now)
        if rate * RETRY_AFTER_MAX_SECONDS < 1:
            return RETRY_AFTER_UNKNOWN_SECONDS
        wanted = math.ceil(missing / rate)
        return min(max(wanted, RETRY_AFTER_MIN_SECONDS), RETRY_AFTER_MAX_SECONDS)

    def _remembered(self, now: float) -> float:
        return self._bytes * math.exp((self._at - now) / FREED_MEMORY_SECONDS)


class Level:
    """A limit and what is used of it. Only its quota changes it."""

    __slots__ = ("_allowed_bytes", "_charged_bytes", "_reserved_bytes", "freed", "limit_bytes",
                 "name")  # fmt: skip

    def __init__(self, name: LevelName, *, limit_bytes: int | None) -> None:
        if limit_bytes is not None and limit_bytes < 0:
            raise InvariantViolation("A limit is not negative.", limit_bytes=limit_bytes)
        self.name = name
        self.limit_bytes = limit_bytes
        self.freed = FreedRate()
        self._reserved_bytes = 0
        self._charged_bytes = 0
        # The most that reservations may sum to: the limit, or what was held when it was lowered.
        self._allowed_bytes = limit_bytes

    @property
    def used_bytes(self) -> int:
        return self._reserved_bytes + self._charged_bytes

    def set_limit(self, limit_bytes: int | None) -> None:
        if limit_bytes is not None and limit_bytes < 0:
            raise InvariantViolation("A limit is not negative.", limit_bytes=limit_bytes)
        self.limit_bytes = limit_bytes
        self._allowed_bytes = (
            None if limit_bytes is None else max(limit_bytes, self._reserved_bytes)
        )

    def take(self, size_bytes: int) -> None:
        self._reserved_bytes += size_bytes
        assert self.limit_bytes is None or self.used_bytes <= self.limit_bytes

    def take_alone(self, size_bytes: int) -> None:
        """Beyond the limit, where nothing is reserved; see `StorageQuota.reserve`."""
        assert self._reserved_bytes == 0
        self._reserved_bytes = size_bytes
        if self._allowed_bytes is not None:
            self._allowed_bytes = max(self._allowed_bytes, size_bytes)

    def give_back(self, size_bytes: int, *, now: float | None) -> None:
        """Without a time it was spent, which frees nothing."""
        self._reserved_bytes -= size_bytes
        assert self._reserved_bytes >= 0
        if now is not None:
            self.freed.add(size_bytes, now=now)
        if self.limit_bytes is not None:
            self._allowed_bytes = max(self.limit_bytes, self._reserved_bytes)

    def charge(self, change_bytes: int, *, now: float) -> None:
        self._charged_bytes += change_bytes
        assert self._charged_bytes >= 0
        if change_bytes < 0:
            self.freed.add(-change_bytes, now=now)

    def check(self, reserved_bytes: int, charged_bytes: int) -> None:
        """Against what the reservations and files themselves sum to."""
        agree = (self._reserved_bytes, self._charged_bytes) == (reserved_bytes, charged_bytes)
        allowed = self._allowed_bytes is None or reserved_bytes <= self._allowed_bytes
        if not agree or not allowed:
            raise InvariantViolation(
                "The storage quota's sums are wrong.",
                level=self.name.value,
                limit_bytes=self.limit_bytes,
                reserved_bytes=self._reserved_bytes,
                reserved_bytes_found=reserved_bytes,
                charged_bytes=self._charged_bytes,
                charged_bytes_found=charged_bytes,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    level: LevelName
    limit_bytes: int
    used_bytes: int
    requested_bytes: int
    freed: FreedRate

    @property
    def missing_bytes(self) -> int:
        return self.used_bytes + self.requested_bytes - self.limit_bytes

    @property
    def detail(self) -> str:
        if self.requested_bytes > self.limit_bytes:
            return f"The request alone is larger than the {self.level.value} storage limit."
        return f"The {self.level.value} storage limit leaves no room for this now."

    def retry_after_seconds(self, now: float) -> int:
        """When the room should be there if freeing goes on as it did of late."""
        if self.requested_bytes > self.limit_bytes:
            return RETRY_AFTER_MAX_SECONDS  # only a higher limit helps
        return self.freed.seconds_until(self.missing_bytes, now=now)


def find_shortage(levels: Sequence[Level], size_bytes: int) -> Shortage | None:
    """The first level that cannot hold `size_bytes` more; nothing always fits."""
    for level in levels:
        limit = level.limit_bytes
        if size_bytes > 0 and limit is not None and level.used_bytes + size_bytes > limit:
            return Shortage(
                level=level.name,
                limit_bytes=limit,
                used_bytes=level.used_bytes,
                requested_bytes=size_bytes,
                freed=level.freed,
            )
    return None
