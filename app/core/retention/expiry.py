"""Takes generations out of a database, and with them the rows that only they had.

Invariants: I8: a row goes only while no retained generation, snapshot, fork or reader needs it;
decided over a view, and refused again inside the transaction where generations and forks are
concerned. Readers are of this process: a generation is closed to them before its row goes, and one
that is being read is left for a later round. Blobs are retired by the commit that removes their
last row (`stores/manifest/derived.py`).
Concurrency: one database at a time, under a lock; commits are small, so that others get between.
Cancellation, crash: after any commit. A generation may be gone and rows of it left: `sweep` looks
at every superseded row of a database and takes what nothing needs.
"""

import asyncio
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from app.core.base import failpoints
from app.core.base.errors import InvariantViolation
from app.core.base.events import Events
from app.core.retention.reachability import Readable, Row, removal, unneeded
from app.core.stores.manifest.errors import BatchRefused
from app.core.stores.manifest.lineage import ChunkRows, is_valid_at
from app.core.stores.manifest.ops import DeleteGeneration, ManifestBatch, Op, RemoveDatabase
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.manifest.view import ManifestView

CHUNKS_AT_ONCE = 100
GENERATIONS_AT_ONCE = 500


class ReaderPins(Protocol):
    """Generations that readers use now."""

    def generations(self, db_id: int) -> frozenset[int]: ...

    def is_pinned(self, db_id: int) -> bool: ...

    def close(self, db_id: int, generation: int) -> Callable[[], None] | None:
        """No reader may begin on it any more, until what is returned is called; None where one
        reads it.
        """
        ...


@dataclass(slots=True)
class Removed:
    generations: int = 0
    rows: int = 0
    retired_blobs: int = 0
    retired_bytes: int = 0
    finished: bool = True
    """False: something was left that a later round has to look at."""

    def add(self, other: "Removed") -> None:
        self.generations += other.generations
        self.rows += other.rows
        self.retired_blobs += other.retired_blobs
        self.retired_bytes += other.retired_bytes
        self.finished &= other.finished


class Expiry:
    def __init__(self, manifest: ManifestStore, pins: ReaderPins, *, events: Events) -> None:
        self._manifest = manifest
        self._pins = pins
        self._events = events
        self._lock = asyncio.Lock()

    async def expire(self, db_id: int, generations: Iterable[int]) -> Removed:
        """Those of `generations` that nobody reads now, and what only they needed."""
        async with self._lock:
            return await self._expire(db_id, sorted(generations))

    async def sweep(self, db_id: int) -> Removed:
        """Every row that was superseded and that nothing needs."""
        async with self._lock:
            chunks = await self._manifest.read_in_thread(
                lambda view: view.superseded_chunks(db_id, behind=0, through=None)
            )
            return await self._guarded(self._remove(db_id, chunks, ()), db_id)

    async def prune(self, db_id: int) -> Removed:
        """All of a deleted database that no fork and no reader needs; its descriptor with the
        last of it.
        """
        async with self._lock:
            return await self._guarded(self._prune(db_id), db_id)

    # --- one database, under the lock ---------------------------------------------------------

    async def _expire(self, db_id: int, generations: Sequence[int]) -> Removed:
        removed = Removed()
        for start in range(0, len(generations), GENERATIONS_AT_ONCE):
            wanted = generations[start : start + GENERATIONS_AT_ONCE]
            closed = {
                generation: reopen
                for generation in wanted
                if (reopen := self._pins.close(db_id, generation)) is not None
            }
            removed.finished &= len(closed) == len(wanted)
            if not closed:
                continue
            try:
                removed.add(await self._guarded(self._take_out(db_id, sorted(closed)), db_id))
            finally:
                for reopen in closed.values():
                    reopen()
        return removed

    async def _take_out(self, db_id: int, expiring: Sequence[int]) -> Removed:
        def affected(view: ManifestView) -> list[int]:
            """The chunks with a row that ended in a gap which the expiring ones leave."""
            retained = _generations(view, db_id, without=set(expiring))
            chunks: dict[int, None] = {}
            for behind, through in gaps(retained, expiring):
                found = view.superseded_chunks(db_id, behind=behind, through=through)
                chunks.update(dict.fromkeys(found))
            return list(chunks)

        chunks = await self._manifest.read_in_thread(affected)
        return await self._remove(db_id, chunks, expiring)

    async def _remove(self, db_id: int, chunks: Sequence[int], expiring: Sequence[int]) -> Removed:
        removed = Removed()
        generations = tuple(
            DeleteGeneration(db_id=db_id, generation=generation) for generation in expiring
        )
        pieces = range(0, len(chunks), CHUNKS_AT_ONCE)
        for start in pieces or (0,):
            piece = chunks[start : start + CHUNKS_AT_ONCE]
            rows = await self._unneeded(db_id, piece, expiring) if piece else []
            ops: tuple[Op, ...] = (*generations, *map(removal, rows))
            if not ops:
                continue
            failpoints.fp("collect.before_expire")
            receipt = await self._manifest.commit(
                ManifestBatch(ops=ops, reason="collection.expired", db_id=db_id)
            )
            failpoints.fp("collect.after_expire")
            removed.add(
                Removed(
                    generations=len(generations),
                    rows=len(rows),
                    retired_blobs=receipt.retired_blobs,
                    retired_bytes=receipt.retired_bytes,
                )
            )
            generations = ()
        if removed.generations or removed.rows:
            self._events.info(
                "collection.expired", db_id=db_id, generations=removed.generations,
                rows=removed.rows, blobs=removed.retired_blobs, bytes=removed.retired_bytes,
            )  # fmt: skip
        return removed

    async def _prune(self, db_id: int) -> Removed:
        with self._manifest.read() as view:
            database = view.database(db_id)
            if database is None:
                return Removed()
            generations = _generations(view, db_id, without=set())
        if database.state != "tombstoned":
            raise InvariantViolation("Only a deleted database is pruned.", db_id=db_id)
        removed = await self._expire(db_id, generations)
        after = -1
        while chunks := await self._manifest.read_in_thread(
            partial(_chunks_above, db_id=db_id, after=after)
        ):
            removed.add(await self._remove(db_id, chunks, ()))
            after = chunks[-1]
        with self._manifest.read() as view:
            left = view.holds_anything_of(db_id)
        if not left:  # what forks need stays, until something about them changes
            await self._manifest.commit(
                ManifestBatch(
                    ops=(RemoveDatabase(db_id=db_id),), reason="database.removed", db_id=db_id
                )
            )
            self._events.info("database.removed", db_id=db_id)
        return removed

    async def _unneeded(
        self, db_id: int, chunks: Sequence[int], expiring: Sequence[int]
    ) -> list[Row]:
        """Of these chunks. What readers hold is looked at on the loop, where they begin."""
        read = self._pins.generations(db_id)
        with self._manifest.read() as view:
            read_forks = self._read_forks(view, db_id)

        def look(view: ManifestView) -> list[Row]:
            database = view.database(db_id)
            if database is None:
                return []
            deleted = database.state == "tombstoned"
            rule = Readable(
                generations=sorted(read)
                if deleted
                else _generations(view, db_id, without=set(expiring)),
                newest=None if deleted else database.generation,
                is_inherited=_Inherited(view, db_id, read_forks),
            )
            return [
                row
                for chunk_id in chunks
                for row in unneeded(_own_rows(view, db_id, chunk_id), rule)
            ]

        return await self._manifest.read_in_thread(look)

    def _read_forks(self, view: ManifestView, db_id: int) -> frozenset[int]:
        """The databases forked from this one, and from those, that someone reads."""
        found: set[int] = set()
        for fork in view.forks_of(db_id):
            if self._pins.is_pinned(fork.child_db_id):
                found.add(fork.child_db_id)
            found |= self._read_forks(view, fork.child_db_id)
        return frozenset(found)

    async def _guarded(self, work: Coroutine[Any, Any, Removed], db_id: int) -> Removed:
        """What the manifest refuses is left for a later round."""
        try:
            return await work
        except (BatchRefused, InvariantViolation) as refusal:
            self._events.warning("collection.refused", db_id=db_id, detail=str(refusal))
            return Removed(finished=False)


def gaps(retained: Sequence[int], expiring: Sequence[int]) -> list[tuple[int, int | None]]:
    """Between which retained generations the expiring ones lie, as (behind, through]: a row that
    ended there is valid at no retained generation behind its beginning. Both ascending. Pure.
    """
    found: dict[tuple[int, int | None], None] = {}
    for generation in expiring:
        below, above = bisect_left(retained, generation), bisect_right(retained, generation)
        behind = retained[below - 1] if below else 0
        through = retained[above] if above < len(retained) else None
        found[behind, through] = None
    return list(found)


def _generations(view: ManifestView, db_id: int, *, without: set[int]) -> list[int]:
    return [one for one in view.generation_numbers(db_id) if one not in without]


def _chunks_above(view: ManifestView, *, db_id: int, after: int) -> list[int]:
    return view.chunk_ids(db_id, after=after, limit=10 * CHUNKS_AT_ONCE)


def _own_rows(view: ManifestView, db_id: int, chunk_id: int) -> ChunkRows:
    return ChunkRows(
        tuple(view.chunk_rows_of(db_id, chunk_id)), tuple(view.delta_rows_of(db_id, chunk_id))
    )


class _Inherited:
    """Whether a fork falls through to a row: one that lives, or a deleted one under a reader."""

    def __init__(self, view: ManifestView, db_id: int, read: frozenset[int]) -> None:
        self._view = view
        self._forks = view.forks_of(db_id)
        self._read = read

    def __call__(self, row: Row) -> bool:
        if not self._forks:
            return False
        return bool(self._view.inheriting_forks(row)) or any(
            is_valid_at(row, fork.generation) and self._is_read(fork.child_db_id, row.chunk_id)
            for fork in self._forks
            if self._read
        )

    def _is_read(self, db_id: int, chunk_id: int) -> bool:
        if self._view.chunk_rows_of(db_id, chunk_id):
            return False
        return db_id in self._read or any(
            self._is_read(fork.child_db_id, chunk_id) for fork in self._view.forks_of(db_id)
        )
