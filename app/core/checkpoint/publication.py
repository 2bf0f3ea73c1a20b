"""The one batch that publishes a generation (I3): pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from app.core.checkpoint.intents import StagedRow, blob_bytes
from app.core.engines.base import (
    CheckpointPlan,
    ChunkAction,
    CreateDelta,
    Drop,
    MergeChunks,
    RewriteBase,
)
from app.core.stores.manifest.conditions import (
    ExpectEpoch,
    ExpectGeneration,
    ExpectLeases,
    Precondition,
)
from app.core.stores.manifest.ops import (
    CoverSegment,
    Op,
    PublishGeneration,
    ReleaseLeases,
    RememberAppends,
    SupersedeChunk,
    SupersedeChunkDelta,
    UpsertChunk,
    UpsertChunkDelta,
)
from app.core.stores.manifest.records import ChunkDeltaRecord, ChunkRecord, GenerationRecord
from app.core.stores.manifest.records import RememberedAppend as RememberedRow
from app.core.stores.wal.remembered import RememberedAppend


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    ops: tuple[Op, ...]
    preconditions: tuple[Precondition, ...]


def publication_batch(
    plan: CheckpointPlan,
    *,
    rows: Sequence[StagedRow],
    committed_at_us: int,
    document_key: str,
    job_id: str,
    tokens: tuple[tuple[int, int], ...],
    epoch: int,
    remembered: Mapping[int, Sequence[RememberedAppend]],
) -> Publication:
    """Catalogue, WAL catalogue, generation, remembered appends and lease release, together with
    what must still hold inside the transaction (I6).
    """
    generation = GenerationRecord(
        db_id=plan.db_id,
        generation=plan.target_generation,
        checkpoint_id=plan.checkpoint_id,
        first_lsn=plan.first_lsn,
        last_lsn=plan.last_lsn,
        page_count=plan.page_count,
        committed_at_us=committed_at_us,
        base_chunks=sum(isinstance(row, ChunkRecord) and row.blob is not None for row in rows),
        delta_chunks=sum(isinstance(row, ChunkDeltaRecord) for row in rows),
        bytes_uploaded=blob_bytes(rows),
        document_key=document_key,
    )
    ops: list[Op] = []
    for action in plan.actions:
        ops += _superseded(plan, action)
    for row in rows:
        match row:
            case ChunkRecord():
                ops.append(UpsertChunk(row=row))
            case ChunkDeltaRecord():
                ops.append(UpsertChunkDelta(row=row))
    for segment_id in plan.segment_ids:
        ops.append(
            CoverSegment(db_id=plan.db_id, segment_id=segment_id, generation=plan.target_generation)
        )
        ops += remembered_ops(plan.db_id, segment_id, remembered.get(segment_id, ()))
    ops.append(
        PublishGeneration(
            row=generation, next_chunk_id=plan.next_chunk_id, wal_position=plan.wal_position
        )
    )
    ops.append(ReleaseLeases(job_id=job_id))
    return Publication(
        ops=tuple(ops),
        preconditions=(
            ExpectGeneration(db_id=plan.db_id, generation=plan.expected_generation),
            ExpectLeases(db_id=plan.db_id, job_id=job_id, tokens=tokens),
            ExpectEpoch(epoch=epoch),
        ),
    )


def _superseded(plan: CheckpointPlan, action: ChunkAction) -> list[Op]:
    """The rows whose time ends with the new generation."""
    at, db_id, chunk_id = plan.target_generation, plan.db_id, action.chunk_id
    base: int | None = None
    deltas: tuple[int, ...] = ()
    match action:
        case RewriteBase() | Drop():
            base, deltas = action.supersedes_base, action.supersedes_deltas
        case CreateDelta():
            deltas = action.merges
        case MergeChunks():
            return [
                SupersedeChunk(
                    db_id=db_id, chunk_id=one.chunk_id, generation=one.generation, superseded_at=at
                )
                for one in action.sources
            ]
        case _:
            pass
    ops: list[Op] = [
        SupersedeChunkDelta(db_id=db_id, chunk_id=chunk_id, generation=one, superseded_at=at)
        for one in deltas
    ]
    if base is not None:
        ops.append(
            SupersedeChunk(db_id=db_id, chunk_id=chunk_id, generation=base, superseded_at=at)
        )
    return ops


def remembered_ops(
    db_id: int, segment_id: int, appends: Sequence[RememberedAppend]
) -> tuple[Op, ...]:
    """Keeps the answers to a segment's idempotent appends when the segment goes."""
    if not appends:
        return ()
    rows = tuple(_row(append) for append in appends)
    return (RememberAppends(db_id=db_id, segment_id=segment_id, appends=rows),)


def _row(append: RememberedAppend) -> RememberedRow:
    return RememberedRow(
        key_hash=append.key_hash,
        body_hash=append.body_hash,
        first_lsn=append.first_lsn,
        last_lsn=append.last_lsn,
        payload_bytes=append.payload_bytes,
        appended_at_us=append.appended_at_us,
    )
