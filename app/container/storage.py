"""What holds bytes on this machine, and the ways to read them."""

from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

from app.container.ground import Ground, OnFatal
from app.container.scans import open_limiter
from app.core.base.events import Events
from app.core.checkpoint.wal_release import WalRelease
from app.core.coordination.bandwidth import RemoteReadLimiter
from app.core.coordination.checkpoint_demand import CheckpointDemand
from app.core.coordination.limits import load_limits
from app.core.coordination.quota import StorageQuota
from app.core.coordination.reconciliation import QuotaReconciliation, tenant_of, usage_roots
from app.core.coordination.usage import UsageKind
from app.core.coordination.wal_backlog import BacklogLimits, WalBacklog
from app.core.coordination.wal_room import WalRooms
from app.core.reads.page_cache import PageCache
from app.core.reads.page_store import PageStore
from app.core.reads.read_point import GenerationPins
from app.core.services.directory import DatabaseDirectory
from app.core.stores.local.directory_files import DirectoryFiles
from app.core.stores.local.hot_cache import HotCache
from app.core.stores.wal.store import WalStore
from app.core.workers.prefix_claim import PrefixClaim
from app.settings import Settings
from app.wal_catalog import ManifestSegmentCatalog


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """What holds bytes on this machine, and the ways to read them."""

    quota: StorageQuota
    reconciliation: QuotaReconciliation
    backlog: WalBacklog
    demand: CheckpointDemand
    hot_cache: HotCache
    directory_files: DirectoryFiles
    scratch_links: bool
    wal: WalStore
    directory: DatabaseDirectory
    page_cache: PageCache
    page_store: PageStore
    pins: GenerationPins
    limiter: RemoteReadLimiter
    release: WalRelease


async def open_storage(
    stack: AsyncExitStack,
    settings: Settings,
    ground: Ground,
    claim: PrefixClaim,
    *,
    events: Events,
    on_fatal: OnFatal,
) -> Storage:
    quota = StorageQuota(
        global_limit_bytes=settings.quota_global_bytes,
        drain_limit_bytes=settings.drain_reserve_bytes,
        clock=ground.clock,
        events=events,
    )
    backlog = WalBacklog(
        BacklogLimits(
            budget_bytes=settings.wal_budget_bytes,
            trigger_ratio=settings.wal_trigger_ratio,
            overdue_seconds=settings.checkpoint_overdue_seconds,
        )
    )
    demand = CheckpointDemand()
    rooms = WalRooms(quota, backlog, demand, clock=ground.clock, events=events)
    wal = WalStore(
        settings.data_dir / "wal",
        clock=ground.clock,
        events=events,
        catalog=ManifestSegmentCatalog(ground.manifest),
        on_fatal=on_fatal,
    )
    stack.push_async_callback(wal.aclose)
    directory = DatabaseDirectory(
        ground.manifest,
        wal,
        events=events,
        open_room=lambda record: rooms.open(db_id=record.db_id, tenant=record.tenant),
    )
    await directory.open_all()
    with ground.manifest.read() as view:
        load_limits(view, quota)
    reconciliation = QuotaReconciliation(
        quota,
        usage_roots(settings.data_dir),
        tenant_of=partial(tenant_of, ground.manifest),
        pool=ground.pool,
        events=events,
    )
    # Before the cache is opened: of an inode that both have, the WAL is the payer.
    await reconciliation.run_at_start()
    hot_cache = await HotCache.open(
        settings.data_dir / "hot_cache",
        limit_bytes=settings.hot_cache_bytes,
        pool=ground.pool,
        events=events,
        account=quota.account(kind=UsageKind.HOT_CACHE, tenant=None),
    )
    quota.add_reclaimer(hot_cache)
    await quota.trim()
    directory_files = await DirectoryFiles.open(
        settings.data_dir / "directories",
        limit_bytes=settings.directory_cache_bytes,
        pool=ground.pool,
        events=events,
    )
    page_cache, pins = PageCache(limit_bytes=settings.page_cache_bytes), GenerationPins()
    limiter = await open_limiter(stack, settings, ground, events=events)
    page_store = await stack.enter_async_context(
        PageStore(
            ground.manifest,
            wal,
            remote=claim.remote,
            hot_cache=hot_cache,
            cache=page_cache,
            pins=pins,
            pool=ground.pool,
            clock=ground.clock,
            events=events,
            kept_directories=directory_files,
        )
    )
    return Storage(
        quota=quota,
        reconciliation=reconciliation,
        backlog=backlog,
        demand=demand,
        hot_cache=hot_cache,
        directory_files=directory_files,
        scratch_links=await ground.scratch.takes_links_of(settings.data_dir / "wal"),
        wal=wal,
        directory=directory,
        page_cache=page_cache,
        page_store=page_store,
        pins=pins,
        limiter=limiter,
        release=WalRelease(ground.manifest, wal, events=events),
    )
