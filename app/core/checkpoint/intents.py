"""What a checkpoint has made, or is about to: the rows it will publish and their blobs. Pure."""

from collections.abc import Iterable, Sequence

import msgspec

from app.core.base.errors import InvariantViolation
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


def marked_uploaded(intents: Sequence[BlobIntent], done: set[int]) -> tuple[BlobIntent, ...]:
    """`done` are chunk ids."""
    return tuple(
        msgspec.structs.replace(intent, uploaded=True)
        if row_of(intent).chunk_id in done
        else intent
        for intent in intents
    )


def all_uploaded(intents: Sequence[BlobIntent]) -> bool:
    return all(intent.uploaded for intent in intents)


def progress_of(intents: Sequence[BlobIntent], *, total_bytes: int) -> Progress:
    uploaded = [row_of(intent) for intent in intents if intent.uploaded]
    return Progress(
        staged_chunks=len(intents),
        uploaded_blobs=len(blobs_of(uploaded)),
        total_chunks=len(intents),
        uploaded_bytes=blob_bytes(uploaded),
        total_bytes=total_bytes,
    )
