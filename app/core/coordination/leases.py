"""Keeps a job's leases alive while it works."""

from app.core.base.clock import Clock
from app.core.stores.manifest.ops import ManifestBatch, RenewLeases
from app.core.stores.manifest.store import ManifestStore


async def keep_leases(
    manifest: ManifestStore, *, job_id: str, ttl_seconds: float, clock: Clock
) -> None:
    """Renews until cancelled. Raises LeaseLost when one expired or was released by force: an
    expired lease is never renewed, and the publication would be refused all the same (I6).
    """
    while True:
        await clock.sleep(ttl_seconds / 3)
        await manifest.commit(
            ManifestBatch(
                ops=(RenewLeases(job_id=job_id, ttl_seconds=ttl_seconds),), reason="lease.renewed"
            )
        )
