"""Wires the jobs about one generation: verification and download."""

from app.container.ground import Ground
from app.core.base.events import Events
from app.core.coordination.bandwidth import Pause
from app.core.coordination.pace import Pace
from app.core.jobs.handlers.download_checkpoint import DownloadCheckpoint, DownloadParts
from app.core.jobs.handlers.verify_manifest import VerificationParts, VerifyManifest
from app.core.jobs.queue import JobQueue
from app.core.jobs.runner import JobHandler
from app.core.reads.blob_check import BlobCheck
from app.core.reads.read_point import GenerationPins
from app.core.stores.local.hot_cache import HotCache
from app.core.stores.manifest.records import JobKind
from app.core.workers.prefix_claim import PrefixClaim
from app.core.workers.verification import Verification
from app.settings import Settings


def generation_job_handlers(
    settings: Settings,
    ground: Ground,
    claim: PrefixClaim,
    *,
    hot_cache: HotCache,
    pins: GenerationPins,
    pause: Pause,
    events: Events,
) -> dict[JobKind, JobHandler]:
    return {
        "verify_manifest": VerifyManifest(
            VerificationParts(
                manifest=ground.manifest,
                pins=pins,
                check=BlobCheck(remote=claim.remote, copies=hot_cache, pool=ground.pool),
                pace=Pace(
                    settings.verify_bytes_per_second or None, pause=pause, clock=ground.clock
                ),
                confirm_ownership=ground.ownership.confirm,
                clock=ground.clock,
                events=events,
            )
        ),
        "download_checkpoint": DownloadCheckpoint(
            DownloadParts(
                manifest=ground.manifest,
                pins=pins,
                remote=claim.remote,
                hot_cache=hot_cache,
                events=events,
            )
        ),
    }


def verification_workers(
    settings: Settings, ground: Ground, queue: JobQueue, *, events: Events
) -> list[Verification]:
    """None unless an interval is set."""
    if settings.verify_interval_seconds == 0:
        return []
    return [
        Verification(
            ground.manifest,
            queue,
            clock=ground.clock,
            randomness=ground.randomness,
            events=events,
            interval_seconds=settings.verify_interval_seconds,
            max_age_seconds=settings.verify_age_seconds,
        )
    ]
