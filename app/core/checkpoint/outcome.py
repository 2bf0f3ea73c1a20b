"""What a finished checkpoint tells its caller, and the metrics. Pure."""

from collections.abc import Sequence
from typing import Any

from app.core.checkpoint.intents import StagedRow, blob_bytes
from app.core.engines.base import (
    CheckpointPlan,
    ChunkAction,
    CreateDelta,
    Drop,
    MergeChunks,
    RewriteBase,
)

_NAMES: dict[type[ChunkAction], str] = {
    CreateDelta: "create_delta",
    RewriteBase: "rewrite_base",
    Drop: "drop",
    MergeChunks: "merge_chunks",
}


def result_of(plan: CheckpointPlan, rows: Sequence[StagedRow]) -> dict[str, Any]:
    """`rows` are those of the plan's actions, in their order."""
    return {
        "outcome": "published",
        "generation": plan.target_generation,
        "checkpoint_id": plan.checkpoint_id,
        "first_lsn": plan.first_lsn,
        "last_lsn": plan.last_lsn,
        "bytes_uploaded": blob_bytes(rows),
        "chunks": [
            {
                "chunk_id": row.chunk_id,
                "action": _NAMES.get(type(action), "seal_as_base"),
                "pages": row.count,
                "bytes": 0 if row.blob is None else row.blob.bytes,
                "blob_key": None if row.blob is None else row.blob.key,
            }
            for action, row in zip(plan.actions, rows, strict=True)
        ],
    }


def delta_chain_lengths(plan: CheckpointPlan) -> list[int]:
    """Deltas over the base of each chunk that was written."""
    lengths = []
    for action in plan.actions:
        match action:
            case CreateDelta():
                lengths.append(action.chain_length)
            case RewriteBase():
                lengths.append(0)
            case _:
                pass
    return lengths


def merged_chunks(plan: CheckpointPlan) -> int:
    """How many chunks became one."""
    return sum(len(one.sources) for one in plan.actions if isinstance(one, MergeChunks))
