"""The change log's subscribers, and its trimming.

Invariants: I14: what is left of the log is dense and, replayed over the base, gives the catalogue.
The base is the catalogue as it was behind the last trimmed change: a change that goes is applied
to it in the same transaction. A cursor that is not left behind keeps what it has not acknowledged.
"""

from collections.abc import Iterable
from typing import TypeVar

import msgspec

from app.core.base.errors import CursorExpired, CursorNotFound, InvalidRequest
from app.core.stores.manifest.apply_catalogue import apply_catalogue
from app.core.stores.manifest.context import BatchContext
from app.core.stores.manifest.ops import (
    AckCursor,
    DeleteCursor,
    PutCursor,
    TrimChangeLog,
    decode_op,
)
from app.core.stores.manifest.records import CursorRecord
from app.core.stores.manifest.rows import StagedRows
from app.core.stores.manifest.tables import (
    CHANGE_BASE,
    CHANGE_BASE_SEQUENCE,
    CHANGE_CURSORS,
    CHANGE_LOG,
    CHANGE_SEQUENCE,
    SCHEMA,
    Table,
    base_key,
    base_prefix,
    cursor_key,
    cursor_prefix,
    number_key,
    number_of,
)

V = TypeVar("V")

CURSORS_MAX = 100
"""Of one principal."""
TRIM_CHANGES_MAX = 500
TRIM_OPS_MAX = 2000
"""Of one transaction, so that the writer is not held up."""


def trimmable_through(
    *,
    last: int,
    acknowledged: Iterable[int],
    trimmed_through: int,
    history_count: int,
    lag_count_max: int,
) -> int:
    """The last sequence that may go. Pure."""
    waiting = (one for one in acknowledged if one >= max(trimmed_through, last - lag_count_max))
    return max(min([last - history_count, *waiting]), trimmed_through)


def put_cursor(rows: StagedRows, op: PutCursor, context: BatchContext) -> tuple[CursorRecord, bool]:
    key = cursor_key(op.principal, op.name)
    known = rows.get(CHANGE_CURSORS, key)
    if known is None and len(rows.scan(CHANGE_CURSORS, cursor_prefix(op.principal))) >= CURSORS_MAX:
        raise InvalidRequest(f"A principal has at most {CURSORS_MAX} cursors; delete one.")
    match op.start:
        case "start":
            acknowledged = trimmed_through(rows)
        case "now":
            acknowledged = _counter(rows, CHANGE_SEQUENCE)
        case _:
            acknowledged = op.start - 1
    _check_position(rows, acknowledged, op.name)
    record = CursorRecord(
        principal=op.principal,
        name=op.name,
        acknowledged=acknowledged,
        created_at_us=context.now_us if known is None else known.created_at_us,
        acknowledged_at_us=context.now_us,
    )
    rows.put(CHANGE_CURSORS, key, record)
    return record, known is None


def ack_cursor(rows: StagedRows, op: AckCursor, context: BatchContext) -> CursorRecord:
    record = _require(rows, op.principal, op.name)
    _check_position(rows, record.acknowledged, op.name)
    if op.sequence <= record.acknowledged:
        return record
    _check_position(rows, op.sequence, op.name)
    moved = msgspec.structs.replace(
        record, acknowledged=op.sequence, acknowledged_at_us=context.now_us
    )
    rows.put(CHANGE_CURSORS, cursor_key(op.principal, op.name), moved)
    return moved


def delete_cursor(rows: StagedRows, op: DeleteCursor) -> None:
    _require(rows, op.principal, op.name)
    rows.delete(CHANGE_CURSORS, cursor_key(op.principal, op.name))


def trim_change_log(rows: StagedRows, op: TrimChangeLog) -> int:
    first = trimmed_through(rows) + 1
    through = trimmable_through(
        last=_counter(rows, CHANGE_SEQUENCE),
        acknowledged=(row.acknowledged for _, row in rows.scan(CHANGE_CURSORS)),
        trimmed_through=first - 1,
        history_count=op.history_count,
        lag_count_max=op.lag_count_max,
    )
    base = _BaseRows(rows)
    ops_count = sequence = 0
    for sequence in range(first, min(through, first + TRIM_CHANGES_MAX - 1) + 1):
        change = rows.get(CHANGE_LOG, number_key(sequence))
        assert change is not None
        for raw in change.ops:
            apply_catalogue(base, decode_op(raw))
        rows.delete(CHANGE_LOG, number_key(sequence))
        ops_count += len(change.ops)
        if ops_count >= TRIM_OPS_MAX:
            break
    if not sequence:
        return 0
    rows.put(SCHEMA, CHANGE_BASE_SEQUENCE, number_key(sequence))
    return sequence - first + 1


def trimmed_through(rows: StagedRows) -> int:
    """0: nothing was ever trimmed."""
    return _counter(rows, CHANGE_BASE_SEQUENCE)


class _BaseRows:
    """The catalogue behind the last trimmed change, as the ops see it."""

    def __init__(self, rows: StagedRows) -> None:
        self._rows = rows

    def get(self, table: Table[V], key: bytes) -> V | None:
        raw = self._rows.get(CHANGE_BASE, base_key(table, key))
        return None if raw is None else table.codec.decode(raw)

    def put(self, table: Table[V], key: bytes, value: V) -> None:
        self._rows.put(CHANGE_BASE, base_key(table, key), table.codec.encode(value))

    def delete(self, table: Table[V], key: bytes) -> None:
        self._rows.delete(CHANGE_BASE, base_key(table, key))

    def scan(self, table: Table[V], prefix: bytes = b"") -> list[tuple[bytes, V]]:
        """Ascending."""
        skipped = len(base_prefix(table))
        return [
            (key[skipped:], table.codec.decode(raw))
            for key, raw in self._rows.scan(CHANGE_BASE, base_key(table, prefix))
        ]


def _require(rows: StagedRows, principal: str, name: str) -> CursorRecord:
    record = rows.get(CHANGE_CURSORS, cursor_key(principal, name))
    if record is None:
        raise CursorNotFound(f"There is no cursor {name}.", cursor=name)
    return record


def _check_position(rows: StagedRows, acknowledged: int, name: str) -> None:
    first = trimmed_through(rows) + 1
    last = _counter(rows, CHANGE_SEQUENCE)
    if acknowledged < first - 1:
        raise CursorExpired(cursor=name, first_sequence=first)
    if acknowledged > last:
        raise InvalidRequest(f"The newest change is {last}.", last_sequence=last)


def _counter(rows: StagedRows, name: bytes) -> int:
    raw = rows.get(SCHEMA, name)
    return 0 if raw is None else number_of(raw)
