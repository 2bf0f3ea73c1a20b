"""append_only: which small chunks become one. Pure.

Slow logs make small chunks, one a checkpoint. Adjacent ones are merged in tiers, as a
log-structured store does it: of chunks below a tier's size a run is taken as soon as together they
reach it. So every byte of the run rises by at least a tier, and is rewritten at most once a tier.
Chunks that are tiny even together are merged by their number; as each has an overhead of its own,
that too ends after a few times.

Only chunks of the database's own that follow one another without a gap are merged, and none that a
tail truncation cut: within a segment LSNs have no holes.
"""

from collections.abc import Iterator, Sequence

from app.core.engines.base import CheckpointPlan, MergeChunks, MergeSource
from app.core.stores.manifest.records import ChunkRecord, DatabaseRecord

TIER_DIVISORS = (512, 64, 8, 2)
"""Of `chunk_bytes`: what a merge reaches at least. From half a chunk on it is left alone."""
RUN_LENGTH_MAX = 128
"""So many chunks are merged even if they do not reach the lowest tier."""


def plan_coalescing(
    database: DatabaseRecord,
    chunks: Sequence[ChunkRecord],
    *,
    published_lsn: int,
    checkpoint_id: str,
    epoch: int,
) -> CheckpointPlan | None:
    """`chunks` are the newest generation's in LSN order, `published_lsn` is its last LSN. None: no
    run is worth it. One run at a time, the smallest tier and the oldest first.
    """
    run = pick_run(chunks, db_id=database.db_id, chunk_bytes=database.chunk_bytes)
    if not run:
        return None
    return CheckpointPlan(
        engine="append_only",
        db_id=database.db_id,
        checkpoint_id=checkpoint_id,
        epoch=epoch,
        expected_generation=database.generation,
        first_lsn=published_lsn + 1,
        last_lsn=published_lsn,
        page_count=0,
        next_chunk_id=database.next_chunk_id,
        codec=database.compression,
        actions=(merge_of(run),),
        wal_position=database.wal_position,
    )


def pick_run(
    chunks: Sequence[ChunkRecord], *, db_id: int, chunk_bytes: int
) -> Sequence[ChunkRecord]:
    """The chunks to merge; empty if there are none."""
    neighbours = list(_neighbours(chunks, db_id=db_id))
    for tier, divisor in enumerate(TIER_DIVISORS):
        reach = chunk_bytes // divisor
        length_max = RUN_LENGTH_MAX if tier == 0 else None
        for run in neighbours:
            if found := _first_run(run, reach=reach, length_max=length_max):
                return found
    return ()


def merge_of(run: Sequence[ChunkRecord]) -> MergeChunks:
    """The merged chunk takes the first one's id, so that ids stay in LSN order."""
    return MergeChunks(
        chunk_id=run[0].chunk_id,
        sources=tuple(
            MergeSource(chunk_id=row.chunk_id, generation=row.generation, bytes=blob.bytes)
            for row in run
            if (blob := row.blob) is not None
        ),
        first_lsn=run[0].first,
        last_lsn=run[-1].last,
        line_safe=all(row.line_safe for row in run),
        segment_bytes=sum(row.logical_bytes for row in run),
    )


def _neighbours(chunks: Sequence[ChunkRecord], *, db_id: int) -> Iterator[list[ChunkRecord]]:
    """Runs of chunks that could be one, whatever their sizes. What a fork has of its parent stays:
    merging it would copy it.
    """
    run: list[ChunkRecord] = []
    for row in chunks:
        own = (row.origin_db_id or row.db_id) == db_id
        is_whole = own and row.blob is not None and row.visible_last == row.last
        if run and not (is_whole and row.first == run[-1].last + 1):
            yield run
            run = []
        if is_whole:
            run.append(row)
    if run:
        yield run


def _first_run(
    neighbours: Sequence[ChunkRecord], *, reach: int, length_max: int | None
) -> Sequence[ChunkRecord]:
    """The oldest chunks smaller than `reach` that follow one another and reach it together."""
    start, total = 0, 0
    for position, row in enumerate(neighbours):
        if row.logical_bytes >= reach:
            start, total = position + 1, 0
            continue
        total += row.logical_bytes
        length = position + 1 - start
        if length >= 2 and (total >= reach or length == length_max):
            return neighbours[start : position + 1]
    return ()
