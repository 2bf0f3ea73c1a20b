"""Wires a running service: opens everything bottom up on one AsyncExitStack, which closes it in
reverse. Nothing else creates a component.
"""

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

from app.container.collection import collection_parts
from app.container.generation_jobs import generation_job_handlers, verification_workers
from app.container.ground import Ground, OnFatal, open_ground
from app.container.operating import operating_services
from app.container.scans import open_limiter
from app.container.service import Container, Gauges, Services
from app.core.base.errors import OwnershipLost, StartRefused
from app.core.base.events import Events
from app.core.checkpoint.executor import CheckpointExecutor
from app.core.checkpoint.history_objects import HistoryObjects
from app.core.checkpoint.parts import CheckpointLimits, CheckpointParts
from app.core.checkpoint.planning import CheckpointPlanning, CoalescingPlanning
from app.core.checkpoint.truncation import TruncationExecutor
from app.core.checkpoint.wal_release import WalRelease
from app.core.coordination.bandwidth import RemoteReadLimiter
from app.core.coordination.checkpoint_demand import CheckpointDemand
from app.core.coordination.limits import load_limits
from app.core.coordination.quota import StorageQuota
from app.core.coordination.reconciliation import QuotaReconciliation, tenant_of, usage_roots
from app.core.coordination.usage import UsageKind
from app.core.coordination.wal_backlog import BacklogLimits, WalBacklog
from app.core.coordination.wal_room import WalRooms
from app.core.engines.base import DeltaLimits
from app.core.jobs.checkpoint_requests import CheckpointRequests
from app.core.jobs.feed import JobFeed
from app.core.jobs.handlers.prune_checkpoint import PruneCheckpoint
from app.core.jobs.handlers.publish_chunks import PublishChunks
from app.core.jobs.handlers.truncate_append_only import TruncateAppendOnly
from app.core.jobs.queue import JobQueue
from app.core.jobs.runner import JobHandler, JobRunner, RetryPolicy
from app.core.reads.cold_scan import ColdScanReader
from app.core.reads.page_cache import PageCache
from app.core.reads.page_store import PageStore
from app.core.reads.read_point import GenerationPins
from app.core.reads.record_reader import RecordReader
from app.core.services.change_feed import ChangeFeed
from app.core.services.checkpoints import Checkpoints
from app.core.services.cold_scans import ColdScans
from app.core.services.collection import Collection
from app.core.services.databases import Databases
from app.core.services.debugging import Debugging
from app.core.services.deletion import Deletion
from app.core.services.directory import DatabaseDirectory
from app.core.services.forks import Forks
from app.core.services.fsck import Fsck
from app.core.services.generation_jobs import GenerationJobs
from app.core.services.history import History
from app.core.services.idempotency import Idempotency
from app.core.services.images import Images
from app.core.services.jobs import Jobs
from app.core.services.pages import Pages
from app.core.services.pages_in import PagesIn
from app.core.services.records import Records
from app.core.services.snapshots import Snapshots
from app.core.services.states import States
from app.core.services.tenants import Tenants
from app.core.services.truncations import Truncations
from app.core.services.upkeep import Upkeep
from app.core.stores.local.hot_cache import HotCache
from app.core.stores.manifest.ops import DropForeignLeases, ManifestBatch
from app.core.stores.manifest.records import JobKind
from app.core.stores.wal.store import WalStore
from app.core.workers.cache_check import CacheCheck
from app.core.workers.change_trim import ChangeTrim
from app.core.workers.coalescing import Coalescing
from app.core.workers.collector import Collector
from app.core.workers.history_upload import HistoryUpload
from app.core.workers.janitor import ScratchJanitor
from app.core.workers.job_loop import JobLoop
from app.core.workers.lease_reaper import LeaseReaper
from app.core.workers.prefix_claim import PrefixClaim
from app.core.workers.pruning import Pruning
from app.core.workers.supervisor import Supervisor
from app.core.workers.triggers import CheckpointTriggers
from app.core.workers.wal_sweep import WalSweep
from app.settings import Settings
from app.wal_catalog import ManifestSegmentCatalog

HISTORY_DRAIN_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Storage:
    """What holds bytes on this machine, and the ways to read them."""

    quota: StorageQuota
    reconciliation: QuotaReconciliation
    backlog: WalBacklog
    demand: CheckpointDemand
    hot_cache: HotCache
    scratch_links: bool
    wal: WalStore
    directory: DatabaseDirectory
    page_cache: PageCache
    page_store: PageStore
    pins: GenerationPins
    limiter: RemoteReadLimiter
    release: WalRelease


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """Durable work: the queue, and what runs it; and the collector."""

    queue: JobQueue
    requests: CheckpointRequests
    loop: JobLoop
    triggers: CheckpointTriggers
    janitor: ScratchJanitor
    collector: Collector


@asynccontextmanager
async def open_container(
    settings: Settings, *, events: Events, on_fatal: OnFatal
) -> AsyncIterator[Container]:
    """A running service. Raises StartRefused where this state must not be served."""
    async with AsyncExitStack() as stack:
        ground = await open_ground(stack, settings, events=events, on_fatal=on_fatal)
        claim = await _claim_prefix(ground, events=events)
        await ground.manifest.commit(
            ManifestBatch(ops=(DropForeignLeases(),), reason="lease.dropped")
        )
        storage = await _open_storage(
            stack, settings, ground, claim, events=events, on_fatal=on_fatal
        )
        work = await _open_work(settings, ground, storage, claim, events=events)
        await work.janitor.run_at_start()
        upload = HistoryUpload(
            HistoryObjects(
                manifest=ground.manifest,
                remote=claim.remote,
                on_durable=storage.directory.notify_checkpointed,
                events=events,
            ),
            ready=claim.wait_claimed,
            clock=ground.clock,
            events=events,
        )
        container = Container(
            _services(settings, ground, storage, work, claim, upload, events=events),
            _gauges(settings, storage, work),
            claim=claim,
            job_loop=work.loop,
            events=events,
        )
        supervisor = await stack.enter_async_context(
            Supervisor(clock=ground.clock, events=events, on_fatal=on_fatal)
        )
        for worker in (
            claim,
            work.janitor,
            work.triggers,
            CacheCheck(storage.hot_cache, events=events),
            LeaseReaper(
                ground.manifest,
                clock=ground.clock,
                events=events,
                lease_ttl_seconds=settings.lease_ttl_seconds,
            ),
            Coalescing(
                ground.manifest,
                work.queue,
                clock=ground.clock,
                randomness=ground.randomness,
                events=events,
                deadline_seconds=settings.job_deadline_seconds,
            ),
            WalSweep(storage.release, clock=ground.clock, events=events),
            Pruning(
                ground.manifest,
                clock=ground.clock,
                events=events,
                jobs_max=settings.job_history_count,
                audit_max=settings.audit_log_count,
            ),
            ChangeTrim(
                ground.manifest,
                clock=ground.clock,
                events=events,
                history_count=settings.change_history_count,
                lag_count_max=settings.change_lag_count_max,
            ),
            upload,
            work.collector,
            work.loop,
        ):
            supervisor.start(worker)
        stack.push_async_callback(upload.drain, seconds=HISTORY_DRAIN_SECONDS)
        for verification in verification_workers(settings, ground, work.queue, events=events):
            supervisor.start(verification)
        stack.push_async_callback(work.loop.drain, seconds=settings.shutdown_seconds)
        try:
            yield container
        finally:
            container.begin_shutdown()


async def _claim_prefix(ground: Ground, *, events: Events) -> PrefixClaim:
    """Raises StartRefused: a prefix that is not ours is refused before anything is served."""
    with ground.manifest.read() as view:
        fresh = not view.all_databases()
    claim = PrefixClaim(
        remote=ground.remote,
        ownership=ground.ownership,
        manifest=ground.manifest,
        clock=ground.clock,
        randomness=ground.randomness,
        events=events,
        fresh=fresh,
    )
    try:
        await claim.attempt()
    except OwnershipLost as error:
        raise StartRefused(str(error)) from error
    return claim


async def _open_storage(
    stack: AsyncExitStack,
    settings: Settings,
    ground: Ground,
    claim: PrefixClaim,
    *,
    events: Events,
    on_fatal: OnFatal,
) -> _Storage:
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
        )
    )
    return _Storage(
        quota=quota,
        reconciliation=reconciliation,
        backlog=backlog,
        demand=demand,
        hot_cache=hot_cache,
        scratch_links=await ground.scratch.takes_links_of(settings.data_dir / "wal"),
        wal=wal,
        directory=directory,
        page_cache=page_cache,
        page_store=page_store,
        pins=pins,
        limiter=limiter,
        release=WalRelease(ground.manifest, wal, events=events),
    )


async def _open_work(
    settings: Settings, ground: Ground, storage: _Storage, claim: PrefixClaim, *, events: Events
) -> _Work:
    queue = JobQueue(
        ground.manifest,
        clock=ground.clock,
        events=events,
        feed=JobFeed(),
        depth_max=settings.job_queue_depth_max,
        background_max=max(1, settings.job_concurrency // 2),
    )
    await queue.load()
    parts = _checkpoint_parts(ground, storage, claim, events=events)
    limits = _checkpoint_limits(settings)
    collection = collection_parts(
        settings,
        ground,
        wal=storage.wal,
        pins=storage.pins,
        hot_cache=storage.hot_cache,
        remote=claim.remote,
        events=events,
    )
    handlers: dict[JobKind, JobHandler] = {
        "create_checkpoint": PublishChunks(
            CheckpointExecutor(parts, limits, CheckpointPlanning(parts, limits))
        ),
        "coalesce_chunks": PublishChunks(
            CheckpointExecutor(parts, limits, CoalescingPlanning(parts))
        ),
        "truncate_append_only": TruncateAppendOnly(
            TruncationExecutor(parts), queue, ground.manifest, clock=ground.clock, events=events
        ),
        "prune_checkpoint": PruneCheckpoint(ground.manifest, collection.removal),
        **generation_job_handlers(
            settings,
            ground,
            claim,
            hot_cache=storage.hot_cache,
            pins=storage.pins,
            pause=storage.limiter.pause,
            events=events,
        ),
    }
    runner = JobRunner(
        queue,
        handlers,
        clock=ground.clock,
        randomness=ground.randomness,
        events=events,
        policy=RetryPolicy(
            attempts_max=settings.job_attempts,
            backoff_base_seconds=settings.job_backoff_base_seconds,
            backoff_cap_seconds=settings.job_backoff_cap_seconds,
            stall_seconds=settings.job_stall_seconds,
        ),
    )
    loop = JobLoop(
        queue,
        runner,
        ready=claim.wait_claimed,
        clock=ground.clock,
        concurrency=settings.job_concurrency,
    )
    requests = CheckpointRequests(
        queue,
        clock=ground.clock,
        randomness=ground.randomness,
        deadline_seconds=settings.job_deadline_seconds,
    )
    triggers = CheckpointTriggers(
        ground.manifest,
        queue,
        requests,
        backlog=storage.backlog,
        demand=storage.demand,
        clock=ground.clock,
        events=events,
        interval_seconds=settings.checkpoint_interval_seconds,
    )
    janitor = ScratchJanitor(
        ground.scratch,
        live_jobs=queue.unfinished_ids,
        room=storage.quota,
        clock=ground.clock,
        events=events,
    )
    return _Work(
        queue=queue,
        requests=requests,
        loop=loop,
        triggers=triggers,
        janitor=janitor,
        collector=collection.collector,
    )


def _checkpoint_parts(
    ground: Ground, storage: _Storage, claim: PrefixClaim, *, events: Events
) -> CheckpointParts:
    return CheckpointParts(
        manifest=ground.manifest,
        wal=storage.wal,
        scratch=ground.scratch,
        scratch_links=storage.scratch_links,
        hot_cache=storage.hot_cache,
        quota=storage.quota,
        wal_since=storage.backlog.dirty_since,
        remote=claim.remote,
        ownership=ground.ownership,
        release=storage.release,
        pages=storage.page_store,
        on_durable=storage.directory.notify_checkpointed,
        pool=ground.pool,
        clock=ground.clock,
        events=events,
    )


def _checkpoint_limits(settings: Settings) -> CheckpointLimits:
    return CheckpointLimits(
        staging_concurrency=settings.staging_concurrency,
        upload_concurrency=settings.upload_concurrency,
        lease_ttl_seconds=settings.lease_ttl_seconds,
        gc_grace_seconds=settings.gc_grace_seconds,
        deltas=DeltaLimits(
            delta_bytes_max=settings.delta_bytes_max,
            delta_dirty_ratio_max=settings.delta_dirty_ratio_max,
            delta_count_max=settings.delta_count_max,
            coalesce=settings.coalesce,
        ),
        compression_threads=max(1, os.cpu_count() or 1),
    )


def _services(
    settings: Settings,
    ground: Ground,
    storage: _Storage,
    work: _Work,
    claim: PrefixClaim,
    upload: HistoryUpload,
    *,
    events: Events,
) -> Services:
    manifest, directory, clock = ground.manifest, storage.directory, ground.clock
    now_us = work.collector.now_us
    operating = operating_services(
        settings,
        ground,
        directory=directory,
        queue=work.queue,
        quota=storage.quota,
        claim=claim,
        events=events,
    )
    states = States(manifest, directory, storage.page_store)
    fsck = Fsck(
        manifest=manifest,
        remote=claim.remote,
        wal_root=settings.data_dir / "wal",
        scratch=ground.scratch,
        quota=storage.quota,
        find_drift=partial(storage.reconciliation.find_drift, live_jobs=work.queue.unfinished_ids),
        pool=ground.pool,
    )
    return Services(
        databases=Databases(manifest, directory, clock=clock, now_us=now_us, events=events),
        records=Records(
            manifest,
            directory,
            RecordReader(
                remote=claim.remote,
                hot_cache=storage.hot_cache,
                pool=ground.pool,
                events=events,
                clock=clock,
            ),
            pins=storage.pins,
            record_bytes_max=settings.max_record_bytes,
        ),
        pages_in=PagesIn(
            manifest,
            directory,
            storage.page_store,
            pool=ground.pool,
            events=events,
            wal_budget_bytes=settings.wal_budget_bytes,
        ),
        pages=Pages(states, directory, storage.page_store),
        images=Images(states, storage.page_store),
        checkpoints=Checkpoints(manifest, directory, work.requests),
        cold_scans=ColdScans(
            manifest,
            directory,
            states,
            storage.page_store,
            ColdScanReader(
                manifest,
                storage.directory,
                pins=storage.pins,
                pool=ground.pool,
                clock=clock,
                events=events,
            ),
            storage.limiter,
            remote=claim.remote,
        ),
        truncations=Truncations(
            manifest,
            directory,
            work.queue,
            clock=clock,
            randomness=ground.randomness,
            deadline_seconds=settings.job_deadline_seconds,
        ),
        generation_jobs=GenerationJobs(
            manifest, directory, work.queue, clock=clock, randomness=ground.randomness
        ),
        jobs=Jobs(manifest, work.queue),
        history=History(manifest, directory, now_us=now_us, events=events),
        snapshots=Snapshots(manifest, directory, upload, clock=clock, events=events),
        forks=Forks(manifest, directory, upload, clock=clock, events=events),
        change_feed=ChangeFeed(manifest),
        deletion=Deletion(
            manifest,
            directory,
            work.queue,
            clock=clock,
            randomness=ground.randomness,
            events=events,
        ),
        collection=Collection(manifest, work.collector, storage.pins),
        debugging=Debugging(
            manifest,
            storage.quota,
            fsck,
            page_cache=storage.page_cache,
            hot_cache=storage.hot_cache,
        ),
        idempotency=Idempotency(manifest, clock=clock),
        approvals=operating.approvals,
        audit=operating.audit,
        backups=operating.backups,
        explaining=operating.explaining,
        freshness=operating.freshness,
        wal_overview=operating.wal_overview,
        tenants=Tenants(
            manifest,
            storage.quota,
            events=events,
            interval_seconds=settings.checkpoint_interval_seconds,
            global_limit_bytes=settings.quota_global_bytes,
            on_flags=work.triggers.flags_changed,
        ),
        upkeep=Upkeep(work.queue, work.janitor, storage.reconciliation),
    )


def _gauges(settings: Settings, storage: _Storage, work: _Work) -> Gauges:
    return Gauges(
        queue_depth=lambda: work.queue.depth,
        wal_bytes=lambda: sum(log.wal_bytes for log in storage.wal.logs()),
        wal_budget_bytes=lambda: settings.wal_budget_bytes,
        quota_used_bytes=lambda: storage.quota.snapshot().global_used_bytes,
        quota_limit_bytes=lambda: storage.quota.snapshot().global_limit_bytes,
        hot_cache_bytes=lambda: storage.hot_cache.stats().used_bytes,
        page_cache_bytes=lambda: storage.page_cache.stats().used_bytes,
        cold_scans=lambda: storage.limiter.active_scans,
        gc_queue=work.collector.waiting,
        gc_lag_seconds=work.collector.lag_seconds,
        gc_paused=lambda: work.collector.paused,
    )
