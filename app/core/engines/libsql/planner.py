"""libsql: what becomes of each chunk whose pages changed.

No base yet, more than half of the chunk dirty, or a delta as large as `delta_bytes_max`: the chunk
is rewritten. Otherwise it gets a delta. A chain that would grow beyond `delta_count_max` becomes
one merged delta while that stays within the same limits, else a new base. A chunk beyond the
database's end is dropped.
"""

from pyroaring import BitMap

from app.core.base.errors import InvariantViolation
from app.core.engines.base import (
    CheckpointPlan,
    ChunkState,
    CreateDelta,
    DeltaLimits,
    Drop,
    PageAction,
    PlannerContext,
    RewriteBase,
)
from app.core.formats.page_blob import page_blob_bytes_max
from app.core.stores.manifest.records import DatabaseRecord


def pages_per_chunk(database: DatabaseRecord) -> int:
    return database.chunk_bytes // database.page_size


def plan_checkpoint(context: PlannerContext) -> CheckpointPlan | None:
    """Pure; None if no segment waits. Frames that change no page still make a generation: their
    LSNs are in it, and their WAL may go.
    """
    database, segments, changes = context.database, context.segments, context.pages
    if not segments:
        return None
    if changes is None or changes.last_lsn != segments[-1].last_lsn:
        raise InvariantViolation("sealed WAL without its changes", db_id=database.db_id)
    actions = tuple(
        action
        for chunk in sorted(changes.chunks, key=lambda chunk: chunk.chunk_id)
        if (action := plan_chunk(database, chunk, changes.page_count, context.limits)) is not None
    )
    chunk_count = -(-changes.page_count // pages_per_chunk(database))
    return CheckpointPlan(
        engine="libsql",
        db_id=database.db_id,
        checkpoint_id=context.checkpoint_id,
        epoch=context.epoch,
        expected_generation=database.generation,
        first_lsn=segments[0].first_lsn,
        last_lsn=changes.last_lsn,
        page_count=changes.page_count,
        next_chunk_id=max(database.next_chunk_id, chunk_count),
        codec=database.compression,
        actions=actions,
        covered_segments=tuple(segment.segment_id for segment in segments),
        low_page_count=changes.low_page_count,
        bytes_dirtied=database.page_size
        * sum(len(BitMap.deserialize(chunk.dirty)) for chunk in changes.chunks),
        wal_position=changes.wal_position,
    )


def plan_chunk(
    database: DatabaseRecord, chunk: ChunkState, page_count: int, limits: DeltaLimits
) -> PageAction | None:
    """None: nothing changes about the chunk."""
    size, first_page = database.page_size, chunk.chunk_id * pages_per_chunk(database) + 1
    last_page = min(first_page + pages_per_chunk(database) - 1, page_count)
    supersedes = None if chunk.base is None else chunk.base.generation
    generations = tuple(delta.generation for delta in chunk.deltas)
    if last_page < first_page:
        if chunk.base is None or chunk.base.blob is None:
            return None  # there is nothing of it
        return Drop(
            chunk_id=chunk.chunk_id,
            first_page=first_page,
            supersedes_base=supersedes,
            supersedes_deltas=generations,
        )
    dirty = BitMap.deserialize(chunk.dirty)
    if not dirty:
        return None
    merges: tuple[int, ...] = ()
    delta_bytes = chunk.delta_bytes
    if len(chunk.deltas) >= limits.delta_count_max:
        merges = generations
        delta_bytes += sum(delta.blob.bytes for delta in chunk.deltas)
        for delta in chunk.deltas:
            dirty |= BitMap.deserialize(delta.pages)
        dirty &= BitMap(range(first_page, last_page + 1))
    pages = last_page - first_page + 1
    worth_it = (
        limits.enabled
        and len(dirty) <= limits.delta_dirty_ratio_max * pages
        and delta_bytes < limits.delta_bytes_max
        and not (merges and limits.coalesce == "rewrite")
    )
    if chunk.base is None or chunk.base.blob is None or not worth_it:
        return RewriteBase(
            chunk_id=chunk.chunk_id,
            first_page=first_page,
            last_page=last_page,
            supersedes_base=supersedes,
            supersedes_deltas=generations,
            staged_bytes_max=page_blob_bytes_max(pages, page_size=size),
        )
    return CreateDelta(
        chunk_id=chunk.chunk_id,
        delta_id=max((delta.delta_id for delta in chunk.deltas), default=0) + 1,
        pages=dirty.serialize(),
        page_count=len(dirty),
        base_generation=chunk.base.generation,
        base_key=chunk.base.blob.key if chunk.base_at_hand else "",
        merges=merges,
        chain_length=1 if merges else len(chunk.deltas) + 1,
        staged_bytes_max=page_blob_bytes_max(len(dirty), page_size=size),
    )
