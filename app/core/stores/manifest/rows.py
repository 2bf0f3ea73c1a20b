"""Rows as the ops see them: what is committed, and a batch's own changes over it.

A batch writes into a `StagedRows` and reads its own writes there; only when all of it holds are
the changes put into the transaction. A batch that fails half-way has thus touched nothing, and
its neighbours in the group need neither a nested transaction nor a replay.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar, cast

import lmdb

from app.core.base.errors import BopError, InvariantViolation
from app.core.stores.manifest.errors import UNREADABLE, ViewExpired
from app.core.stores.manifest.tables import KEY_BYTES_MAX, Table

V = TypeVar("V")

Handles = Mapping[Table[Any], Any]
"""The opened sub-database of every table."""

EncodedRows = list[tuple[Table[Any], bytes, bytes | None]]
"""None: the row goes."""


class Rows(Protocol):
    def get(self, table: Table[V], key: bytes, /) -> V | None: ...

    def put(self, table: Table[V], key: bytes, value: V, /) -> None: ...

    def delete(self, table: Table[V], key: bytes, /) -> None: ...

    def scan(self, table: Table[V], prefix: bytes = b"", /) -> Iterable[tuple[bytes, V]]: ...


class CommittedRows:
    """Rows of one transaction, decoded. `expired` ends scans that run on too long."""

    __slots__ = ("_handles", "_transaction", "expired")

    def __init__(self, transaction: lmdb.Transaction, handles: Handles) -> None:
        self._transaction = transaction
        self._handles = handles
        self.expired = False

    def end(self) -> None:
        """Ends a read. py-lmdb gives the reader's slot back only when the transaction object goes,
        so nothing may keep it.
        """
        self._transaction.abort()
        del self._transaction

    def transaction_id(self) -> int:
        """Of the newest commit that it sees."""
        return int(self._transaction.id())

    def get(self, table: Table[V], key: bytes) -> V | None:
        raw = cast("bytes | None", self._transaction.get(key, db=self._handles[table]))
        if raw is None:
            return None
        try:
            return table.codec.decode(raw)
        except UNREADABLE as error:
            raise _placed(error, table, key) from error.__cause__

    def scan(
        self, table: Table[V], prefix: bytes = b"", *, start: bytes = b""
    ) -> Iterator[tuple[bytes, V]]:
        """Rows whose key begins with `prefix`, ascending, from `start` on."""
        decode = table.codec.decode
        for key, raw in self._scan_raw(table, prefix, start):
            try:
                row = decode(raw)
            except UNREADABLE as error:
                raise _placed(error, table, key) from error.__cause__
            yield key, row

    def scan_keys(
        self, table: Table[Any], prefix: bytes = b"", *, start: bytes = b""
    ) -> Iterator[bytes]:
        for key, _ in self._scan_raw(table, prefix, start):
            yield key

    def scan_back(
        self, table: Table[V], prefix: bytes = b"", *, before: bytes | None = None
    ) -> Iterator[tuple[bytes, V]]:
        """Rows whose key begins with `prefix`, descending, from below `before` on."""
        decode = table.codec.decode
        with self._transaction.cursor(db=self._handles[table]) as cursor:
            ceiling = _successor(prefix) if before is None else before
            at_ceiling = ceiling is not None and cursor.set_range(ceiling)
            found = cursor.prev() if at_ceiling else cursor.last()
            while found:
                if self.expired:
                    raise ViewExpired
                key, raw = cast("tuple[bytes, bytes]", cursor.item())
                if not key.startswith(prefix):
                    return
                try:
                    row = decode(raw)
                except UNREADABLE as error:
                    raise _placed(error, table, key) from error.__cause__
                yield key, row
                found = cursor.prev()

    def unreadable(self, table: Table[Any]) -> Iterator[BopError]:
        """Why rows of the table cannot be decoded, of each that cannot."""
        for key, raw in self._scan_raw(table, b"", b""):
            try:
                table.codec.decode(raw)
            except UNREADABLE as error:
                yield _placed(error, table, key)

    def newest_key(self, table: Table[Any]) -> bytes | None:
        with self._transaction.cursor(db=self._handles[table]) as cursor:
            return cast("bytes", cursor.key()) if cursor.last() else None

    def entries(self, table: Table[Any]) -> int:
        return self._transaction.stat(self._handles[table])["entries"]

    def pages(self, table: Table[Any]) -> int:
        stat = self._transaction.stat(self._handles[table])
        return stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]

    def put_raw(self, table: Table[Any], key: bytes, raw: bytes) -> None:
        self._transaction.put(key, raw, db=self._handles[table])

    def delete_raw(self, table: Table[Any], key: bytes) -> None:
        self._transaction.delete(key, db=self._handles[table])

    def put_all(self, changes: EncodedRows) -> None:
        for table, key, raw in changes:
            if raw is None:
                self.delete_raw(table, key)
            else:
                self.put_raw(table, key, raw)

    def _scan_raw(
        self, table: Table[Any], prefix: bytes, start: bytes
    ) -> Iterator[tuple[bytes, bytes]]:
        with self._transaction.cursor(db=self._handles[table]) as cursor:
            found = cursor.set_range(max(prefix, start)) if prefix or start else cursor.first()
            while found:
                if self.expired:
                    raise ViewExpired
                key, raw = cast("tuple[bytes, bytes]", cursor.item())
                if not key.startswith(prefix):
                    return
                yield key, raw
                found = cursor.next()


class StagedRows:
    """A batch's changes in memory, over the rows of the write transaction."""

    __slots__ = ("_committed", "_ordered", "_originals", "_staged")

    def __init__(self, committed: CommittedRows) -> None:
        self._committed = committed
        self._staged: dict[Table[Any], dict[bytes, Any]] = {}
        self._originals: dict[Table[Any], dict[bytes, Any]] = {}
        self._ordered: dict[Table[Any], list[bytes]] = {}

    def get(self, table: Table[V], key: bytes) -> V | None:
        staged = self._staged.get(table)
        if staged is not None and key in staged:
            return cast("V | None", staged[key])
        return self.original(table, key)

    def original(self, table: Table[V], key: bytes) -> V | None:
        """The row as it was before the batch."""
        known = self._originals.get(table)
        if known is None:
            known = self._originals[table] = {}
        if key not in known:
            known[key] = self._committed.get(table, key)
        return cast("V | None", known[key])

    def put(self, table: Table[V], key: bytes, value: V) -> None:
        self._stage(table, key, value)

    def delete(self, table: Table[Any], key: bytes) -> None:
        self._stage(table, key, None)

    def scan(self, table: Table[V], prefix: bytes = b"") -> list[tuple[bytes, V]]:
        """Ascending; the batch's own changes included."""
        rows = dict(self._committed.scan(table, prefix))
        for key, value in self._staged.get(table, {}).items():
            if not key.startswith(prefix):
                continue
            if value is None:
                rows.pop(key, None)
            else:
                rows[key] = value
        return sorted(rows.items())

    def below(self, table: Table[V], key: bytes, prefix: bytes) -> Iterator[tuple[bytes, V]]:
        """Rows under `prefix` before `key`, nearest first; the batch's own changes included."""
        staged = self._staged.get(table, {})
        ordered = self._staged_keys(table)
        index = bisect_left(ordered, key) - 1
        committed = self._committed.scan_back(table, prefix, before=key)
        entry = next(committed, None)
        while True:
            mine = ordered[index] if index >= 0 and ordered[index].startswith(prefix) else None
            if mine is not None and (entry is None or mine >= entry[0]):
                if entry is not None and mine == entry[0]:
                    entry = next(committed, None)
                index -= 1
                if staged[mine] is not None:
                    yield mine, staged[mine]
            elif entry is not None:
                yield entry
                entry = next(committed, None)
            else:
                return

    def above(self, table: Table[V], key: bytes, prefix: bytes) -> Iterator[tuple[bytes, V]]:
        """Rows under `prefix` after `key`, nearest first; the batch's own changes included."""
        staged = self._staged.get(table, {})
        ordered = self._staged_keys(table)
        after = key + b"\0"
        index = bisect_left(ordered, after)
        committed = self._committed.scan(table, prefix, start=after)
        entry = next(committed, None)
        while True:
            mine = ordered[index] if index < len(ordered) else None
            if mine is not None and not mine.startswith(prefix):
                mine = None
            if mine is not None and (entry is None or mine <= entry[0]):
                if entry is not None and mine == entry[0]:
                    entry = next(committed, None)
                index += 1
                if staged[mine] is not None:
                    yield mine, staged[mine]
            elif entry is not None:
                yield entry
                entry = next(committed, None)
            else:
                return

    def newest_key(self, table: Table[Any]) -> bytes | None:
        """The last committed key."""
        return self._committed.newest_key(table)

    def touched(self, table: Table[V]) -> Mapping[bytes, V | None]:
        return self._staged.get(table, {})

    def encoded(self) -> EncodedRows:
        """The changes as they will be stored. A value that cannot be is met here, before any of
        them is put.
        """
        changes: EncodedRows = []
        for table, staged in self._staged.items():
            encode = table.codec.encode
            changes += [
                (table, key, None if value is None else encode(value))
                for key, value in staged.items()
            ]
        return changes

    def _stage(self, table: Table[Any], key: bytes, value: Any) -> None:
        if not 0 < len(key) <= KEY_BYTES_MAX:
            raise InvariantViolation(f"A key of {len(key)} bytes in {table.name}.")
        staged = self._staged.get(table)
        if staged is None:
            staged = self._staged[table] = {}
        staged[key] = value
        self._ordered.pop(table, None)

    def _staged_keys(self, table: Table[Any]) -> list[bytes]:
        ordered = self._ordered.get(table)
        if ordered is None:
            ordered = self._ordered[table] = sorted(self._staged.get(table, ()))
        return ordered


class MemoryRows:
    """The same rows in plain dicts: for replaying the change log."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[bytes, Any]] = {}
        self._ordered: dict[str, list[bytes]] = {}  # keys of the tables that were scanned

    def get(self, table: Table[V], key: bytes) -> V | None:
        return cast("V | None", self.tables.get(table.name, {}).get(key))

    def put(self, table: Table[V], key: bytes, value: V) -> None:
        rows = self.tables.setdefault(table.name, {})
        if key not in rows and (ordered := self._ordered.get(table.name)) is not None:
            insort(ordered, key)
        rows[key] = value

    def delete(self, table: Table[Any], key: bytes) -> None:
        rows = self.tables.get(table.name, {})
        if key in rows and (ordered := self._ordered.get(table.name)) is not None:
            del ordered[bisect_left(ordered, key)]
        rows.pop(key, None)

    def scan(self, table: Table[V], prefix: bytes = b"") -> list[tuple[bytes, V]]:
        """Ascending."""
        rows = self.tables.get(table.name, {})
        ordered = self._ordered.get(table.name)
        if ordered is None:
            ordered = self._ordered[table.name] = sorted(rows)
        found = []
        for position in range(bisect_left(ordered, prefix), len(ordered)):
            key = ordered[position]
            if not key.startswith(prefix):
                break
            found.append((key, cast("V", rows[key])))
        return found


def _successor(prefix: bytes) -> bytes | None:
    """The smallest key above every key with this prefix; None if there is none."""
    stripped = prefix.rstrip(b"\xff")
    if not stripped:
        return None
    return stripped[:-1] + bytes([stripped[-1] + 1])


def _placed(error: BopError, table: Table[Any], key: bytes) -> BopError:
    error.fields.update(table=table.name, key=key.hex())
    return error
