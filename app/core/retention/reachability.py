"""Which rows of a chunk nothing needs any more: pure, a chunk at a time.

A row is needed while it is valid at a generation that someone can read, and a base also while a
delta that is needed is encoded against it. Everything else is judged per row, never by whole
generations of another database: what a fork falls through to is asked row by row.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from app.core.stores.manifest.lineage import ChunkRows
from app.core.stores.manifest.ops import DeleteChunk, DeleteChunkDelta, Op
from app.core.stores.manifest.records import ChunkDeltaRecord, ChunkRecord

Row = ChunkRecord | ChunkDeltaRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Readable:
    """What can be read of a database: its own generations, and what forks see of its rows."""

    generations: Sequence[int]
    """Ascending: those retained, those that readers hold, those at which a fork that is being
    read was made."""
    newest: int | None
    """None: it is deleted, so that even rows which nothing superseded may go."""
    is_inherited: Callable[[Row], bool] = lambda _: False
    """Whether a fork falls through to the row."""

    def needs(self, row: Row) -> bool:
        at = bisect_left(self.generations, row.generation)
        if at < len(self.generations) and (
            row.superseded_at is None or self.generations[at] < row.superseded_at
        ):
            return True
        if self.newest is not None and row.superseded_at is None:
            return True
        return self.is_inherited(row)


def unneeded(rows: ChunkRows, readable: Readable) -> list[Row]:
    """Deltas before bases, as they have to go."""
    kept = [delta for delta in rows.deltas if readable.needs(delta)]
    encoded_against = {delta.base_key for delta in kept if delta.base_key}
    gone: list[Row] = [delta for delta in rows.deltas if delta not in kept]
    gone += [
        base
        for base in rows.bases
        if not (base.blob is not None and base.blob.key in encoded_against)
        and not readable.needs(base)
    ]
    return gone


def removal(row: Row) -> Op:
    kind = DeleteChunk if isinstance(row, ChunkRecord) else DeleteChunkDelta
    return kind(db_id=row.db_id, chunk_id=row.chunk_id, generation=row.generation)
