"""How much, and how much at once, may be read from the remote store beside foreground reads.

A scan asks for each ranged read before it is sent. It is granted when the scan's own ceiling and
its tenant's have the bytes, when tenant and service have a request to spare, and while foreground
reads are quick. Among the scans of a tenant the one that has had least for its weight is next
(start-time fair queueing: Goyal, Vin, Cheng, SIGCOMM 1996), so that neither many nor large
requests win.

Invariants: I11: bytes granted in any time are at most rate x time + burst, and requests in flight
never pass their limits, which leave foreground reads the other half.
Concurrency: loop-confined. Cancellation: a waiter that is cancelled leaves the line; who holds a
grant gives its request back by leaving the block. Crash: nothing is kept.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol, Self

from app.core.base.clock import Clock
from app.core.base.events import Events
from app.core.base.tasks import TaskScope

Priority = Literal["low", "normal"]

BURST_SECONDS = 0.25
"""How much of its rate a bucket holds: enough to make up for a late wake-up."""
WEIGHTS: dict[Priority, float] = {"low": 1.0, "normal": 4.0}
PAUSE_SECONDS = 0.25
"""How often a pause is looked at again."""
MEASURED_SECONDS = 1.0


class Pause(Protocol):
    """Says whether reads in the background are to wait."""

    def is_open(self) -> bool: ...


class NeverPaused:
    def is_open(self) -> bool:
        return False


class ByteBucket:
    """Tokens for bytes; `rate` None gives as many as are asked for."""

    def __init__(self, rate: float | None, *, clock: Clock) -> None:
        self.rate = rate
        self._clock = clock
        self._tokens = self.capacity
        self._at = clock.monotonic()

    @property
    def capacity(self) -> float:
        return float("inf") if self.rate is None else max(self.rate * BURST_SECONDS, 1.0)

    @property
    def is_full(self) -> bool:
        if self.rate is None:
            return True
        self._fill()
        return self._tokens >= self.capacity

    def wait_seconds(self, size_bytes: int) -> float:
        """Until so many are there; 0: now. More than the bucket holds is there when it is full."""
        if self.rate is None:
            return 0.0
        self._fill()
        missing = min(float(size_bytes), self.capacity) - self._tokens
        # A difference too small for the clock to show would be waited for for ever.
        return max(missing / self.rate, 0.0) if missing > 1e-6 else 0.0

    def take(self, size_bytes: int) -> None:
        """May leave a debt, which the next ones wait for."""
        if self.rate is not None:
            self._fill()
            self._tokens -= size_bytes

    def _fill(self) -> None:
        assert self.rate is not None
        now = self._clock.monotonic()
        self._tokens = min(self.capacity, self._tokens + (now - self._at) * self.rate)
        self._at = now


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadLimits:
    bytes_per_second: int | None
    """Of a tenant; None: as much as the store gives."""
    requests_max: int
    """Of a tenant at once."""
    requests_total_max: int
    """Of all tenants at once."""


@dataclass(slots=True, eq=False)
class _Ticket:
    scan: "ScanReads"
    size_bytes: int
    start: float
    order: int
    granted: asyncio.Future[None]


@dataclass(slots=True, eq=False)
class _Tenant:
    bucket: ByteBucket
    measured_from: float
    scans: int = 0
    in_flight: int = 0
    virtual: float = 0.0
    measured_bytes: int = 0
    waiting: list[_Ticket] = field(default_factory=list)
    timer: asyncio.Task[None] | None = None


class RemoteReadLimiter:
    """An async context: leaving it ends its timers. Waiters are the callers' own to end first."""

    def __init__(
        self, limits: ReadLimits, *, pause: Pause | None = None, clock: Clock, events: Events
    ) -> None:
        self._limits = limits
        self._pause = pause or NeverPaused()
        self._clock = clock
        self._events = events
        self._tenants: dict[str, _Tenant] = {}
        self._in_flight = 0
        self._order = itertools.count()
        self._timers = TaskScope("read_limiter", on_error=self._tell)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._timers.aclose()

    @property
    def pause(self) -> Pause:
        """For whoever else reads in the background."""
        return self._pause

    @property
    def active_scans(self) -> int:
        return sum(tenant.scans for tenant in self._tenants.values())

    @asynccontextmanager
    async def scan(
        self, tenant: str, *, bytes_per_second: int | None, priority: Priority
    ) -> AsyncIterator["ScanReads"]:
        """One scan's hold on the limiter, until the block is left."""
        self._tidy()
        now = self._clock.monotonic()
        mine = self._tenants.get(tenant)
        if mine is None:
            bucket = ByteBucket(self._limits.bytes_per_second, clock=self._clock)
            mine = self._tenants[tenant] = _Tenant(bucket=bucket, measured_from=now)
        mine.scans += 1
        own = ByteBucket(bytes_per_second, clock=self._clock)
        try:
            yield ScanReads(self, mine, own, weight=WEIGHTS[priority])
        finally:
            mine.scans -= 1
            self._measure(mine, at_least_seconds=MEASURED_SECONDS / 2)
            self._tidy()

    # --- inside

    async def _enter(self, scan: "ScanReads", tenant: _Tenant, size_bytes: int) -> None:
        ticket = _Ticket(
            scan=scan, size_bytes=size_bytes, start=max(tenant.virtual, scan.finish),
            order=next(self._order), granted=asyncio.get_running_loop().create_future(),
        )  # fmt: skip
        scan.finish = ticket.start + size_bytes / scan.weight
        tenant.waiting.append(ticket)
        self._grant(tenant)
        try:
            await ticket.granted
        except asyncio.CancelledError:
            if ticket in tenant.waiting:
                tenant.waiting.remove(ticket)
                self._grant(tenant)
            elif ticket.granted.done() and not ticket.granted.cancelled():
                self._leave(tenant)
            raise

    def _leave(self, tenant: _Tenant) -> None:
        tenant.in_flight -= 1
        self._in_flight -= 1
        for each in sorted(self._tenants.values(), key=lambda one: one.in_flight):
            if each.waiting:
                self._grant(each)

    def _grant(self, tenant: _Tenant) -> None:
        """Grants what can be, and sees to being called again when that changes with time."""
        wait_seconds: float | None = None
        # One that was cancelled just now has not run yet, and takes itself out when it does.
        tenant.waiting = [ticket for ticket in tenant.waiting if not ticket.granted.done()]
        while tenant.waiting and self._has_request(tenant):
            if self._pause.is_open():
                wait_seconds = PAUSE_SECONDS
                break
            waits = [(ticket.scan.own.wait_seconds(ticket.size_bytes), ticket)
                     for ticket in tenant.waiting]  # fmt: skip
            ready = [ticket for seconds, ticket in waits if seconds == 0]
            if not ready:
                wait_seconds = min(seconds for seconds, _ in waits)
                break
            ticket = min(ready, key=lambda one: (one.start, one.order))
            wait_seconds = tenant.bucket.wait_seconds(ticket.size_bytes)
            if wait_seconds > 0:
                break
            wait_seconds = None
            self._admit(tenant, ticket)
        self._wake_in(tenant, wait_seconds)

    def _has_request(self, tenant: _Tenant) -> bool:
        return (
            tenant.in_flight < self._limits.requests_max
            and self._in_flight < self._limits.requests_total_max
        )

    def _admit(self, tenant: _Tenant, ticket: _Ticket) -> None:
        tenant.waiting.remove(ticket)
        tenant.virtual = max(tenant.virtual, ticket.start)
        tenant.in_flight += 1
        self._in_flight += 1
        tenant.bucket.take(ticket.size_bytes)
        ticket.scan.own.take(ticket.size_bytes)
        tenant.measured_bytes += ticket.size_bytes
        self._measure(tenant, at_least_seconds=MEASURED_SECONDS)
        ticket.granted.set_result(None)

    def _wake_in(self, tenant: _Tenant, seconds: float | None) -> None:
        if tenant.timer is not None:
            tenant.timer.cancel()
            tenant.timer = None
        if seconds is not None:
            tenant.timer = self._timers.start(self._later(tenant, seconds), name="timer")

    async def _later(self, tenant: _Tenant, seconds: float) -> None:
        await self._clock.sleep(seconds)
        tenant.timer = None  # it is this one, and not to be cancelled from within
        self._grant(tenant)

    def _measure(self, tenant: _Tenant, *, at_least_seconds: float) -> None:
        now = self._clock.monotonic()
        seconds = now - tenant.measured_from
        if seconds >= at_least_seconds and tenant.measured_bytes:
            self._events.debug(
                "cold_scan.measured", bytes_per_second=tenant.measured_bytes / seconds
            )
            tenant.measured_from, tenant.measured_bytes = now, 0

    def _tidy(self) -> None:
        """Forgets who is done. A tenant that comes back at once finds its bucket as it left it: a
        scan cut into many gets no more than a whole one.
        """
        for name, tenant in list(self._tenants.items()):
            if tenant.scans == 0 and tenant.bucket.is_full:
                del self._tenants[name]

    def _tell(self, error: BaseException) -> None:
        self._events.error("cold_scan.limiter_failed", error=repr(error))


class ScanReads:
    """What one scan may read. Made by `RemoteReadLimiter.scan`."""

    def __init__(
        self, limiter: RemoteReadLimiter, tenant: _Tenant, own: ByteBucket, *, weight: float
    ) -> None:
        self._limiter = limiter
        self._tenant = tenant
        self.own = own
        self.weight = weight
        self.finish = 0.0

    @property
    def piece_bytes_max(self) -> int | None:
        """What is read by one request: a ceiling is held within a burst, not by large steps."""
        capacity = min(self.own.capacity, self._tenant.bucket.capacity)
        return None if capacity == float("inf") else max(1, int(capacity / 2))

    @asynccontextmanager
    async def request(self, size_bytes: int) -> AsyncIterator[None]:
        """Waits its turn; within the block it holds one request."""
        await self._limiter._enter(self, self._tenant, size_bytes)  # noqa: SLF001 - one component
        try:
            yield
        finally:
            self._limiter._leave(self._tenant)  # noqa: SLF001 - as above
