"""What the HTTP edge sees of the service."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from app.core.base.events import Events, Level
from app.core.services.approvals import Approvals
from app.core.services.audit import Audit
from app.core.services.backups import Backups
from app.core.services.change_feed import ChangeFeed
from app.core.services.checkpoints import Checkpoints
from app.core.services.cold_scans import ColdScans
from app.core.services.collection import Collection
from app.core.services.databases import Databases
from app.core.services.debugging import Debugging
from app.core.services.deletion import Deletion
from app.core.services.explaining import Explaining
from app.core.services.forks import Forks
from app.core.services.freshness import Freshness
from app.core.services.generation_jobs import GenerationJobs
from app.core.services.history import History
from app.core.services.idempotency import Idempotency
from app.core.services.images import Images
from app.core.services.jobs import Jobs
from app.core.services.pages import Pages
from app.core.services.pages_in import PagesIn
from app.core.services.records import Records
from app.core.services.snapshots import Snapshots
from app.core.services.tenants import Tenants
from app.core.services.truncations import Truncations
from app.core.services.upkeep import Upkeep
from app.core.services.wal_overview import WalOverview
from app.core.workers.job_loop import JobLoop
from app.core.workers.prefix_claim import PrefixClaim

Status = Literal["starting", "ready", "stopping", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    databases: Databases
    records: Records
    pages_in: PagesIn
    pages: Pages
    images: Images
    checkpoints: Checkpoints
    cold_scans: ColdScans
    truncations: Truncations
    generation_jobs: GenerationJobs
    jobs: Jobs
    history: History
    snapshots: Snapshots
    forks: Forks
    change_feed: ChangeFeed
    deletion: Deletion
    collection: Collection
    debugging: Debugging
    idempotency: Idempotency
    approvals: Approvals
    audit: Audit
    tenants: Tenants
    upkeep: Upkeep
    backups: Backups
    explaining: Explaining
    freshness: Freshness
    wal_overview: WalOverview


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
    wal_budget_bytes: Callable[[], float]
    quota_used_bytes: Callable[[], float]
    quota_limit_bytes: Callable[[], float]
    hot_cache_bytes: Callable[[], float]
    page_cache_bytes: Callable[[], float]
    cold_scans: Callable[[], float]
    gc_queue: Callable[[], float]
    gc_lag_seconds: Callable[[], float]
    gc_paused: Callable[[], float]


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


class ManifestHealth:
    """An event sink: a row that could not be decoded stays on the disk until someone acts, and the
    process is restarted then.
    """

    def __init__(self) -> None:
        self.damaged = False

    def __call__(self, name: str, level: Level, fields: Mapping[str, object]) -> None:
        del level, fields
        if name == "manifest.row_unreadable":
            self.damaged = True


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
        self._manifest_health = ManifestHealth()
        events.subscribe(self._remote_health)
        events.subscribe(self._manifest_health)

    def readiness(self) -> Readiness:
        """Ready once recovered and the prefix was claimed; a later remote outage only degrades, as
        does a row of the manifest that cannot be read: all else can.
        """
        degraded = ["remote"] if self._claim.claimed and self._remote_health.failing else []
        degraded += ["manifest"] if self._manifest_health.damaged else []
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
