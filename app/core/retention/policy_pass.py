"""Applies every database's retention: which are due, and what of them goes.

Invariants: a generation whose document is not stored yet stays, whatever the policy says (I3).
Concurrency: one pass at a time. Crash: nothing is kept but what `expiry.py` commits; the first
pass of a process looks at every superseded row once, for what a crash may have left.
"""

from dataclasses import dataclass

from app.core.retention.expiry import Expiry, Removed
from app.core.retention.pins import pinned_generations
from app.core.retention.policy import RetentionRule, judge
from app.core.retention.removal import DatabaseRemoval
from app.core.stores.manifest.records import DatabaseRecord, Retention, SnapshotRecord
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.manifest.view import ManifestView


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """A database as it was judged: until one of these changes, or the time has come, there is
    nothing to do.
    """

    generation: int
    retention: Retention
    pinned: frozenset[int]
    due_at_us: float


class RetentionPass:
    def __init__(self, manifest: ManifestStore, expiry: Expiry, removal: DatabaseRemoval) -> None:
        self._manifest = manifest
        self._expiry = expiry
        self._removal = removal
        self._seen: dict[int, _Seen] = {}
        self._families: dict[int, tuple[object, ...]] = {}

    async def run(self, now_us: int, *, everything: bool) -> Removed:
        """With `everything`, databases that are not known to be due are looked at as well."""
        if everything:
            self._seen.clear()
        databases, _, _, pinned = await self._manifest.read_in_thread(_load)
        removed = Removed()
        for record in databases:
            if record.state != "tombstoned":
                pins = pinned.get(record.db_id, frozenset())
                removed.add(await self._judge(record, now_us, pins))
        removed.add(await self._let_go())
        return removed

    async def _let_go(self) -> Removed:
        """Of what forks held, until nothing changes: a deleted fork that goes may let go of the
        last rows of its parent.
        """
        removed = Removed()
        later: set[int] = set()
        while True:
            databases, families, busy, _ = await self._manifest.read_in_thread(_load)
            deleted = {one.db_id for one in databases if one.state == "tombstoned"}
            changed = [one for one in self._changed(databases, families) if one not in later]
            for db_id in changed:
                if db_id in deleted & busy:  # its own job does it, once those before have ended
                    later.add(db_id)
                    continue
                take = self._removal.remove if db_id in deleted else self._expiry.sweep
                part = await take(db_id)
                removed.add(part)
                if not part.finished:
                    later.add(db_id)
            if not changed:
                break
        for db_id in later:
            self._families.pop(db_id, None)  # again in the next round
        return removed

    async def _judge(self, record: DatabaseRecord, now_us: int, pinned: frozenset[int]) -> Removed:
        seen = self._seen.get(record.db_id)
        if (
            seen is not None
            and (seen.generation, seen.retention) == (record.generation, record.retention)
            and seen.pinned == pinned
            and now_us < seen.due_at_us
        ):
            return Removed()

        def decide(view: ManifestView) -> tuple[list[int], float]:
            rule = RetentionRule(
                retention=record.retention,
                newest=record.generation,
                pinned=pinned,
                now_us=now_us,
            )
            judgement = judge(view.generations(record.db_id, limit=1_000_000), rule)
            expiring = [one.generation for one in judgement.expiring if one.document_stored]
            if len(expiring) < len(judgement.expiring):
                return expiring, now_us  # once its document is stored, it goes
            keep_us = (record.retention.keep_seconds or 0) * 1_000_000
            ends = (
                one.superseded_at_us + keep_us
                for one in judgement.kept
                if one.superseded_at_us is not None
            )
            # What is kept beyond its time is kept for another reason.
            return expiring, min((end for end in ends if end > now_us), default=float("inf"))

        expiring, due_at_us = await self._manifest.read_in_thread(decide)
        removed = await self._expiry.expire(record.db_id, expiring) if expiring else Removed()
        self._seen[record.db_id] = _Seen(
            generation=record.generation,
            retention=record.retention,
            pinned=pinned,
            due_at_us=due_at_us if removed.finished else now_us,
        )
        return removed

    def _changed(
        self, databases: list[DatabaseRecord], families: dict[int, tuple[object, ...]]
    ) -> list[int]:
        """Databases whose forks have changed since they were last looked at, and those above
        them; all of them the first time; deleted ones that something may have let go of.
        """
        parents = {
            record.db_id: record.forked_from.db_id
            for record in databases
            if record.forked_from is not None
        }
        changed: dict[int, None] = {}
        for record in databases:
            family = (record.state, *families.get(record.db_id, ()))
            if self._families.get(record.db_id) != family:
                self._families[record.db_id] = family
                db_id: int | None = record.db_id
                while db_id is not None and db_id not in changed:
                    changed[db_id] = None
                    db_id = parents.get(db_id)
        known = {record.db_id for record in databases}
        for gone in self._families.keys() - known:
            del self._families[gone]
            self._seen.pop(gone, None)
        return [db_id for db_id in changed if db_id in known]


def _load(
    view: ManifestView,
) -> tuple[
    list[DatabaseRecord], dict[int, tuple[object, ...]], set[int], dict[int, frozenset[int]]
]:
    """Every database; what says of its forks whether they may have let go of rows; those with
    jobs that have not ended; and the generations that snapshots pin.
    """
    databases = view.all_databases()
    states = {record.db_id: (record.state, record.generation) for record in databases}
    families: dict[int, tuple[object, ...]] = {}
    for fork in view.all_forks():
        member = (fork.child_db_id, states.get(fork.child_db_id))
        families[fork.db_id] = (*families.get(fork.db_id, ()), member)
    snapshots: dict[int, list[SnapshotRecord]] = {}
    for snapshot in view.all_snapshots():
        snapshots.setdefault(snapshot.db_id, []).append(snapshot)
    pinned = {db_id: pinned_generations(rows) for db_id, rows in snapshots.items()}
    return databases, families, {job.db_id for job in view.unfinished_jobs()}, pinned
