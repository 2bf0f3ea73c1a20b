"""What a caller may ask, over what the composition root has opened."""

from functools import partial

from app.container.ground import Ground
from app.container.operating import operating_services
from app.container.service import Gauges, Services
from app.container.storage import Storage
from app.container.work import Work
from app.core.base.events import Events
from app.core.reads.cold_scan import ColdScanReader
from app.core.reads.record_reader import RecordReader
from app.core.services.change_feed import ChangeFeed
from app.core.services.checkpoints import Checkpoints
from app.core.services.cold_scans import ColdScans
from app.core.services.collection import Collection
from app.core.services.databases import Databases
from app.core.services.debugging import Debugging
from app.core.services.deletion import Deletion
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
from app.core.workers.history_upload import HistoryUpload
from app.core.workers.prefix_claim import PrefixClaim
from app.settings import Settings


def make_services(
    settings: Settings,
    ground: Ground,
    storage: Storage,
    work: Work,
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


def make_gauges(settings: Settings, storage: Storage, work: Work) -> Gauges:
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
