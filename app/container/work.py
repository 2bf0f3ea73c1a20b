"""Durable work: the queue, what runs it, and what puts jobs into it."""

import os
from dataclasses import dataclass

from app.container.collection import collection_parts
from app.container.generation_jobs import generation_job_handlers
from app.container.ground import Ground
from app.container.storage import Storage
from app.core.base.events import Events
from app.core.checkpoint.executor import CheckpointExecutor
from app.core.checkpoint.parts import CheckpointLimits, CheckpointParts
from app.core.checkpoint.planning import CheckpointPlanning, CoalescingPlanning
from app.core.checkpoint.truncation import TruncationExecutor
from app.core.engines.base import DeltaLimits
from app.core.jobs.checkpoint_requests import CheckpointRequests
from app.core.jobs.feed import JobFeed
from app.core.jobs.handlers.prune_checkpoint import PruneCheckpoint
from app.core.jobs.handlers.publish_chunks import PublishChunks
from app.core.jobs.handlers.truncate_append_only import TruncateAppendOnly
from app.core.jobs.queue import JobQueue
from app.core.jobs.runner import JobHandler, JobRunner, RetryPolicy
from app.core.stores.manifest.records import JobKind
from app.core.workers.collector import Collector
from app.core.workers.janitor import ScratchJanitor
from app.core.workers.job_loop import JobLoop
from app.core.workers.prefix_claim import PrefixClaim
from app.core.workers.triggers import CheckpointTriggers
from app.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Durable work: the queue, and what runs it; and the collector."""

    queue: JobQueue
    requests: CheckpointRequests
    loop: JobLoop
    triggers: CheckpointTriggers
    janitor: ScratchJanitor
    collector: Collector


async def open_work(
    settings: Settings, ground: Ground, storage: Storage, claim: PrefixClaim, *, events: Events
) -> Work:
    queue = JobQueue(
        ground.manifest,
        clock=ground.clock,
        events=events,
        feed=JobFeed(),
        depth_max=settings.job_queue_depth_max,
        retry_wait_seconds_max=settings.job_backoff_cap_seconds,
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
        events=events,
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
    return Work(
        queue=queue,
        requests=requests,
        loop=loop,
        triggers=triggers,
        janitor=janitor,
        collector=collection.collector,
    )


def _checkpoint_parts(
    ground: Ground, storage: Storage, claim: PrefixClaim, *, events: Events
) -> CheckpointParts:
    return CheckpointParts(
        manifest=ground.manifest,
        wal=storage.wal,
        scratch=ground.scratch,
        scratch_links=storage.scratch_links,
        hot_cache=storage.hot_cache,
        directory_files=storage.directory_files,
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
