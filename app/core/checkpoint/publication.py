"""The one batch that publishes a generation (I3): pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from app.core.engines.base import CheckpointPlan
from app.core.stores.manifest.ops import (
    CoverSegment,
    ExpectEpoch,
    ExpectGeneration,
    ExpectLeases,
    Op,
    Precondition,
    PublishGeneration,
    ReleaseLeases,
    RememberAppends,
    UpsertChunk,
)
from app.core.stores.manifest.records import ChunkRecord, GenerationRecord
from app.core.stores.manifest.records import RememberedAppend as RememberedRow
from app.core.stores.wal.remembered import RememberedAppend


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    ops: tuple[Op, ...]
    preconditions: tuple[Precondition, ...]


def publication_batch(
    plan: CheckpointPlan,
    *,
    rows: Sequence[ChunkRecord],
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
        base_chunks=len(rows),
        delta_chunks=0,
        bytes_uploaded=sum(row.blob.bytes for row in rows if row.blob is not None),
        document_key=document_key,
    )
    ops: list[Op] = [UpsertChunk(row=row) for row in rows]
    for action in plan.actions:
        ops.append(
            CoverSegment(
                db_id=plan.db_id,
                segment_id=action.segment_id,
                generation=plan.target_generation,
            )
        )
        if appends := remembered.get(action.segment_id):
            ops.append(
                RememberAppends(
                    db_id=plan.db_id,
                    segment_id=action.segment_id,
                    appends=tuple(_row(append) for append in appends),
                )
            )
    ops.append(PublishGeneration(row=generation, next_chunk_id=plan.next_chunk_id))
    ops.append(ReleaseLeases(job_id=job_id))
    return Publication(
        ops=tuple(ops),
        preconditions=(
            ExpectGeneration(db_id=plan.db_id, generation=plan.expected_generation),
            ExpectLeases(db_id=plan.db_id, job_id=job_id, tokens=tokens),
            ExpectEpoch(epoch=epoch),
        ),
    )


def _row(append: RememberedAppend) -> RememberedRow:
    return RememberedRow(
        key_hash=append.key_hash,
        body_hash=append.body_hash,
        first_lsn=append.first_lsn,
        last_lsn=append.last_lsn,
        payload_bytes=append.payload_bytes,
        appended_at_us=append.appended_at_us,
    )
