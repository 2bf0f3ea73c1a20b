"""Removes leases that nobody can use any more: expired ones, and those of dead processes.

Invariants: I6 does not depend on it: a dead lease fences nobody and is never renewed, reaped or
not. It keeps the lease map true for people and for whoever polls it.
Concurrency: whether a lease is dead is judged inside the transaction that removes it.
Cancellation, crash: the next round goes on.
"""

from app.core.base.clock import Clock
from app.core.base.errors import BopError
from app.core.base.events import Events
from app.core.stores.manifest.ops import ManifestBatch, ReapLeases
from app.core.stores.manifest.records import LeaseRecord
from app.core.stores.manifest.store import ManifestStore

INTERVAL_SECONDS_MAX = 5.0


class LeaseReaper:
    name = "lease_reaper"

    def __init__(
        self, manifest: ManifestStore, *, clock: Clock, events: Events, lease_ttl_seconds: float
    ) -> None:
        self._manifest = manifest
        self._clock = clock
        self._events = events
        self._interval_seconds = min(lease_ttl_seconds / 2, INTERVAL_SECONDS_MAX)

    async def run(self) -> None:
        while True:
            await self._clock.sleep(self._interval_seconds)
            try:
                await self.run_once()
            except BopError as error:
                self._events.warning("lease.reap_failed", code=error.code, detail=str(error))

    async def run_once(self) -> int:
        """Returns how many went. Without leases, as mostly, nothing is written."""
        with self._manifest.read() as view:
            if not view.has_leases():
                return 0
        receipt = await self._manifest.commit(
            ManifestBatch(ops=(ReapLeases(),), reason="lease.reaped")
        )
        dead: tuple[LeaseRecord, ...] = receipt.results[0]
        for lease in dead:
            self._events.warning(
                "lease.reaped", db_id=lease.db_id, chunk_id=lease.chunk_id, job_id=lease.job_id,
                token=lease.token,
            )  # fmt: skip
        return len(dead)
