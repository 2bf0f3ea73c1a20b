"""The disk room of the write-ahead logs: quota, back-pressure and the demand for checkpoints.

Invariants: I9: what an append will write is reserved at all levels before it is queued, and spent
when its segment was charged. I13: a refused append has taken nothing.
Concurrency: confined to the event loop; `hold` never awaits, so appends keep their order.
Cancellation: a hold belongs to its append in the log, which ends it whatever its caller does.
Crash: all is in memory; at start the files are charged by `reconciliation.py`.
"""

from app.core.base.clock import Clock
from app.core.base.errors import Backpressure, QuotaExhausted
from app.core.base.events import Events
from app.core.coordination.checkpoint_demand import CheckpointDemand
from app.core.coordination.quota import StorageQuota
from app.core.coordination.reservation import Reservation
from app.core.coordination.usage import UsageKind
from app.core.coordination.wal_backlog import Backlog, WalBacklog


class WalRooms:
    """Makes the room of each log."""

    def __init__(
        self,
        quota: StorageQuota,
        backlog: WalBacklog,
        demand: CheckpointDemand,
        *,
        clock: Clock,
        events: Events,
    ) -> None:
        self.quota = quota
        self.backlog = backlog
        self.demand = demand
        self.clock = clock
        self.events = events

    def open(self, *, db_id: int, tenant: str) -> "DatabaseRoom":
        return DatabaseRoom(self, self.backlog.add(db_id=db_id, tenant=tenant))


class DatabaseRoom:
    """One log's room (`stores/wal/room.py`)."""

    def __init__(self, rooms: WalRooms, entry: Backlog) -> None:
        self._rooms = rooms
        self._entry = entry
        self._account = rooms.quota.account(
            kind=UsageKind.WAL, owner=str(entry.db_id), tenant=entry.tenant
        )

    def hold(self, size_bytes: int) -> "WalHold | None":
        rooms, entry = self._rooms, self._entry
        reservation = rooms.quota.reserve_now(
            tenant=entry.tenant, job_id=None, size_bytes=size_bytes
        )
        if reservation is None:
            return None
        now = rooms.clock.monotonic()
        refusal = rooms.backlog.hold(entry, size_bytes, now=now)
        if refusal is None:
            return WalHold(self, reservation)
        reservation.release()
        rooms.demand.pressed(entry.db_id)
        rooms.events.debug(
            "wal.backpressure", tenant=entry.tenant, db_id=entry.db_id,
            backlog_bytes=refusal.backlog_bytes, share_bytes=refusal.share_bytes,
        )  # fmt: skip
        raise Backpressure(
            "The database's unpublished WAL is beyond its share of the budget.",
            retry_after_seconds=refusal.retry_after_seconds,
            backlog_bytes=refusal.backlog_bytes,
            share_bytes=refusal.share_bytes,
        )

    async def make_way(self, size_bytes: int) -> None:
        rooms, tenant = self._rooms, self._entry.tenant
        try:
            await rooms.quota.make_room(tenant=tenant, size_bytes=size_bytes)
        except QuotaExhausted as refused:
            rooms.demand.starved(tenant if refused.fields["level"] == "tenant" else None)
            raise

    def charge(self, name: str, *, device: int, inode: int, size_bytes: int) -> None:
        self._account.charge(name, device=device, inode=inode, size_bytes=size_bytes)

    def discharge(self, name: str, *, device: int, inode: int) -> None:
        self._account.discharge(name, device=device, inode=inode)

    def unpublished(self, size_bytes: int) -> None:
        rooms, entry = self._rooms, self._entry
        was_dirty, was_pressed = entry.dirty_since is not None, entry.pressed_since is not None
        rooms.backlog.update(entry, size_bytes, now=rooms.clock.monotonic())
        if entry.dirty_since is not None and not was_dirty:
            rooms.demand.dirty(entry.db_id)
        if entry.pressed_since is not None and not was_pressed:
            rooms.demand.pressed(entry.db_id)

    def forget(self) -> None:
        self._account.forget()
        self._rooms.backlog.remove(self._entry)

    def end_hold(self, size_bytes: int) -> None:
        self._rooms.backlog.let_go(self._entry, size_bytes)


class WalHold:
    """Room for one append (`stores/wal/room.py`)."""

    __slots__ = ("_reservation", "_room")

    def __init__(self, room: DatabaseRoom, reservation: Reservation) -> None:
        self._room = room
        self._reservation = reservation

    def spend(self) -> None:
        size_bytes = self._reservation.size_bytes
        self._reservation.spend(size_bytes)
        self._room.end_hold(size_bytes)

    def release(self) -> None:
        size_bytes = self._reservation.size_bytes
        self._reservation.release()
        self._room.end_hold(size_bytes)
