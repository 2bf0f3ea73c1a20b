"""Opens a running service bottom up on one AsyncExitStack, which closes it in reverse. Nothing
outside this package creates a component.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from app.container.generation_jobs import verification_workers
from app.container.ground import Ground, OnFatal, open_ground
from app.container.service import Container
from app.container.services import make_gauges, make_services
from app.container.storage import open_storage
from app.container.work import open_work
from app.core.base.errors import OwnershipLost, StartRefused
from app.core.base.events import Events
from app.core.checkpoint.history_objects import HistoryObjects
from app.core.stores.manifest.ops import DropForeignLeases, ManifestBatch
from app.core.workers.cache_check import CacheCheck
from app.core.workers.change_trim import ChangeTrim
from app.core.workers.coalescing import Coalescing
from app.core.workers.history_upload import HistoryUpload
from app.core.workers.lease_reaper import LeaseReaper
from app.core.workers.prefix_claim import PrefixClaim
from app.core.workers.pruning import Pruning
from app.core.workers.supervisor import Supervisor
from app.core.workers.wal_sweep import WalSweep
from app.settings import Settings

HISTORY_DRAIN_SECONDS = 5.0


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
        storage = await open_storage(
            stack, settings, ground, claim, events=events, on_fatal=on_fatal
        )
        work = await open_work(settings, ground, storage, claim, events=events)
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
            make_services(settings, ground, storage, work, claim, upload, events=events),
            make_gauges(settings, storage, work),
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
