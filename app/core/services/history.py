"""What was published and when, and how long it is kept."""

import asyncio
from collections.abc import Callable, Iterator

from app.core.base.events import Events
from app.core.retention.pins import pinned_generations
from app.core.retention.policy import RetentionRule
from app.core.services.directory import DatabaseDirectory
from app.core.stores.manifest.ops import ManifestBatch, SetRetention
from app.core.stores.manifest.records import DatabaseRecord, GenerationRecord, Retention
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.manifest.view import ManifestView

_ROWS_AT_ONCE = 1000


class History:
    def __init__(
        self,
        manifest: ManifestStore,
        directory: DatabaseDirectory,
        *,
        now_us: Callable[[], int],
        events: Events,
    ) -> None:
        """`now_us` is the time by which generations expire."""
        self._manifest = manifest
        self._directory = directory
        self._now_us = now_us
        self._events = events
        self._turn = asyncio.Lock()

    def generations(
        self, tenant: str, name: str, *, limit: int, after: int | None, expiring: bool = False
    ) -> list[GenerationRecord]:
        """Oldest first, from the one behind `after`; with `expiring` only those that the next
        collection takes. Raises DatabaseNotFound.
        """
        record = self._directory.read(tenant, name)
        with self._manifest.read() as view:
            if not expiring:
                return view.generations(record.db_id, after=after, limit=limit)
            rule = rule_of(view, record, now_us=self._now_us())
            found: list[GenerationRecord] = []
            for generation in _generations(view, record.db_id, after=after):
                if not rule.keeps(generation):
                    found.append(generation)
                    if len(found) == limit:
                        break
            return found

    async def set_retention(
        self, tenant: str, name: str, change: Callable[[Retention], Retention]
    ) -> None:
        """Holds for collections from now on. Raises DatabaseNotFound."""
        async with self._turn:  # a change is of what is there: two at once must not undo each other
            record = self._directory.read(tenant, name)
            retention = change(record.retention)
            if retention == record.retention:
                return
            await self._manifest.commit(
                ManifestBatch(
                    ops=(SetRetention(db_id=record.db_id, retention=retention),),
                    reason="database.retention_set",
                    db_id=record.db_id,
                )
            )
        self._events.info(
            "database.retention_set", tenant=tenant, database=name,
            keep_generations=retention.keep_generations, keep_seconds=retention.keep_seconds,
            minimum_generations=retention.minimum_generations,
        )  # fmt: skip


def rule_of(view: ManifestView, record: DatabaseRecord, *, now_us: int) -> RetentionRule:
    return RetentionRule(
        retention=record.retention,
        newest=record.generation,
        pinned=pinned_generations(view.snapshots(record.db_id)),
        now_us=now_us,
    )


def earliest_kept(view: ManifestView, record: DatabaseRecord, *, now_us: int) -> int | None:
    """The oldest generation that is there and that no rule is about to drop."""
    rule = rule_of(view, record, now_us=now_us)
    kept = (one.generation for one in _generations(view, record.db_id) if rule.keeps(one))
    return next(kept, None)


def _generations(
    view: ManifestView, db_id: int, after: int | None = None
) -> Iterator[GenerationRecord]:
    """Ascending, a few at first: mostly the oldest decides."""
    limit = 4
    while True:
        records = view.generations(db_id, after=after, limit=limit)
        yield from records
        if len(records) < limit:
            return
        after, limit = records[-1].generation, _ROWS_AT_ONCE
