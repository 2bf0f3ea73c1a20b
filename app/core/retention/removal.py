"""Takes a deleted database apart: its WAL, then its rows, at last its descriptor.

Invariants: only of a tombstoned database. I8: rows that forks or readers need stay, as in
`expiry.py`. Segment rows go before their files, so that a crash between leaves files that recovery
removes, and never rows whose WAL would count as lost.
Concurrency: a database is taken apart by one at a time; one that waits for its readers holds up no
other. Cancellation, crash: any step may be done again.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol
from weakref import WeakValueDictionary

from app.core.base import failpoints
from app.core.base.clock import Clock
from app.core.base.errors import DatabaseNotFound
from app.core.retention.expiry import Expiry, Removed
from app.core.stores.manifest.ops import ForgetAppends, ManifestBatch, Op, RemoveSegment
from app.core.stores.manifest.store import ManifestStore

READERS_SECONDS_MAX = 30.0
_LOOK_SECONDS = 0.05


class Log(Protocol):
    @property
    def is_pinned(self) -> bool: ...


class Wal(Protocol):
    def log(self, db_id: int) -> Log: ...

    async def drop_log(self, db_id: int) -> None: ...


class DatabaseRemoval:
    def __init__(self, manifest: ManifestStore, wal: Wal, expiry: Expiry, *, clock: Clock) -> None:
        self._manifest = manifest
        self._wal = wal
        self._expiry = expiry
        self._clock = clock
        self._turns: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()

    async def remove(self, db_id: int, *, touch: Callable[[], None] = lambda: None) -> Removed:
        """All of it that nobody needs any more."""
        async with self._turns.setdefault(db_id, asyncio.Lock()):
            await self._remove_wal(db_id)
        touch()
        failpoints.fp("collect.before_prune")
        removed = await self._expiry.prune(db_id)
        failpoints.fp("collect.after_prune")
        return removed

    async def _remove_wal(self, db_id: int) -> None:
        await self._wait_for_readers(db_id)
        while True:
            with self._manifest.read() as view:
                segments = view.segments(db_id)
                remembered = view.remembered_appends(db_id)
            ops: list[Op] = [
                RemoveSegment(db_id=db_id, segment_id=row.segment_id) for row in segments
            ]
            ops += [ForgetAppends(db_id=db_id, segment_id=one) for one in remembered]
            if ops:
                await self._manifest.commit(
                    ManifestBatch(ops=tuple(ops), reason="database.wal_removed", db_id=db_id)
                )
            failpoints.fp("collect.before_wal_removal")
            await self._wal.drop_log(db_id)
            failpoints.fp("collect.after_wal_removal")
            if not ops:  # an append that was under way may have made a segment once more
                return

    async def _wait_for_readers(self, db_id: int) -> None:
        """Of the WAL. Who still reads after this long loses its stream."""
        deadline = self._clock.monotonic() + READERS_SECONDS_MAX
        try:
            log = self._wal.log(db_id)
        except DatabaseNotFound:
            return
        while log.is_pinned and self._clock.monotonic() < deadline:
            await self._clock.sleep(_LOOK_SECONDS)
