"""What a checkpoint's stages work with, its limits, and how its events name it."""

from collections.abc import Callable
from dataclasses import dataclass, field

from app.core.base.clock import Clock
from app.core.base.events import Events
from app.core.base.tasks import BlockingPool
from app.core.checkpoint.wal_release import WalRelease
from app.core.coordination.ownership import PrefixOwnership
from app.core.coordination.quota import StorageQuota
from app.core.engines.base import DeltaLimits
from app.core.reads.page_store import PageStore
from app.core.stores.local.directory_files import DirectoryFiles
from app.core.stores.local.hot_cache import HotCache
from app.core.stores.local.scratch import ScratchStore
from app.core.stores.manifest.records import JobRecord
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.remote.protocol import RemoteStore
from app.core.stores.wal.store import WalStore


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointLimits:
    staging_concurrency: int
    upload_concurrency: int
    lease_ttl_seconds: float
    gc_grace_seconds: float
    deltas: DeltaLimits = field(default_factory=DeltaLimits)
    compression_threads: int = 2
    """For the blocks of one chunk; they do not hold the interpreter's lock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointParts:
    """What the executor works with; the composition root fills it."""

    manifest: ManifestStore
    wal: WalStore
    scratch: ScratchStore
    scratch_links: bool
    """Scratch takes hard links of WAL segments."""
    hot_cache: HotCache
    directory_files: DirectoryFiles
    quota: StorageQuota
    wal_since: Callable[[int], float]
    """Since when the database has unpublished WAL, by the monotonic clock."""
    remote: Callable[[], RemoteStore]
    """The claimed remote store; raises NotReady until the prefix is ours."""
    ownership: PrefixOwnership
    release: WalRelease
    pages: PageStore
    on_durable: Callable[[int], None]
    """Told the db_id whenever its `checkpointed_lsn` has moved."""
    pool: BlockingPool
    clock: Clock
    events: Events


def job_fields(job: JobRecord) -> dict[str, object]:
    return {
        "job_id": job.job_id,
        "kind": job.kind,
        "tenant": job.tenant,
        "database": job.database,
        "db_id": job.db_id,
        "stage": job.stage,
        "attempt": job.attempts,
        "run": job.run,
    }
