"""Budgets of disk room: global → tenant → job.

Invariants: I9: a reservation is taken at all levels or at none, never above a limit, and every
release gives back exactly what was taken, once. I13: a refused reservation leaves nothing behind.
What is used is reservations (room promised) plus charges (files that exist, each inode once).
Charges are facts and never refused; they may pass a limit, and then reservations are refused.
Concurrency: confined to the thread that made it, the event loop's; there is no await between the
check of a budget and the taking. `reserve` awaits only while reclaimers free room, and then checks
anew.
Cancellation: a cancelled `reserve` has taken nothing.
Crash: all is in memory; at start, files are charged by `reconciliation.py` and jobs that go on
reserve again.
"""

import asyncio
import threading
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol

from app.core.base import failpoints
from app.core.base.clock import Clock
from app.core.base.errors import InvariantViolation, QuotaExhausted
from app.core.base.events import Events
from app.core.coordination.drain_line import DrainLine
from app.core.coordination.quota_levels import (
    JobUsage,
    Level,
    LevelName,
    QuotaSnapshot,
    Shortage,
    TenantUsage,
    find_shortage,
)
from app.core.coordination.reservation import Reservation
from app.core.coordination.usage import InodeLedger, Payment, UsageKey, UsageKind, UsageLink

__all__ = ["Reclaimer", "Reservation", "StorageQuota", "UsageAccount"]


class Reclaimer(Protocol):
    """Holds files that it can do without: a cache."""

    async def reclaim(self, size_bytes: int) -> int:
        """Frees at least `size_bytes` if it can, and says how much it freed."""
        ...


class UsageAccount:
    """Charges the files of one owner, as a store of files sees it.

    Stores charge after a file was made or has grown, and discharge after it was unlinked.
    """

    def __init__(
        self, quota: "StorageQuota", *, kind: UsageKind, owner: str, tenant: str | None
    ) -> None:
        self._quota = quota
        self._kind = kind
        self._owner = owner
        self._tenant = tenant

    def charge(self, name: str, *, device: int, inode: int, size_bytes: int) -> None:
        """The file `name` is there and holds `size_bytes` now."""
        self._quota.charge(
            UsageKey(device=device, inode=inode), self._link(name), size_bytes=size_bytes
        )

    def discharge(self, name: str, *, device: int, inode: int) -> None:
        """The file `name` is gone. Its inode is passed on where another link is charged."""
        self._quota.discharge(UsageKey(device=device, inode=inode), self._link(name))

    def forget(self) -> None:
        """All of the owner's files are gone."""
        self._quota.forget(kind=self._kind, owner=self._owner)

    def missing_bytes(self, size_bytes: int) -> int:
        """How far a new file of that size would take use beyond the global limit."""
        return self._quota.missing_bytes(size_bytes)

    def _link(self, name: str) -> UsageLink:
        return UsageLink(kind=self._kind, owner=self._owner, name=name, tenant=self._tenant)


@dataclass(slots=True)
class _Tenant:
    level: Level = field(default_factory=lambda: Level(LevelName.TENANT, limit_bytes=None))
    job_limit_bytes: int | None = None
    held: int = 0
    """Reservations, those from the drain reserve included."""


@dataclass(slots=True)
class _Job:
    tenant: str
    level: Level
    reservations: set[Reservation] = field(default_factory=set)


class StorageQuota:
    def __init__(
        self, *, global_limit_bytes: int, drain_limit_bytes: int, clock: Clock, events: Events
    ) -> None:
        """`drain_limit_bytes` comes on top of the global limit: the disk must hold both."""
        self._clock = clock
        self._events = events
        self._global = Level(LevelName.GLOBAL, limit_bytes=global_limit_bytes)
        self._drain = Level(LevelName.DRAIN, limit_bytes=drain_limit_bytes)
        self._tenants: dict[str, _Tenant] = {}
        self._jobs: dict[str, _Job] = {}
        self._anonymous: set[Reservation] = set()
        self._drain_line = DrainLine()
        self._ledger = InodeLedger()
        self._reclaimers: list[Reclaimer] = []
        self._reclaiming = asyncio.Lock()
        self._thread = threading.get_ident()

    # --- limits

    def set_global_limit(self, limit_bytes: int) -> None:
        """A limit below what is used is taken; see `trim`, which then drops cache."""
        self._confined()
        self._global.set_limit(limit_bytes)

    def set_tenant_limits(
        self, tenant: str, *, limit_bytes: int | None, job_limit_bytes: int | None
    ) -> None:
        """None: no limit at that level. Jobs that run meet the new limit at their next step."""
        self._confined()
        entry = self._tenant(tenant)
        entry.level.set_limit(limit_bytes)
        entry.job_limit_bytes = job_limit_bytes
        for job in self._jobs.values():
            if job.tenant == tenant:
                job.level.set_limit(job_limit_bytes)
        self._tidy_tenant(tenant)

    def add_reclaimer(self, reclaimer: Reclaimer) -> None:
        """Reclaimers are asked in the order in which they were added."""
        self._reclaimers.append(reclaimer)

    async def trim(self) -> int:
        """Drops cache until use is within the global limit; returns the bytes freed."""
        excess = self._global.used_bytes - (self._global.limit_bytes or 0)
        return await self._reclaim(excess) if excess > 0 else 0

    # --- reservations

    async def reserve(
        self,
        *,
        tenant: str,
        job_id: str | None,
        size_bytes: int,
        drain_since: float | None = None,
    ) -> Reservation:
        """Raises QuotaExhausted. Short of global room, reclaimers are asked before refusing.

        `drain_since` is for a checkpoint that frees WAL, which must always run: since when that
        waits. What ordinary budgets refuse is then taken from the drain reserve: one that is
        larger than all of it has it alone, and of those that are refused the one with the oldest
        WAL goes first.
        """
        while True:
            if taken := self.reserve_now(tenant=tenant, job_id=job_id, size_bytes=size_bytes):
                return taken
            shortage = await self._reclaim_for(tenant, job_id, size_bytes)
            if shortage is not None:
                break
        if drain_since is None:
            raise self._refusal(shortage, tenant)
        now = self._clock.monotonic()
        waits_for = self._drain_line.before(job_id, since=drain_since, now=now)
        drained = find_shortage((self._drain,), size_bytes + waits_for)
        if drained is not None and (
            self._drain.used_bytes or waits_for or not self._drain.limit_bytes
        ):
            self._drain_line.join(job_id, since=drain_since, size_bytes=size_bytes, now=now)
            raise self._refusal(find_shortage((self._drain,), size_bytes) or drained, tenant)
        self._drain_line.leave(job_id)
        return self._take(tenant, job_id, size_bytes, drained=True)

    def reserve_now(
        self, *, tenant: str, job_id: str | None, size_bytes: int
    ) -> Reservation | None:
        """A reservation, or None where some level is short."""
        if size_bytes < 0:
            raise InvariantViolation("A reservation has no negative size.", size_bytes=size_bytes)
        if self._shortage(tenant, job_id, size_bytes) is not None:
            return None
        return self._take(tenant, job_id, size_bytes)

    async def make_room(self, *, tenant: str, size_bytes: int) -> None:
        """Frees what can be done without, for a `reserve_now` to be tried again.

        Raises QuotaExhausted where that is in vain.
        """
        shortage = await self._reclaim_for(tenant, None, size_bytes)
        if shortage is not None:
            raise self._refusal(shortage, tenant)

    def release_job(self, job_id: str) -> int:
        """Gives back all that a job holds; returns the bytes. A job that holds nothing is fine."""
        self._confined()
        job = self._jobs.get(job_id)
        held = list(job.reservations) if job is not None else []
        released = sum(reservation.size_bytes for reservation in held)
        for reservation in held:
            reservation.release()
        return released

    def holders(self) -> Collection[str]:
        """The jobs that hold reservations."""
        return tuple(self._jobs)

    # --- files

    def account(self, *, kind: UsageKind, owner: str = "", tenant: str | None) -> UsageAccount:
        return UsageAccount(self, kind=kind, owner=owner, tenant=tenant)

    def charge(self, key: UsageKey, link: UsageLink, *, size_bytes: int) -> None:
        self._confined()
        self._apply(self._ledger.link(key, link, size_bytes=size_bytes))

    def discharge(self, key: UsageKey, link: UsageLink) -> None:
        self._confined()
        self._apply(self._ledger.unlink(key, link.place))

    def forget(self, *, kind: UsageKind, owner: str) -> None:
        """A whole directory is gone."""
        self._confined()
        self._apply(self._ledger.unlink_owner(kind=kind, owner=owner))

    def missing_bytes(self, size_bytes: int) -> int:
        """How far `size_bytes` more would take use beyond the global limit."""
        shortage = find_shortage((self._global,), size_bytes)
        return 0 if shortage is None else shortage.missing_bytes

    def forget_scratch(self, job_id: str) -> None:
        """The job's directory is gone, or its reservation stands for it."""
        self.forget(kind=UsageKind.SCRATCH, owner=job_id)

    @property
    def ledger(self) -> InodeLedger:
        """For `reconciliation.py`, which corrects through `charge` and `discharge`."""
        return self._ledger

    # --- looking

    def snapshot(self) -> QuotaSnapshot:
        self._confined()
        return QuotaSnapshot(
            global_limit_bytes=self._global.limit_bytes or 0,
            global_used_bytes=self._global.used_bytes,
            drain_limit_bytes=self._drain.limit_bytes or 0,
            drain_used_bytes=self._drain.used_bytes,
            tenants=tuple(
                TenantUsage(
                    tenant=name,
                    limit_bytes=entry.level.limit_bytes,
                    used_bytes=entry.level.used_bytes,
                )
                for name, entry in sorted(self._tenants.items())
            ),
            jobs=tuple(
                JobUsage(
                    job_id=job_id,
                    tenant=job.tenant,
                    reserved_bytes=sum(held.size_bytes for held in job.reservations),
                )
                for job_id, job in sorted(self._jobs.items())
            ),
            files_by_kind={kind.value: used for kind, used in self._ledger.by_kind.items()},
        )

    def check(self) -> None:
        """Raises InvariantViolation where the running sums and what they stand for disagree."""
        reservations = self._anonymous.union(*(job.reservations for job in self._jobs.values()))
        files, files_by_tenant = self._ledger.totals()
        ordinary = [held for held in reservations if not held.drained]
        self._global.check(sum(held.size_bytes for held in ordinary), files)
        self._drain.check(sum(held.size_bytes for held in reservations if held.drained), 0)
        for tenant in {*self._tenants, *files_by_tenant, *(held.tenant for held in reservations)}:
            if (entry := self._tenants.get(tenant)) is None:
                raise InvariantViolation("A tenant that uses room has no budget.", tenant=tenant)
            mine = sum(held.size_bytes for held in ordinary if held.tenant == tenant)
            entry.level.check(mine, files_by_tenant.get(tenant, 0))
        for job in self._jobs.values():
            job.level.check(
                sum(held.size_bytes for held in job.reservations if not held.drained), 0
            )

    # --- inside

    def _confined(self) -> None:
        assert threading.get_ident() == self._thread, "StorageQuota is confined to its thread."

    def _levels(self, tenant: str, job_id: str | None) -> tuple[Level, ...]:
        """Narrowest first, so that a refusal names the level its owner can do something about.

        Only looks: a refused reservation must leave no empty budget behind.
        """
        entry = self._tenants.get(tenant) or _Tenant()
        levels = (entry.level, self._global)
        if job_id is None:
            return levels
        job = self._jobs.get(job_id)
        if job is None:
            return (Level(LevelName.JOB, limit_bytes=entry.job_limit_bytes), *levels)
        if job.tenant != tenant:
            raise InvariantViolation("A job reserves for one tenant only.", job_id=job_id)
        return (job.level, *levels)

    def _shortage(self, tenant: str, job_id: str | None, size_bytes: int) -> Shortage | None:
        self._confined()
        return find_shortage(self._levels(tenant, job_id), size_bytes)

    def _take(
        self, tenant: str, job_id: str | None, size_bytes: int, *, drained: bool = False
    ) -> Reservation:
        reservation = Reservation(
            self._give_back, tenant=tenant, job_id=job_id, size_bytes=size_bytes, drained=drained
        )
        if size_bytes == 0:
            return reservation
        entry = self._tenant(tenant)
        entry.held += 1
        if job_id is None:
            self._anonymous.add(reservation)
        else:
            job = self._jobs.setdefault(
                job_id, _Job(tenant, Level(LevelName.JOB, limit_bytes=entry.job_limit_bytes))
            )
            job.reservations.add(reservation)
        if drained and find_shortage((self._drain,), size_bytes) is not None:
            self._events.warning("quota.drain_overrun", job_id=job_id, bytes=size_bytes)
            self._drain.take_alone(size_bytes)
            return reservation
        for level in self._levels_of(reservation):
            level.take(size_bytes)
        return reservation

    def _levels_of(self, reservation: Reservation) -> tuple[Level, ...]:
        if reservation.drained:
            return (self._drain,)
        return self._levels(reservation.tenant, reservation.job_id)

    def _give_back(self, reservation: Reservation, size_bytes: int, spent: bool) -> None:
        self._confined()
        failpoints.fp("quota.before_release")
        now = None if spent else self._clock.monotonic()
        for level in self._levels_of(reservation):
            level.give_back(size_bytes, now=now)
        if size_bytes == reservation.size_bytes:
            self._end(reservation)

    def _end(self, reservation: Reservation) -> None:
        if reservation.job_id is None:
            self._anonymous.remove(reservation)
        else:
            job = self._jobs[reservation.job_id]
            job.reservations.remove(reservation)
            if not job.reservations:
                del self._jobs[reservation.job_id]
        self._tenants[reservation.tenant].held -= 1
        self._tidy_tenant(reservation.tenant)

    def _apply(self, payments: list[Payment]) -> None:
        """Sums first: an inode that is passed on is neither freed nor taken."""
        now = self._clock.monotonic()
        changes: dict[str | None, int] = {}
        for payment in payments:
            changes[payment.tenant] = changes.get(payment.tenant, 0) + payment.bytes
        self._global.charge(sum(changes.values()), now=now)
        for tenant, change_bytes in changes.items():
            if tenant is not None:
                self._tenant(tenant).level.charge(change_bytes, now=now)
                self._tidy_tenant(tenant)

    def _tenant(self, tenant: str) -> _Tenant:
        entry = self._tenants.get(tenant)
        if entry is None:
            entry = self._tenants[tenant] = _Tenant()
        return entry

    def _tidy_tenant(self, tenant: str) -> None:
        """Forgets a tenant that neither uses nor limits anything: memory is bounded (I11)."""
        entry = self._tenants.get(tenant)
        if entry is None or entry.held or entry.level.used_bytes:
            return
        if entry.level.limit_bytes is None and entry.job_limit_bytes is None:
            del self._tenants[tenant]

    async def _reclaim_for(
        self, tenant: str, job_id: str | None, size_bytes: int
    ) -> Shortage | None:
        """None once it is worth trying again; else what is short for good."""
        shortage = self._shortage(tenant, job_id, size_bytes)
        if shortage is None:
            return None
        if shortage.level is not LevelName.GLOBAL:
            return shortage
        return None if await self._reclaim(shortage.missing_bytes) > 0 else shortage

    async def _reclaim(self, size_bytes: int) -> int:
        """One at a time, so that two who are short do not empty the cache twice over."""
        before = self._global.used_bytes
        async with self._reclaiming:
            freed = max(before - self._global.used_bytes, 0)
            for reclaimer in self._reclaimers:
                if freed >= size_bytes:
                    break
                freed += await reclaimer.reclaim(size_bytes - freed)
        return freed

    def _refusal(self, shortage: Shortage, tenant: str) -> QuotaExhausted:
        self._events.debug(
            "quota.exhausted",
            level=shortage.level.value, tenant=tenant, requested_bytes=shortage.requested_bytes,
        )  # fmt: skip
        return QuotaExhausted(
            shortage.detail,
            retry_after_seconds=shortage.retry_after_seconds(self._clock.monotonic()),
            level=shortage.level.value,
            limit_bytes=shortage.limit_bytes,
            used_bytes=shortage.used_bytes,
            requested_bytes=shortage.requested_bytes,
        )
