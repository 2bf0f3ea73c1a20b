"""Makes the quota's charges agree with the files that are really there.

Run at start, when the ledger is empty, and now and then afterwards: a file that was charged but
never made, or unlinked but never discharged, would otherwise skew the budgets for good.

Invariants: I9: what is used is what exists; an inode counts once, wherever it is linked.
Concurrency: the listing runs in a pool, beside stores that charge and discharge; whatever changed
since it began is left as it is, for the stores know better.
Cancellation: nothing was corrected yet, or all was.
Crash: nothing is kept.
"""

import os
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.core.base.events import Events
from app.core.base.tasks import BlockingPool
from app.core.coordination.quota import StorageQuota
from app.core.coordination.usage import FoundInode, UsageKey, UsageKind, UsageLink


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

    async def run_once(self, *, reserved_jobs: Collection[str] = ()) -> ReconciliationReport:
        """Scratch of `reserved_jobs` is not charged: their reservations stand for it."""
        ledger = self._quota.ledger
        ledger.watch()
        try:
            listed = await self._pool.run(
                list_files_blocking, self._roots, frozenset(reserved_jobs)
            )
            found = {
                key: FoundInode(
                    bytes=size_bytes,
                    links=tuple(
                        UsageLink(
                            kind=kind, owner=owner, name=name, tenant=self._tenant_of(kind, owner)
                        )
                        for kind, owner, name in sorted(places, key=_payer_first)
                    ),
                )
                for key, (size_bytes, places) in listed.items()
            }
            kinds = {root.kind for root in self._roots}
            before = self._quota.snapshot()
            wrong = list(ledger.corrections(found, kinds=kinds))
            for key, link, size_bytes in wrong:
                if size_bytes is None:
                    self._quota.discharge(key, link)
                else:
                    self._quota.charge(key, link, size_bytes=size_bytes)
        finally:
            ledger.end_watch()
        after = self._quota.snapshot().files_by_kind
        drift_bytes = sum(abs(after[kind] - used) for kind, used in before.files_by_kind.items())
        corrected = len({key for key, _, _ in wrong})
        if corrected:
            self._events.info("quota.reconciled", inodes=corrected, drift_bytes=drift_bytes)
        return ReconciliationReport(inodes=len(found), corrected=corrected, drift_bytes=drift_bytes)


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
            if root.kind is UsageKind.SCRATCH and owner in reserved_jobs:
                continue
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
