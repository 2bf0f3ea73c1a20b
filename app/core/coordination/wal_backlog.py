"""How much unpublished WAL each database has, and whose turn it is to be told to wait.

Pure bookkeeping. The budget is shared evenly among the tenants that have unpublished WAL, and a
tenant's share among its databases. A database is asked for a checkpoint at `trigger_ratio` of its
share. It is refused appends beyond its share once its checkpoint is overdue or the whole budget is
used, and in no other case: a database within its share is never refused for what others have.
An append larger than the share passes while the database has nothing unpublished, else it could
never be.
"""

import math
from dataclasses import dataclass, field

from app.core.coordination.quota_levels import FreedRate


@dataclass(frozen=True, slots=True, kw_only=True)
class BacklogLimits:
    budget_bytes: int
    trigger_ratio: float
    """Of a database's share; a checkpoint is asked for there."""
    overdue_seconds: float
    """After that long above the trigger, what is beyond the share is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BacklogRefusal:
    share_bytes: int
    backlog_bytes: int
    retry_after_seconds: int


@dataclass(slots=True, kw_only=True)
class Backlog:
    """Of one database. Only `WalBacklog` changes it."""

    db_id: int
    tenant: str
    bytes: int = 0
    """In its files, in no generation yet."""
    held_bytes: int = 0
    """On their way there."""
    dirty_since: float | None = None
    pressed_since: float | None = None
    drained: FreedRate = field(default_factory=FreedRate)

    @property
    def total_bytes(self) -> int:
        return self.bytes + self.held_bytes


class WalBacklog:
    def __init__(self, limits: BacklogLimits) -> None:
        self._limits = limits
        self._databases: dict[int, Backlog] = {}
        self._active: dict[str, int] = {}  # tenant → its databases with a backlog
        self._total_bytes = 0

    @property
    def total_bytes(self) -> int:
        return self._total_bytes

    def add(self, *, db_id: int, tenant: str) -> Backlog:
        entry = self._databases[db_id] = Backlog(db_id=db_id, tenant=tenant)
        return entry

    def remove(self, entry: Backlog) -> None:
        self._change(entry, size_bytes=0, held_bytes=0)
        self._databases.pop(entry.db_id, None)

    def get(self, db_id: int) -> Backlog | None:
        return self._databases.get(db_id)

    def dirty_since(self, db_id: int) -> float:
        """Infinite for a database without unpublished WAL."""
        entry = self._databases.get(db_id)
        since = None if entry is None else entry.dirty_since
        return math.inf if since is None else since

    def dirty(self, tenant: str | None = None) -> list[Backlog]:
        """Databases with unpublished WAL, of one tenant or of all, oldest WAL first."""
        found = [
            entry
            for entry in self._databases.values()
            if entry.dirty_since is not None and (tenant is None or entry.tenant == tenant)
        ]
        return sorted(found, key=lambda entry: (entry.dirty_since, entry.db_id))

    def share_bytes(self, entry: Backlog) -> int:
        active = self._active.get(entry.tenant, 0) + (entry.total_bytes == 0)
        tenants = len(self._active) + (entry.tenant not in self._active)
        return self._limits.budget_bytes // (tenants * active)

    def hold(self, entry: Backlog, size_bytes: int, *, now: float) -> BacklogRefusal | None:
        """Takes `size_bytes` into account, or says why not."""
        before = entry.total_bytes
        share_bytes = self.share_bytes(entry)
        if before and before + size_bytes > share_bytes:
            full = self._total_bytes + size_bytes > self._limits.budget_bytes
            since = entry.pressed_since
            overdue = since is not None and now - since >= self._limits.overdue_seconds
            if full or overdue:
                return BacklogRefusal(
                    share_bytes=share_bytes,
                    backlog_bytes=before,
                    retry_after_seconds=entry.drained.seconds_until(
                        before + size_bytes - share_bytes, now=now
                    ),
                )
        self._change(entry, size_bytes=entry.bytes, held_bytes=entry.held_bytes + size_bytes)
        return None

    def let_go(self, entry: Backlog, size_bytes: int) -> None:
        """What was held is in the files now, or will never be."""
        held_bytes = entry.held_bytes - size_bytes
        assert held_bytes >= 0
        self._change(entry, size_bytes=entry.bytes, held_bytes=held_bytes)

    def update(self, entry: Backlog, size_bytes: int, *, now: float) -> None:
        """The files hold so much unpublished WAL now."""
        if size_bytes < entry.bytes:
            entry.drained.add(entry.bytes - size_bytes, now=now)
        self._change(entry, size_bytes=size_bytes, held_bytes=entry.held_bytes)
        if not size_bytes:
            entry.dirty_since = None
        elif entry.dirty_since is None:
            entry.dirty_since = now
        if not size_bytes or size_bytes < self._limits.trigger_ratio * self.share_bytes(entry):
            entry.pressed_since = None
        elif entry.pressed_since is None:
            entry.pressed_since = now

    def _change(self, entry: Backlog, *, size_bytes: int, held_bytes: int) -> None:
        was = entry.total_bytes
        entry.bytes, entry.held_bytes = size_bytes, held_bytes
        total = entry.total_bytes
        self._total_bytes += total - was
        if bool(total) != bool(was):
            count = self._active.get(entry.tenant, 0) + (1 if total else -1)
            if count:
                self._active[entry.tenant] = count
            else:
                del self._active[entry.tenant]
