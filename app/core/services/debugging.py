"""What an on-call engineer looks at."""

from dataclasses import dataclass

from app.core.coordination.quota import StorageQuota
from app.core.coordination.quota_levels import QuotaSnapshot
from app.core.reads.page_cache import PageCache, PageCacheStats
from app.core.services.fsck import Fsck, FsckReport
from app.core.stores.local.hot_cache import HotCache, HotCacheStats
from app.core.stores.manifest.records import ChangeRecord, JobRecord, LeaseRecord
from app.core.stores.manifest.store import ManifestStats, ManifestStore


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedLease:
    tenant: str
    database: str
    lease: LeaseRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReport:
    page_cache: PageCacheStats
    hot_cache: HotCacheStats


class Debugging:
    def __init__(
        self,
        manifest: ManifestStore,
        quota: StorageQuota,
        fsck: Fsck,
        *,
        page_cache: PageCache,
        hot_cache: HotCache,
    ) -> None:
        self._manifest = manifest
        self._quota = quota
        self._fsck = fsck
        self._page_cache = page_cache
        self._hot_cache = hot_cache

    def leases(self, *, limit: int, after: tuple[int, int] | None) -> list[NamedLease]:
        """In (db_id, chunk_id) order, from the one behind `after`."""
        with self._manifest.read() as view:
            names = {record.db_id: record for record in view.all_databases()}
            leases = [
                lease
                for lease in view.leases()
                if after is None or (lease.db_id, lease.chunk_id) > after
            ]
        return [
            NamedLease(
                tenant=names[lease.db_id].tenant, database=names[lease.db_id].name, lease=lease
            )
            for lease in leases[:limit]
            if lease.db_id in names
        ]

    def active_jobs(self, *, limit: int, after: str | None) -> list[JobRecord]:
        """Pending and in flight, newest first."""
        with self._manifest.read() as view:
            return view.jobs(states=("pending", "in_flight"), after=after, limit=limit)

    def change_log(self, *, limit: int, after: int) -> list[ChangeRecord]:
        """Oldest first, from the sequence behind `after`."""
        with self._manifest.read() as view:
            return view.change_log(after_sequence=after, limit=limit)

    async def manifest_stats(self) -> ManifestStats:
        return await self._manifest.stats()

    def quota(self) -> QuotaSnapshot:
        return self._quota.snapshot()

    def caches(self) -> CacheReport:
        return CacheReport(page_cache=self._page_cache.stats(), hot_cache=self._hot_cache.stats())

    async def fsck(self) -> FsckReport:
        return await self._fsck.run()
