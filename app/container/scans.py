"""Wires cold scans: what they may read, and when."""

from contextlib import AsyncExitStack

from app.container.ground import Ground
from app.core.base.events import Events
from app.core.coordination.bandwidth import ReadLimits, RemoteReadLimiter
from app.core.coordination.breaker import ForegroundBreaker
from app.settings import Settings


async def open_limiter(
    stack: AsyncExitStack, settings: Settings, ground: Ground, *, events: Events
) -> RemoteReadLimiter:
    breaker = ForegroundBreaker(
        limit_seconds=settings.cold_scan_pause_seconds, clock=ground.clock, events=events
    )
    events.subscribe(breaker)
    return await stack.enter_async_context(
        RemoteReadLimiter(
            ReadLimits(
                bytes_per_second=settings.cold_scan_bytes_per_second or None,
                requests_max=settings.cold_scan_requests,
                # The other half is left to foreground reads and checkpoints.
                requests_total_max=max(1, settings.remote_concurrency // 2),
            ),
            pause=breaker,
            clock=ground.clock,
            events=events,
        )
    )
