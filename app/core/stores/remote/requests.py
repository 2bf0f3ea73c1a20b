"""How often, how many at once, and when to stop asking: policy of requests to the remote store.

Invariants: never more requests in flight than the limit (I11); a retry waits with full jitter and
spends from one budget for the whole process, so that an outage is not answered with a storm.
Concurrency: confined to the event loop's thread.
Cancellation: a cancelled waiter leaves the queue; a cancelled holder gives its slot back.
Crash: nothing is kept.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from app.core.base.clock import Clock, Randomness, full_jitter
from app.core.base.errors import BopError, CorruptBlob, RemoteUnavailable
from app.core.base.events import Events
from app.core.stores.remote.protocol import (
    RemoteMisconfigured,
    RemoteThrottled,
    UploadCorrupted,
)

T = TypeVar("T")

WAITERS_MAX = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    attempts_max: int = 6
    backoff_base_seconds: float = 0.1
    backoff_cap_seconds: float = 10.0
    damaged_attempts_max: int = 2
    """A flipped bit on the way is met once; twice is damage at one of the ends."""

    def gives_up(self, error: BopError, *, attempt: int) -> bool:
        """Whether `error`, met by attempt `attempt` (the first is 1), is final."""
        match error:
            case RemoteMisconfigured():
                return True
            case CorruptBlob() | UploadCorrupted():
                return attempt >= min(self.damaged_attempts_max, self.attempts_max)
            case RemoteUnavailable():
                return attempt >= self.attempts_max
            case _:
                return True


class RetryBudget:
    """A bucket of tokens: a retry takes one, a success gives a fraction back. Empty, nothing is
    retried: in an outage each call then costs one request, and its caller's own backoff decides.
    """

    def __init__(self, *, capacity: float = 100.0, refund: float = 0.2) -> None:
        self._capacity = capacity
        self._refund = refund
        self._tokens = capacity

    @property
    def tokens(self) -> float:
        return self._tokens

    def take(self) -> bool:
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def succeeded(self) -> None:
        self._tokens = min(self._capacity, self._tokens + self._refund)


class ConcurrencyLimit:
    """Additive increase, multiplicative decrease: `limit` grows by one per `limit` successes and
    halves when the store throttles. Throttled answers to requests sent before the last cut do not
    cut again: they tell of the load that was cut already.
    """

    def __init__(self, *, ceiling: int, waiters_max: int = WAITERS_MAX) -> None:
        self._ceiling = ceiling
        self._waiters_max = waiters_max
        self._limit = float(ceiling)
        self._in_flight = 0
        self._cuts = 0
        self._waiters: deque[asyncio.Future[None]] = deque()

    def __repr__(self) -> str:
        return f"<ConcurrencyLimit {self._in_flight}/{self.limit}, {len(self._waiters)} waiting>"

    @property
    def limit(self) -> int:
        return int(self._limit)

    @property
    def in_flight(self) -> int:
        return self._in_flight

    @property
    def waiting(self) -> int:
        return len(self._waiters)

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Raises RemoteUnavailable at once when too many wait already; learns from how the block
        ends.
        """
        await self._enter()
        cuts = self._cuts
        try:
            yield
        except RemoteThrottled:
            if cuts == self._cuts:
                self._cuts += 1
                self._limit = max(1.0, self._limit / 2)
            raise
        else:
            self._limit = min(float(self._ceiling), self._limit + 1.0 / self._limit)
        finally:
            self._in_flight -= 1
            self._wake()

    async def _enter(self) -> None:
        if self._in_flight < self.limit and not self._waiters:
            self._in_flight += 1
            return
        if len(self._waiters) >= self._waiters_max:
            raise RemoteUnavailable("Too many requests wait for the remote store.")
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter  # whoever wakes us has counted us in
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self._in_flight -= 1
                self._wake()
            else:
                with contextlib.suppress(ValueError):
                    self._waiters.remove(waiter)
            raise

    def _wake(self) -> None:
        while self._waiters and self._in_flight < self.limit:
            waiter = self._waiters.popleft()
            if not waiter.done():
                self._in_flight += 1
                waiter.set_result(None)


class Retrier:
    """Runs one request until it succeeds, fails for good, or there is no attempt left."""

    def __init__(
        self,
        policy: RetryPolicy,
        *,
        budget: RetryBudget,
        clock: Clock,
        randomness: Randomness,
        events: Events,
    ) -> None:
        self._policy = policy
        self._budget = budget
        self._clock = clock
        self._randomness = randomness
        self._events = events

    async def run(self, op: str, attempt_once: Callable[[], Awaitable[T]]) -> T:
        """Raises the last attempt's error. `attempt_once` must be safe to repeat."""
        attempt = 0
        while True:
            attempt += 1
            try:
                result = await attempt_once()
            except BopError as error:
                await self.back_off(op, error, attempt=attempt)
            else:
                self._budget.succeeded()
                return result

    async def back_off(self, op: str, error: BopError, *, attempt: int) -> None:
        """Waits before attempt `attempt` + 1, or raises `error` if there is to be none."""
        if isinstance(error, RemoteThrottled):
            self._events.debug("remote.throttled", op=op, attempt=attempt)
        if self._policy.gives_up(error, attempt=attempt) or not self._budget.take():
            raise error
        seconds = full_jitter(
            self._randomness,
            attempt=attempt,
            base_seconds=self._policy.backoff_base_seconds,
            cap_seconds=self._policy.backoff_cap_seconds,
        )
        self._events.warning(
            "remote.retried", op=op, attempt=attempt, code=error.code, detail=error.detail,
            kind=type(error).__name__, wait_seconds=seconds,
        )  # fmt: skip
        await self._clock.sleep(seconds)

    def succeeded(self) -> None:
        self._budget.succeeded()
