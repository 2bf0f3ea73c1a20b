"""One batch against the rows: conditions, ops, change record, invariants.

Everything is staged in memory; the caller puts it into the transaction if nothing was raised.
"""

from typing import Any, cast

import msgspec

from app.core.base.errors import InvariantViolation
from app.core.stores.manifest.apply_admin import apply_admin
from app.core.stores.manifest.apply_bookkeeping import apply_bookkeeping, count_up
from app.core.stores.manifest.apply_catalogue import apply_catalogue
from app.core.stores.manifest.context import BatchContext
from app.core.stores.manifest.derived import follow_rows
from app.core.stores.manifest.gc_queue import claim_blob
from app.core.stores.manifest.invariants import check_invariants
from app.core.stores.manifest.ops import (
    ADMIN_OPS,
    CATALOGUE_OPS,
    AdminOp,
    BookkeepingOp,
    CatalogueOp,
    CreateDatabase,
    CreateSnapshot,
    ManifestBatch,
    Op,
    PublishGeneration,
    Receipt,
    RegisterSegment,
    RestoreDatabase,
    RestoreGeneration,
    UpsertChunk,
    UpsertChunkDelta,
)
from app.core.stores.manifest.preconditions import AnyPrecondition, check
from app.core.stores.manifest.records import ChangeRecord, DatabaseRecord
from app.core.stores.manifest.rows import StagedRows
from app.core.stores.manifest.tables import (
    CHANGE_LOG,
    CHANGE_SEQUENCE,
    DATABASE_IDS,
    DATABASES,
    SCHEMA,
    number_key,
    number_of,
)

_catalogue_kinds: frozenset[type[Op]] = frozenset(CATALOGUE_OPS)
_admin_kinds: frozenset[type[Op]] = frozenset(ADMIN_OPS)
_encode = msgspec.msgpack.Encoder().encode


def apply_batch(rows: StagedRows, batch: ManifestBatch, context: BatchContext) -> Receipt:
    """Raises a `BatchRefused` or an `InvariantViolation`."""
    for expected in batch.preconditions:
        check(rows, cast("AnyPrecondition", expected), context)
    results: list[Any] = []
    logged: list[CatalogueOp] = []
    for op in batch.ops:
        if type(op) in _catalogue_kinds:
            effect, result = _resolve(rows, cast("CatalogueOp", op))
            apply_catalogue(rows, effect)
            logged.append(effect)
            results.append(result)
        elif type(op) in _admin_kinds:
            results.append(apply_admin(rows, cast("AdminOp", op)))
        else:
            results.append(apply_bookkeeping(rows, cast("BookkeepingOp", op), context))
    sequence = _log_change(rows, batch, logged, context) if logged else None
    retired_blobs, retired_bytes = follow_rows(rows, context)
    check_invariants(rows)
    return Receipt(
        sequence=sequence,
        results=tuple(results),
        retired_blobs=retired_blobs,
        retired_bytes=retired_bytes,
    )


def _resolve(rows: StagedRows, op: CatalogueOp) -> tuple[CatalogueOp, Any]:
    """What reads counters or the collection's queue is settled here, so that what is logged and
    applied depends on the catalogue alone and a replay gives the same rows (I14).
    """
    match op:
        case CreateDatabase():
            db_id = count_up(rows, DATABASE_IDS)
            record = DatabaseRecord(
                db_id=db_id,
                tenant=op.tenant,
                name=op.name,
                engine=op.engine,
                page_size=op.page_size,
                chunk_bytes=op.chunk_bytes,
                compression=op.compression,
                created_at_us=op.created_at_us,
                forked_from=op.forked_from,
            )
            return RestoreDatabase(record=record), db_id
        case RestoreDatabase():
            raw = rows.get(SCHEMA, DATABASE_IDS)
            if raw is None or number_of(raw) < op.record.db_id:
                rows.put(SCHEMA, DATABASE_IDS, number_key(op.record.db_id))
        case UpsertChunk():
            if op.row.blob is not None:
                claim_blob(rows, op.row.blob.key)
        case UpsertChunkDelta():
            claim_blob(rows, op.row.blob.key)
            if op.row.base_key:
                claim_blob(rows, op.row.base_key)
        case _:
            pass
    return op, None


def _log_change(
    rows: StagedRows, batch: ManifestBatch, logged: list[CatalogueOp], context: BatchContext
) -> int:
    sequence = count_up(rows, CHANGE_SEQUENCE)
    newest = rows.newest_key(CHANGE_LOG)
    if newest is not None and number_of(newest) != sequence - 1:
        raise InvariantViolation(
            "The change log is not dense.", sequence=sequence, newest=number_of(newest)
        )
    db_id = batch.db_id or database_of(logged[0])
    key = number_key(db_id)
    database = rows.get(DATABASES, key) or rows.original(DATABASES, key)
    rows.put(
        CHANGE_LOG,
        number_key(sequence),
        ChangeRecord(
            sequence=sequence,
            committed_at_us=context.now_us,
            reason=batch.reason,
            db_id=db_id,
            tenant="" if database is None else database.tenant,
            database="" if database is None else database.name,
            generation=0 if database is None else database.generation,
            ops=tuple(msgspec.Raw(_encode(op)) for op in logged),
        ),
    )
    return sequence


def database_of(op: CatalogueOp) -> int:
    """The database an op is about."""
    match op:
        case RestoreDatabase(record=record):
            return record.db_id
        case CreateDatabase():
            return 0
        case (
            UpsertChunk()
            | UpsertChunkDelta()
            | PublishGeneration()
            | RegisterSegment()
            | RestoreGeneration()
            | CreateSnapshot()
        ):
            return op.row.db_id
        case _:
            return op.db_id
