"""Makes the quota's charges agree with the files that are really there.

Run at start, when the ledger is empty, and now and then afterwards: a file that was charged but
never made, or unlinked but never discharged, would otherwise skew the budgets for good.

Invariants: I9: what is used is what exists; an inode counts once, wherever it is linked.
Concurrency: the listing runs in a pool, beside stores that charge and discharge; whatever changed
since it began is left as it is, for the stores know better.
Cancellation: nothing was corrected yet, or all was.
Crash: nothing is kept.
"""

import asyncio
import os
import stat
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from app.core.base.events import Events
from app.core.base.tasks import BlockingPool
from app.core.coordination.quota import StorageQuota
from app.core.coordination.usage import FoundInode, UsageKey, UsageKind, UsageLink
from app.core.stores.local.scratch import job_of
from app.core.stores.manifest.store import ManifestStore

LiveJobs = Callable[[], Collection[str]]
"""Every job that has not ended, from memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRoot:
    """A directory to list. Its files' owner is the subdirectory they lie in, if it has owners."""

    kind: UsageKind
    path: Path
    has_owners: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconciliationReport:
    inodes: int
    corrected: int
    drift_bytes: int
    """How far the charges were off, gaps and surpluses added up. 0 when the books were right."""


class QuotaReconciliation:
    def __init__(
        self,
        quota: StorageQuota,
        roots: Sequence[UsageRoot],
        *,
        tenant_of: Callable[[UsageKind, str], str | None],
        pool: BlockingPool,
        events: Events,
    ) -> None:
        """`tenant_of` names who pays for an owner's files; None: only the global budget."""
        self._quota = quota
        self._roots = tuple(roots)
        self._tenant_of = tenant_of
        self._pool = pool
        self._events = events
        self._turn = asyncio.Lock()

    async def run_at_start(self) -> ReconciliationReport:
        """Nothing runs yet, so that no reservation stands for what lies in scratch. The cache
        charges its own files when it is opened.
        """
        return await self.run_once(kinds=frozenset({UsageKind.WAL, UsageKind.SCRATCH}))

    async def run_once(
        self,
        *,
        live_jobs: LiveJobs = tuple,
        kinds: Collection[UsageKind] = frozenset(UsageKind),
    ) -> ReconciliationReport:
        """Scratch of jobs that live is not charged: their reservations stand for it."""
        async with self._turn, self._listed(live_jobs, kinds) as (inodes, wrong):
            before = self._quota.snapshot()
            for key, link, size_bytes in wrong:
                if size_bytes is None:
                    self._quota.discharge(key, link)
                else:
                    self._quota.charge(key, link, size_bytes=size_bytes)
        after = self._quota.snapshot().files_by_kind
        drift_bytes = sum(abs(after[kind] - used) for kind, used in before.files_by_kind.items())
        corrected = len({key for key, _, _ in wrong})
        if corrected:
            self._events.info("quota.reconciled", inodes=corrected, drift_bytes=drift_bytes)
        return ReconciliationReport(inodes=inodes, corrected=corrected, drift_bytes=drift_bytes)

    async def find_drift(self, *, live_jobs: LiveJobs) -> list[str]:
        """What two looks in a row found wrong in the same way; corrects nothing."""
        async with self._turn:
            async with self._listed(live_jobs, frozenset(UsageKind)) as (_, first):
                pass
            async with self._listed(live_jobs, frozenset(UsageKind)) as (_, second):
                lasting = set(first).intersection(second)
        return sorted(
            f"{link.kind.value} {link.owner}/{link.name}: "
            + ("charged, but not there" if size is None else f"{size} bytes, not charged so")
            for _, link, size in lasting
        )

    @asynccontextmanager
    async def _listed(
        self, live_jobs: LiveJobs, kinds: Collection[UsageKind]
    ) -> AsyncIterator[tuple[int, list[tuple[UsageKey, UsageLink, int | None]]]]:
        """How many inodes there are, and what the ledger has wrong."""
        ledger = self._quota.ledger
        ledger.watch()
        try:
            roots = [root for root in self._roots if root.kind in kinds]
            live = frozenset(live_jobs())
            listed = await self._pool.run(list_files_blocking, roots, live)
            live |= frozenset(live_jobs())  # and those that began meanwhile
            found = {
                key: FoundInode(bytes=size_bytes, links=self._links(places, live))
                for key, (size_bytes, places) in listed.items()
            }
            found = {key: inode for key, inode in found.items() if inode.links}
            listed_kinds = {root.kind for root in roots}
            yield len(found), list(ledger.corrections(found, kinds=listed_kinds))
        finally:
            ledger.end_watch()

    def _links(self, places: Sequence["_Place"], live: Collection[str]) -> tuple[UsageLink, ...]:
        return tuple(
            UsageLink(kind=kind, owner=owner, name=name, tenant=self._tenant_of(kind, owner))
            for kind, owner, name in sorted(places, key=_payer_first)
            if kind is not UsageKind.SCRATCH or owner not in live
        )


def usage_roots(data_dir: Path) -> tuple[UsageRoot, ...]:
    return (
        UsageRoot(kind=UsageKind.WAL, path=data_dir / "wal", has_owners=True),
        UsageRoot(kind=UsageKind.SCRATCH, path=data_dir / "checkpoint_scratch", has_owners=True),
        UsageRoot(kind=UsageKind.HOT_CACHE, path=data_dir / "hot_cache", has_owners=False),
    )


def tenant_of(manifest: ManifestStore, kind: UsageKind, owner: str) -> str | None:
    """WAL belongs to its database's tenant, scratch to its job's, all else to nobody."""
    if kind is UsageKind.HOT_CACHE or not owner:
        return None
    with manifest.read() as view:
        found = (
            view.database(int(owner))
            if kind is UsageKind.WAL and owner.isdecimal()
            else view.job(owner)
        )
    return None if found is None else found.tenant


_PAYERS = (UsageKind.WAL, UsageKind.SCRATCH, UsageKind.HOT_CACHE)
_Place = tuple[UsageKind, str, str]


def _payer_first(place: _Place) -> tuple[int, str, str]:
    """The order in which links come about: the WAL's file is linked into scratch, then cached."""
    kind, owner, name = place
    return _PAYERS.index(kind), owner, name


def list_files_blocking(
    roots: Sequence[UsageRoot], reserved_jobs: Collection[str]
) -> dict[UsageKey, tuple[int, list[_Place]]]:
    """Size and places of every regular file below `roots`; what vanishes meanwhile is left out."""
    found: dict[UsageKey, tuple[int, list[_Place]]] = {}
    for root in roots:
        for path in _walk_blocking(root.path):
            parts = path.relative_to(root.path).parts
            owner = parts[0] if root.has_owners and len(parts) > 1 else ""
            if root.kind is UsageKind.SCRATCH:
                owner = job_of(owner)  # who gives it back knows the job, not how far its end came
                if owner in reserved_jobs:
                    continue
            if root.kind is UsageKind.HOT_CACHE and path.suffix == ".part":
                continue  # arriving: it is charged with its name
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue
            if stat.S_ISREG(status.st_mode):
                places = found.setdefault(UsageKey.of(status), (status.st_size, []))[1]
                places.append((root.kind, owner, path.name))
    return found


def _walk_blocking(root: Path) -> Iterator[Path]:
    for directory, _, names in os.walk(root):
        for name in names:
            yield Path(directory) / name
