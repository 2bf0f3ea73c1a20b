"""Who pays for the bytes on the disk: each inode once, wherever it is linked.

Pure bookkeeping in memory; `quota.py` applies what it returns to the budgets. The first link of an
inode pays. When that link goes, the next oldest pays; when the last goes, the bytes are free. So a
sealed segment that is hard-linked into scratch and then into the hot cache counts once throughout.
"""

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Self, TypeAlias

from app.core.base.errors import InvariantViolation


class UsageKind(Enum):
    WAL = "wal"
    SCRATCH = "scratch"
    HOT_CACHE = "hot_cache"


Place: TypeAlias = tuple[UsageKind, str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageKey:
    device: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        return cls(device=status.st_dev, inode=status.st_ino)


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageLink:
    """One name of an inode: the file `name` of `owner` (a database, a job, or "").

    The name keeps a late discharge of a removed file apart from a new file that was given the
    same inode number.
    """

    kind: UsageKind
    owner: str
    name: str
    tenant: str | None
    """Who pays beside the global budget; None for what belongs to no tenant."""

    @property
    def place(self) -> Place:
        return self.kind, self.owner, self.name


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
    links: dict[Place, UsageLink] = field(default_factory=dict)

    @property
    def payer(self) -> UsageLink:
        return next(iter(self.links.values()))


class InodeLedger:
    """Not thread-safe; its owner confines it to one thread."""

    def __init__(self) -> None:
        self._inodes: dict[UsageKey, _Inode] = {}
        self._owned: dict[tuple[UsageKind, str], set[UsageKey]] = {}
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
        inode.links.setdefault(link.place, link)
        self._owned.setdefault(link.place[:2], set()).add(key)
        self._touch(inode)
        change = size_bytes - inode.bytes
        inode.bytes = size_bytes
        return self._pay(inode.payer, change)

    def unlink(self, key: UsageKey, place: Place) -> list[Payment]:
        """Forgets a link; one that is not known is no error, for removal is idempotent."""
        inode = self._inodes.get(key)
        if inode is None or place not in inode.links:
            return []
        self._touch(inode)
        before = inode.payer
        del inode.links[place]
        self._disown(key, inode, place)
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
        gone = [
            (key, place)
            for key in self._owned.get((kind, owner), ())
            for place in self._inodes[key].links
            if place[:2] == (kind, owner)
        ]
        return [payment for key, place in gone for payment in self.unlink(key, place)]

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
            places = set() if seen is None else {link.place for link in seen.links}
            for place, link in list(inode.links.items()):
                if link.kind in kinds and place not in places:
                    yield key, link, None
        for key, seen in found.items():
            inode_now = self._inodes.get(key)
            if key in self._removed or (inode_now is not None and inode_now.changed > since):
                continue
            for link in seen.links:
                if (
                    inode_now is None
                    or link.place not in inode_now.links
                    or inode_now.bytes != seen.bytes
                ):
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
            if tenant is not None and inode.bytes:
                tenants[tenant] = tenants.get(tenant, 0) + inode.bytes
        return whole, tenants

    def _disown(self, key: UsageKey, inode: _Inode, place: Place) -> None:
        """One owner may hold an inode by several names."""
        if all(other[:2] != place[:2] for other in inode.links):
            owned = self._owned[place[:2]]
            owned.discard(key)
            if not owned:
                del self._owned[place[:2]]

    def _touch(self, inode: _Inode) -> None:
        self._sequence += 1
        inode.changed = self._sequence

    def _pay(self, payer: UsageLink, change: int) -> list[Payment]:
        if change == 0:
            return []
        self._by_kind[payer.kind] += change
        return [Payment(tenant=payer.tenant, bytes=change)]
