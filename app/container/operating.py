"""Wires what operators use: approvals, the audit log, explanations, backups, freshness."""

from dataclasses import dataclass

from app.container.ground import Ground
from app.container.service import RemoteHealth
from app.core.base.events import Events
from app.core.coordination.quota import StorageQuota
from app.core.jobs.queue import JobQueue
from app.core.services.approvals import Approvals
from app.core.services.audit import Audit
from app.core.services.backups import Backups
from app.core.services.directory import DatabaseDirectory
from app.core.services.explaining import Explaining, RemoteLoad
from app.core.services.freshness import Freshness
from app.core.services.wal_overview import WalOverview
from app.core.workers.prefix_claim import PrefixClaim
from app.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Operating:
    approvals: Approvals
    audit: Audit
    backups: Backups
    explaining: Explaining
    freshness: Freshness
    wal_overview: WalOverview


def operating_services(
    settings: Settings,
    ground: Ground,
    *,
    directory: DatabaseDirectory,
    queue: JobQueue,
    quota: StorageQuota,
    claim: PrefixClaim,
    events: Events,
) -> Operating:
    manifest, clock = ground.manifest, ground.clock
    health = RemoteHealth()
    events.subscribe(health)

    def prefix_problem() -> str | None:
        return None if claim.claimed else claim.problem or "The remote prefix is not claimed yet."

    def remote_load() -> RemoteLoad:
        limit = ground.remote.limit
        return RemoteLoad(
            failing=health.failing,
            in_flight=limit.in_flight,
            limit=limit.limit,
            waiting=limit.waiting,
        )

    return Operating(
        approvals=Approvals(
            manifest,
            directory,
            clock=clock,
            randomness=ground.randomness,
            events=events,
            needed=settings.admin_approvals,
            valid_seconds=settings.admin_approval_seconds,
        ),
        audit=Audit(manifest, clock=clock, events=events),
        backups=Backups(
            manifest,
            settings.data_dir / "backups",
            clock=clock,
            events=events,
            kept_count=settings.manifest_backups_count,
        ),
        explaining=Explaining(
            manifest,
            queue,
            quota,
            clock=clock,
            job_concurrency=settings.job_concurrency,
            prefix_problem=prefix_problem,
            remote_load=remote_load,
        ),
        freshness=Freshness(manifest, directory, clock=clock),
        wal_overview=WalOverview(manifest, directory),
    )
