"""Keeps a job's leases alive while it works."""

from app.core.base.clock import Clock
from app.core.base.errors import DiskFull, ManifestBusy, ManifestFull
from app.core.stores.manifest.ops import ManifestBatch, RenewLeases
from app.core.stores.manifest.store import ManifestStore


async def keep_leases(
    manifest: ManifestStore, *, job_id: str, count: int, ttl_seconds: float, clock: Clock
) -> None:
    """Renews the job's `count` leases until cancelled. Raises LeaseLost when one expired, was
    reaped or was released by force: it is never renewed, and the publication would be refused all
    the same (I6). A manifest that takes no writes just now is asked again in time.
    """
    renewal = ManifestBatch(
        ops=(RenewLeases(job_id=job_id, ttl_seconds=ttl_seconds, count_min=count),),
        reason="lease.renewed",
    )
    pause_seconds = ttl_seconds / 3
    while True:
        await clock.sleep(pause_seconds)
        try:
            await manifest.commit(renewal)
        except (ManifestBusy, ManifestFull, DiskFull):
            pause_seconds = ttl_seconds / 30
        else:
            pause_seconds = ttl_seconds / 3
