"""What a manifest batch may do, and on what conditions.

A batch is applied whole or not at all, in one LMDB transaction that it may share with others.
Catalogue ops are also written to the change log, in order, in that same transaction.
"""

from typing import Any

import msgspec

from app.core.stores.manifest.admin_ops import (
    ADMIN_OPS,
    AdminOp,
    AppendAudit,
    DecideApproval,
    DeleteApproval,
    DeleteAudit,
    PutApproval,
    SettleAudit,
)
from app.core.stores.manifest.bookkeeping_ops import (
    AckCursor,
    AcquireLease,
    BookkeepingOp,
    DeleteCursor,
    DeleteIdempotency,
    DeleteJob,
    DoomBlob,
    DropForeignLeases,
    EnqueueJob,
    ForgetAppends,
    ForgetBlob,
    PutCursor,
    PutIdempotency,
    PutMeta,
    PutTenant,
    PutVerification,
    ReapLeases,
    ReleaseLease,
    ReleaseLeases,
    RememberAppends,
    RenewLeases,
    RetireBlob,
    TakeDatabaseId,
    TrimChangeLog,
    UnretireBlob,
    UpdateJob,
)
from app.core.stores.manifest.catalogue_ops import (
    CATALOGUE_OPS,
    AdoptEveryChunk,
    AdvanceCheckpointed,
    CatalogueOp,
    CompensateCheckpoint,
    CoverSegment,
    CreateDatabase,
    CreateSnapshot,
    CutSegment,
    DeleteChunk,
    DeleteChunkDelta,
    DeleteGeneration,
    DeleteSnapshot,
    MarkSnapshotStored,
    MarkVerified,
    PublishGeneration,
    RaiseFirstLsn,
    RaiseFloor,
    RegisterSegment,
    RemoveDatabase,
    RemoveSegment,
    RestoreDatabase,
    RestoreGeneration,
    SealSegment,
    SetDatabaseState,
    SetHealth,
    SetRetention,
    SupersedeChunk,
    SupersedeChunkDelta,
    UpsertChunk,
    UpsertChunkDelta,
    decode_op,
)
from app.core.stores.manifest.conditions import Precondition
from app.core.stores.manifest.op import Op

__all__ = [
    "ADMIN_OPS",
    "CATALOGUE_OPS",
    "AckCursor",
    "AcquireLease",
    "AdminOp",
    "AdoptEveryChunk",
    "AdvanceCheckpointed",
    "AppendAudit",
    "BookkeepingOp",
    "CatalogueOp",
    "CompensateCheckpoint",
    "CoverSegment",
    "CreateDatabase",
    "CreateSnapshot",
    "CutSegment",
    "DecideApproval",
    "DeleteApproval",
    "DeleteAudit",
    "DeleteChunk",
    "DeleteChunkDelta",
    "DeleteCursor",
    "DeleteGeneration",
    "DeleteIdempotency",
    "DeleteJob",
    "DeleteSnapshot",
    "DoomBlob",
    "DropForeignLeases",
    "EnqueueJob",
    "ForgetAppends",
    "ForgetBlob",
    "ManifestBatch",
    "MarkSnapshotStored",
    "MarkVerified",
    "Op",
    "PublishGeneration",
    "PutApproval",
    "PutCursor",
    "PutIdempotency",
    "PutMeta",
    "PutTenant",
    "PutVerification",
    "RaiseFirstLsn",
    "RaiseFloor",
    "ReapLeases",
    "Receipt",
    "RegisterSegment",
    "ReleaseLease",
    "ReleaseLeases",
    "RememberAppends",
    "RemoveDatabase",
    "RemoveSegment",
    "RenewLeases",
    "RestoreDatabase",
    "RestoreGeneration",
    "RetireBlob",
    "SealSegment",
    "SetDatabaseState",
    "SetHealth",
    "SetRetention",
    "SettleAudit",
    "SupersedeChunk",
    "SupersedeChunkDelta",
    "TakeDatabaseId",
    "TrimChangeLog",
    "UnretireBlob",
    "UpdateJob",
    "UpsertChunk",
    "UpsertChunkDelta",
    "decode_op",
]


class ManifestBatch(msgspec.Struct, frozen=True, kw_only=True):
    """Ops that commit together. `db_id` and `reason` head the change record, if there is one."""

    ops: tuple[Op, ...]
    preconditions: tuple[Precondition, ...] = ()
    reason: str
    db_id: int = 0


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """The batch is durable. `results` has one value per op (None where an op has none)."""

    sequence: int | None
    """Of the change record; None if the batch held no catalogue op."""
    results: tuple[Any, ...]
    retired_blobs: int = 0
    retired_bytes: int = 0
    """What lost its last row by the batch."""
