"""Frees WAL that a durable generation covers (I4), or of which a truncation left nothing.

Order: the file, then its row. A crash between leaves such a row without a file, which recovery
allows and the next release removes. Segments that a reader pins stay for a later call.
Concurrency: a database's releases follow one another, so that none removes a row twice.
"""

import asyncio
from weakref import WeakValueDictionary

from app.core.base.errors import BopError
from app.core.base.events import Events
from app.core.stores.manifest.ops import ManifestBatch, Op, RemoveSegment
from app.core.stores.manifest.records import WalSegmentRecord
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.manifest.view import ManifestView
from app.core.stores.wal.store import WalStore


class WalRelease:
    def __init__(self, manifest: ManifestStore, wal: WalStore, *, events: Events) -> None:
        self._manifest = manifest
        self._wal = wal
        self._events = events
        self._turns: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()

    async def release(self, db_id: int) -> int:
        """Removes what may go of one database; returns the number of segments."""
        async with self._turns.setdefault(db_id, asyncio.Lock()):
            return await self._release(db_id)

    async def _release(self, db_id: int) -> int:
        with self._manifest.read() as view:
            covered = [row.segment_id for row in view.segments(db_id) if _may_go(view, row)]
        if not covered:
            return 0
        removed = await self._wal.log(db_id).remove(covered)
        if removed:
            ops: tuple[Op, ...] = tuple(
                RemoveSegment(db_id=db_id, segment_id=segment_id) for segment_id in removed
            )
            await self._manifest.commit(ManifestBatch(ops=ops, reason="wal.released", db_id=db_id))
            self._events.info("wal.released", db_id=db_id, segments=len(removed))
        return len(removed)

    async def release_all(self) -> None:
        """For start and for the sweep of what readers had pinned. What one database meets is raised
        behind the others.
        """
        failed: BopError | None = None
        with self._manifest.read() as view:
            waiting = {
                row.db_id for row in view.all_segments() if row.state in {"checkpointed", "dropped"}
            }
        for db_id in sorted(waiting):
            try:
                await self.release(db_id)
            except BopError as error:
                failed = error
        if failed is not None:
            raise failed


def _may_go(view: ManifestView, row: WalSegmentRecord) -> bool:
    if row.state != "checkpointed" or row.covering_generation is None:
        return row.state == "dropped"
    generation = view.generation(row.db_id, row.covering_generation)
    return generation is None or generation.document_stored  # one that expired had been stored
