"""What a checkpoint has made, or is about to: the rows it will publish and their blobs. Pure."""

from collections.abc import Iterable, Sequence

from app.core.base.errors import InvariantViolation
from app.core.engines.base import CheckpointPlan
from app.core.stores.manifest.records import (
    BlobIntent,
    BlobRef,
    ChunkDeltaRecord,
    ChunkRecord,
    Progress,
)

StagedRow = ChunkRecord | ChunkDeltaRecord


def staged_name(chunk_id: int) -> str:
    """A job makes at most one blob of a chunk."""
    return f"chunk-{chunk_id}.blob"


def intent_of(row: StagedRow, *, uploaded: bool = False) -> BlobIntent:
    """A drop has no blob: nothing of it is left to upload."""
    uploaded = uploaded or row.blob is None
    match row:
        case ChunkRecord():
            return BlobIntent(row=row, uploaded=uploaded)
        case ChunkDeltaRecord():
            return BlobIntent(row=None, delta=row, uploaded=uploaded)


def row_of(intent: BlobIntent) -> StagedRow:
    row = intent.delta if intent.row is None else intent.row
    if row is None:
        raise InvariantViolation("an intent without a row")
    return row


def rows_of(intents: Iterable[BlobIntent]) -> tuple[StagedRow, ...]:
    return tuple(row_of(intent) for intent in intents)


def blobs_of(rows: Iterable[StagedRow]) -> tuple[BlobRef, ...]:
    return tuple(row.blob for row in rows if row.blob is not None)


def blob_bytes(rows: Iterable[StagedRow]) -> int:
    return sum(blob.bytes for blob in blobs_of(rows))


def all_made(intents: Sequence[BlobIntent], plan: CheckpointPlan) -> bool:
    """Whether every blob of the plan is confirmed."""
    return len(intents) == len(plan.actions) and all(intent.uploaded for intent in intents)


def progress_of(intents: Sequence[BlobIntent], *, plan: CheckpointPlan) -> Progress:
    """Until the last chunk is staged, the bytes in all are the plan's upper bound."""
    uploaded = [row_of(intent) for intent in intents if intent.uploaded]
    all_staged = len(intents) == len(plan.actions)
    return Progress(
        staged_chunks=len(intents),
        uploaded_blobs=len(blobs_of(uploaded)),
        total_chunks=len(plan.actions),
        uploaded_bytes=blob_bytes(uploaded),
        total_bytes=blob_bytes(rows_of(intents)) if all_staged else plan.staged_bytes_max,
    )
