"""Composition root: opens, wires and closes everything on one AsyncExitStack.

Nothing else creates a component. Order is bottom up; closing is the exact reverse.
"""

import asyncio
import fcntl
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from app.core.base.clock import Clock, Randomness, SystemClock, SystemRandomness
from app.core.base.errors import OwnershipLost, StartRefused
from app.core.base.events import Events, Level
from app.core.base.ids import new_ulid
from app.core.base.tasks import BlockingPool
from app.core.checkpoint.executor import CheckpointExecutor, CheckpointLimits, CheckpointParts
from app.core.checkpoint.wal_release import WalRelease
from app.core.coordination.ownership import PrefixOwnership
from app.core.coordination.quota import StorageQuota
from app.core.engines.base import DeltaLimits
from app.core.jobs.feed import JobFeed
from app.core.jobs.handlers.create_checkpoint import CreateCheckpoint
from app.core.jobs.queue import JobQueue
from app.core.jobs.runner import JobRunner, RetryPolicy
from app.core.reads.page_cache import PageCache
from app.core.reads.page_store import PageStore
from app.core.reads.read_point import GenerationPins
from app.core.reads.record_reader import RecordReader
from app.core.services.checkpoints import Checkpoints
from app.core.services.databases import Databases
from app.core.services.debugging import Debugging
from app.core.services.directory import DatabaseDirectory
from app.core.services.fsck import Fsck, FsckReport
from app.core.services.history import History
from app.core.services.idempotency import Idempotency
from app.core.services.images import Images
from app.core.services.jobs import Jobs
from app.core.services.pages import Pages
from app.core.services.pages_in import PagesIn
from app.core.services.records import Records
from app.core.services.recovery import RecoverReport, recover_databases
from app.core.services.states import States
from app.core.stores.local.hot_cache import HotCache
from app.core.stores.local.scratch import ScratchStore
from app.core.stores.manifest.environment import fsync_path_blocking
from app.core.stores.manifest.ops import DropForeignLeases, ManifestBatch
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.remote.open import RemoteOptions, open_remote
from app.core.stores.remote.protocol import RemoteStore
from app.core.stores.wal.store import WalStore
from app.core.workers.janitor import ScratchJanitor
from app.core.workers.job_loop import JobLoop
from app.core.workers.prefix_claim import PrefixClaim
from app.core.workers.pruning import Pruning
from app.core.workers.supervisor import Supervisor
from app.core.workers.wal_sweep import WalSweep
from app.settings import Settings
from app.wal_catalog import ManifestSegmentCatalog
from migrations.runner import load_steps

OnFatal = Callable[[BaseException], None]
Status = Literal["starting", "ready", "stopping", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    databases: Databases
    records: Records
    pages_in: PagesIn
    pages: Pages
    images: Images
    checkpoints: Checkpoints
    jobs: Jobs
    history: History
    debugging: Debugging
    idempotency: Idempotency


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    status: Status
    reasons: list[str]
    degraded: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauges:
    """Read at scrape time."""

    queue_depth: Callable[[], float]
    wal_bytes: Callable[[], float]
    quota_used_bytes: Callable[[], float]
    hot_cache_bytes: Callable[[], float]
    page_cache_bytes: Callable[[], float]


class RemoteHealth:
    """An event sink: the remote store counts as failing after some requests in a row that did."""

    FAILURES_MAX = 3

    def __init__(self) -> None:
        self._failures = 0

    @property
    def failing(self) -> bool:
        return self._failures >= self.FAILURES_MAX

    def __call__(self, name: str, level: Level, fields: Mapping[str, object]) -> None:
        del level
        if name == "remote.requested":
            outcome = fields.get("outcome")
            if outcome == "ok":
                self._failures = 0
            elif outcome == "error":
                self._failures += 1


class Container:
    """What the HTTP edge sees of the service."""

    def __init__(
        self,
        services: Services,
        gauges: Gauges,
        *,
        claim: PrefixClaim,
        job_loop: JobLoop,
        events: Events,
    ) -> None:
        self.services = services
        self.gauges = gauges
        self._claim = claim
        self._job_loop = job_loop
        self._stopping = False
        self._failure: str | None = None
        self._remote_health = RemoteHealth()
        events.subscribe(self._remote_health)

    def readiness(self) -> Readiness:
        """Ready once recovered and the prefix was claimed; a later remote outage only degrades."""
        degraded = ["remote"] if self._claim.claimed and self._remote_health.failing else []
        if self._failure is not None:
            return Readiness(status="failed", reasons=[self._failure], degraded=degraded)
        if self._stopping:
            return Readiness(status="stopping", reasons=["shutting down"], degraded=degraded)
        if not self._claim.claimed:
            reason = self._claim.problem or "the remote prefix is not claimed yet"
            return Readiness(status="starting", reasons=[reason], degraded=degraded)
        return Readiness(status="ready", reasons=[], degraded=degraded)

    def begin_shutdown(self) -> None:
        """Readiness goes down and no further job is claimed; those in flight go on."""
        self._stopping = True
        self._job_loop.stop_claiming()

    def fail(self, reason: str) -> None:
        self._failure = reason
        self._job_loop.stop_claiming()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ground:
    """What serve, recover and fsck all stand on."""

    clock: Clock
    randomness: Randomness
    process_id: str
    manifest: ManifestStore
    remote: RemoteStore
    ownership: PrefixOwnership
    pool: BlockingPool
    scratch: ScratchStore


@asynccontextmanager
async def open_container(
    settings: Settings, *, events: Events, on_fatal: OnFatal
) -> AsyncIterator[Container]:
    """A running service. Raises StartRefused where this state must not be served."""
    async with AsyncExitStack() as stack:
        ground = await _open_ground(stack, settings, events=events, on_fatal=on_fatal)
        clock, randomness, manifest = ground.clock, ground.randomness, ground.manifest
        with manifest.read() as view:
            fresh = not view.all_databases()
        claim = PrefixClaim(
            remote=ground.remote,
            ownership=ground.ownership,
            manifest=manifest,
            clock=clock,
            randomness=randomness,
            events=events,
            fresh=fresh,
        )
        try:  # a prefix that is not ours is refused before anything is served
            await claim.attempt()
        except OwnershipLost as error:
            raise StartRefused(str(error)) from error
        await manifest.commit(ManifestBatch(ops=(DropForeignLeases(),), reason="lease.dropped"))

        quota = StorageQuota(
            global_limit_bytes=settings.quota_global_bytes,
            drain_limit_bytes=settings.drain_reserve_bytes,
            clock=clock,
            events=events,
        )
        hot_cache = await HotCache.open(
            settings.data_dir / "hot_cache",
            limit_bytes=settings.hot_cache_bytes,
            pool=ground.pool,
            events=events,
        )
        quota.add_reclaimer(hot_cache)
        wal = WalStore(
            settings.data_dir / "wal",
            clock=clock,
            events=events,
            catalog=ManifestSegmentCatalog(manifest),
            on_fatal=on_fatal,
        )
        stack.push_async_callback(wal.aclose)
        directory = DatabaseDirectory(manifest, wal, events=events)
        await directory.open_all()

        page_cache = PageCache(limit_bytes=settings.page_cache_bytes)
        page_store = await stack.enter_async_context(
            PageStore(
                manifest,
                wal,
                remote=claim.remote,
                hot_cache=hot_cache,
                cache=page_cache,
                pins=GenerationPins(),
                pool=ground.pool,
                clock=clock,
                events=events,
            )
        )

        release = WalRelease(manifest, wal, events=events)
        queue = JobQueue(
            manifest,
            clock=clock,
            events=events,
            feed=JobFeed(),
            depth_max=settings.job_queue_depth_max,
        )
        await queue.load()
        executor = CheckpointExecutor(
            CheckpointParts(
                manifest=manifest,
                wal=wal,
                scratch=ground.scratch,
                hot_cache=hot_cache,
                quota=quota,
                remote=claim.remote,
                ownership=ground.ownership,
                release=release,
                pages=page_store,
                on_durable=directory.notify_checkpointed,
                pool=ground.pool,
                clock=clock,
                events=events,
            ),
            CheckpointLimits(
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
            ),
        )
        runner = JobRunner(
            queue,
            {"create_checkpoint": CreateCheckpoint(executor)},
            clock=clock,
            randomness=randomness,
            events=events,
            policy=RetryPolicy(
                attempts_max=settings.job_attempts,
                backoff_base_seconds=settings.job_backoff_base_seconds,
                backoff_cap_seconds=settings.job_backoff_cap_seconds,
                stall_seconds=settings.job_stall_seconds,
            ),
        )
        job_loop = JobLoop(
            queue,
            runner,
            ready=claim.wait_claimed,
            clock=clock,
            concurrency=settings.job_concurrency,
        )
        janitor = ScratchJanitor(
            ground.scratch, live_jobs=queue.unfinished_ids, room=quota, clock=clock, events=events
        )
        await janitor.run_at_start()
        fsck = Fsck(
            manifest=manifest,
            remote=claim.remote,
            wal_root=settings.data_dir / "wal",
            scratch=ground.scratch,
            quota=quota,
            pool=ground.pool,
        )
        states = States(manifest, directory, page_store)
        container = Container(
            Services(
                databases=Databases(manifest, directory, clock=clock, events=events),
                records=Records(
                    manifest,
                    directory,
                    RecordReader(
                        remote=claim.remote,
                        hot_cache=hot_cache,
                        pool=ground.pool,
                        events=events,
                        clock=clock,
                    ),
                    record_bytes_max=settings.max_record_bytes,
                ),
                pages_in=PagesIn(
                    manifest,
                    directory,
                    page_store,
                    pool=ground.pool,
                    events=events,
                    wal_budget_bytes=settings.wal_budget_bytes,
                ),
                pages=Pages(states, page_store),
                images=Images(states, page_store),
                checkpoints=Checkpoints(
                    manifest,
                    directory,
                    queue,
                    clock=clock,
                    randomness=randomness,
                    deadline_seconds=settings.job_deadline_seconds,
                ),
                jobs=Jobs(manifest, queue),
                history=History(manifest, directory),
                debugging=Debugging(
                    manifest, quota, fsck, page_cache=page_cache, hot_cache=hot_cache
                ),
                idempotency=Idempotency(manifest, clock=clock),
            ),
            Gauges(
                queue_depth=lambda: queue.depth,
                wal_bytes=lambda: sum(log.wal_bytes for log in wal.logs()),
                quota_used_bytes=lambda: quota.snapshot().global_used_bytes,
                hot_cache_bytes=lambda: hot_cache.stats().used_bytes,
                page_cache_bytes=lambda: page_cache.stats().used_bytes,
            ),
            claim=claim,
            job_loop=job_loop,
            events=events,
        )
        supervisor = await stack.enter_async_context(
            Supervisor(clock=clock, events=events, on_fatal=on_fatal)
        )
        for worker in (
            claim,
            janitor,
            WalSweep(release, clock=clock, events=events),
            Pruning(manifest, clock=clock, events=events, jobs_max=settings.job_history_count),
            job_loop,
        ):
            supervisor.start(worker)
        stack.push_async_callback(job_loop.drain, seconds=settings.shutdown_seconds)
        try:
            yield container
        finally:
            container.begin_shutdown()


def _no_progress(read: int, total: int) -> None:
    del read, total


async def recover(
    settings: Settings, *, progress: Callable[[int, int], None] = _no_progress
) -> RecoverReport:
    """Rebuilds the manifest of an empty data directory from the bucket, and takes the prefix
    over for this directory's node identity. Raises StartRefused, RemoteUnavailable.
    """
    events = Events()
    async with AsyncExitStack() as stack:
        ground = await _open_ground(
            stack,
            settings.model_copy(update={"take_over": True}),
            events=events,
            on_fatal=_raise_fatal,
        )
        report = await recover_databases(
            ground.manifest, ground.remote, events=events, progress=progress
        )
        await ground.ownership.claim()
        return report


async def fsck(settings: Settings) -> FsckReport:
    """Checks a stopped service's data directory. Raises StartRefused while one runs on it."""
    async with AsyncExitStack() as stack:
        ground = await _open_ground(stack, settings, events=Events(), on_fatal=_raise_fatal)
        return await Fsck(
            manifest=ground.manifest,
            remote=lambda: ground.remote,
            wal_root=settings.data_dir / "wal",
            scratch=ground.scratch,
            quota=None,
            pool=ground.pool,
        ).run()


async def _open_ground(
    stack: AsyncExitStack, settings: Settings, *, events: Events, on_fatal: OnFatal
) -> _Ground:
    clock, randomness = SystemClock(), SystemRandomness()
    process_id = new_ulid(clock, randomness)
    await asyncio.to_thread(_make_data_directory_blocking, settings.data_dir)
    stack.enter_context(_DataDirectoryLock(settings.data_dir))
    manifest = await ManifestStore.open(
        settings.data_dir / "manifest",
        clock=clock,
        randomness=randomness,
        events=events,
        process_id=process_id,
        map_bytes=settings.manifest_map_bytes,
        max_readers=settings.manifest_max_readers,
        migrations=load_steps(),
        on_fatal=on_fatal,
    )
    stack.push_async_callback(manifest.aclose)
    pool = BlockingPool("bop-io", threads=max(4, os.cpu_count() or 1))
    stack.callback(pool.close_blocking)
    remote = await open_remote(
        stack, settings.effective_remote_url, remote_options(settings),
        clock=clock, randomness=randomness, events=events,
    )  # fmt: skip
    ownership = PrefixOwnership(
        remote,
        node_id=manifest.node_id,
        process_id=process_id,
        host=socket.gethostname(),
        take_over=settings.take_over,
        clock=clock,
    )
    return _Ground(
        clock=clock,
        randomness=randomness,
        process_id=process_id,
        manifest=manifest,
        remote=remote,
        ownership=ownership,
        pool=pool,
        scratch=ScratchStore(settings.data_dir / "checkpoint_scratch", pool=pool, clock=clock),
    )


def remote_options(settings: Settings) -> RemoteOptions:
    return RemoteOptions(
        endpoint_url=settings.s3_endpoint_url,
        region=settings.s3_region,
        addressing=settings.s3_addressing,
        ca_file=settings.s3_ca_file,
        storage_class=settings.s3_storage_class,
        sse=settings.s3_sse,
        sse_kms_key_id=settings.s3_sse_kms_key_id,
        concurrency=settings.remote_concurrency,
        attempts=settings.remote_attempts,
        connect_timeout_seconds=settings.remote_connect_timeout_seconds,
        idle_timeout_seconds=settings.remote_idle_timeout_seconds,
        request_timeout_seconds=settings.remote_request_timeout_seconds,
        retry_base_seconds=settings.remote_retry_base_seconds,
        retry_cap_seconds=settings.remote_retry_cap_seconds,
    )


def _raise_fatal(error: BaseException) -> None:
    raise error


def _make_data_directory_blocking(path: Path) -> None:
    """Its name is durable on return: without that a power cut could take all that is in it (I1)."""
    made = [each for each in path.absolute().parents if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in (path.absolute(), *made):
        with suppress(PermissionError):  # a parent that we may not read, we have not made
            fsync_path_blocking(each.parent)


class _DataDirectoryLock:
    """One process per data directory (I17); the lock goes with the process."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / "lock"
        self._fd = -1

    def __enter__(self) -> None:
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._fd)
            raise StartRefused(
                f"Another process uses the data directory {self._path.parent}."
            ) from error

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
