"""Who pays for the bytes on the disk: each inode once, wherever it is linked.

Pure bookkeeping in memory; `quota.py` applies what it returns to the budgets. The first link of an
inode pays. When that link goes, the next oldest pays; when the last goes, the bytes are free. So a
sealed segment that is hard-linked into scratch and then into the hot cache counts once throughout.
"""

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Self

from app.core.base.errors import InvariantViolation


class UsageKind(Enum):
    WAL = "wal"
    SCRATCH = "scratch"
    HOT_CACHE = "hot_cache"


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageKey:
    """An inode. Its number may be reused once the last link is gone: unlink, then discharge."""

    device: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        return cls(device=status.st_dev, inode=status.st_ino)


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageLink:
    """One place where an inode is linked. `owner` is the directory's: a database, a job, or ""."""

    kind: UsageKind
    owner: str
    tenant: str | None
    """Who pays beside the global budget; None for what belongs to no tenant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Payment:
    """A change of what `tenant` pays; the global budget sees every payment."""

    tenant: str | None
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundInode:
    """An inode as a listing of the data directory shows it."""

    bytes: int
    links: tuple[UsageLink, ...]


@dataclass(slots=True)
class _Inode:
    bytes: int
    changed: int
    links: dict[tuple[UsageKind, str], UsageLink] = field(default_factory=dict)

    @property
    def payer(self) -> UsageLink:
        return next(iter(self.links.values()))


class InodeLedger:
    """Not thread-safe; its owner confines it to one thread."""

    def __init__(self) -> None:
        self._inodes: dict[UsageKey, _Inode] = {}
        self._by_kind: dict[UsageKind, int] = dict.fromkeys(UsageKind, 0)
        self._sequence = 0
        self._removed: dict[UsageKey, int] = {}
        self._watched_since: int | None = None

    @property
    def by_kind(self) -> Mapping[UsageKind, int]:
        return dict(self._by_kind)

    def link(self, key: UsageKey, link: UsageLink, *, size_bytes: int) -> list[Payment]:
        """Records a link, or that a linked file is now `size_bytes` long."""
        if size_bytes < 0:
            raise InvariantViolation("A file has no negative size.", size_bytes=size_bytes)
        inode = self._inodes.get(key)
        if inode is None:
            inode = self._inodes[key] = _Inode(bytes=0, changed=0)
        else:
            before = inode.payer
            inode.links.setdefault((link.kind, link.owner), link)
            assert inode.payer is before
        inode.links.setdefault((link.kind, link.owner), link)
        return self._resize(inode, size_bytes)

    def unlink(self, key: UsageKey, *, kind: UsageKind, owner: str) -> list[Payment]:
        """Forgets a link; one that is not known is no error, for removal is idempotent."""
        inode = self._inodes.get(key)
        if inode is None or (kind, owner) not in inode.links:
            return []
        self._touch(inode)
        before = inode.payer
        del inode.links[kind, owner]
        if not inode.links:
            del self._inodes[key]
            if self._watched_since is not None:
                self._removed[key] = self._sequence
            return self._pay(before, -inode.bytes)
        if inode.payer is before:
            return []
        return self._pay(before, -inode.bytes) + self._pay(inode.payer, inode.bytes)

    def unlink_owner(self, *, kind: UsageKind, owner: str) -> list[Payment]:
        """Forgets every link of a directory that is gone."""
        keys = [key for key, inode in self._inodes.items() if (kind, owner) in inode.links]
        return [
            payment for key in keys for payment in self.unlink(key, kind=kind, owner=owner)
        ]

    # --- against what a listing found

    def watch(self) -> int:
        """Marks the start of a listing: what changes from here on is not the listing's to judge."""
        self._removed.clear()
        self._watched_since = self._sequence
        return self._sequence

    def corrections(
        self, found: Mapping[UsageKey, FoundInode], *, kinds: Collection[UsageKind]
    ) -> Iterator[tuple[UsageKey, UsageLink, int | None]]:
        """(inode, link, its true size; None where the link is gone) for what the ledger has wrong.

        Looks only at links of the listed `kinds` and at inodes untouched since `watch`.
        """
        since = self._sequence if self._watched_since is None else self._watched_since
        for key, inode in list(self._inodes.items()):
            if inode.changed > since:
                continue
            seen = found.get(key)
            links = () if seen is None else seen.links
            true_links = {(link.kind, link.owner) for link in links}
            for place, link in list(inode.links.items()):
                if link.kind in kinds and place not in true_links:
                    yield key, link, None
        for key, seen in found.items():
            inode_now = self._inodes.get(key)
            if key in self._removed or (inode_now is not None and inode_now.changed > since):
                continue
            for link in seen.links:
                known = inode_now is not None and (link.kind, link.owner) in inode_now.links
                if not known or (inode_now is not None and inode_now.bytes != seen.bytes):
                    yield key, link, seen.bytes

    def end_watch(self) -> None:
        self._removed.clear()
        self._watched_since = None

    def totals(self) -> tuple[int, dict[str, int]]:
        """What all and what each tenant pays, summed anew: the check of the running sums."""
        whole = 0
        tenants: dict[str, int] = {}
        for inode in self._inodes.values():
            whole += inode.bytes
            tenant = inode.payer.tenant
            if tenant is not None:
                tenants[tenant] = tenants.get(tenant, 0) + inode.bytes
        return whole, tenants

    def _resize(self, inode: _Inode, size_bytes: int) -> list[Payment]:
        self._touch(inode)
        change = size_bytes - inode.bytes
        inode.bytes = size_bytes
        return self._pay(inode.payer, change)

    def _touch(self, inode: _Inode) -> None:
        self._sequence += 1
        inode.changed = self._sequence

    def _pay(self, payer: UsageLink, change: int) -> list[Payment]:
        if change == 0:
            return []
        self._by_kind[payer.kind] += change
        return [Payment(tenant=payer.tenant, bytes=change)]
