"""append_only: where in a log's chunks an LSN lies.

A chunk's number and its first LSN ascend together, over all rows that there ever were: a merge
takes its first source's number, and neither numbers nor LSNs are given out again. So a place in the
log is found by halving, however long it is; which rows are valid is seen only by looking at them.
Pure but for the rows it is given.
"""

from collections.abc import Iterable
from itertools import islice
from typing import Protocol, TypeVar

from app.core.stores.manifest.lineage import ReadRows, is_valid_at, parent_of, walk
from app.core.stores.manifest.records import ChunkRecord
from app.core.stores.manifest.tables import CHUNKS, Table, chunk_prefix, number_key

V = TypeVar("V")


class BothWays(ReadRows, Protocol):
    def scan(
        self, table: Table[V], prefix: bytes, /, *, start: bytes = b""
    ) -> Iterable[tuple[bytes, V]]: ...

    def scan_back(
        self, table: Table[V], prefix: bytes, /, *, before: bytes | None = None
    ) -> Iterable[tuple[bytes, V]]: ...


def log_range(rows: BothWays, db_id: int, generation: int) -> tuple[int, int] | None:
    """The first LSN of the lowest chunk valid at the generation, and the last of the highest.
    Looks at few rows, unless many chunks at either end came or went since.
    """
    lowest = walk(rows.scan, rows, db_id, generation)
    highest = walk(rows.scan_back, rows, db_id, generation, backwards=True)
    for bottom in lowest:
        if bottom.blob is not None:
            return bottom.first, next(row.last for row in highest if row.blob is not None)
    return None


def newest_chunks(
    rows: BothWays, db_id: int, generation: int, lsn: int, *, looks_max: int
) -> list[ChunkRecord] | None:
    """The chunks valid at the generation that hold the LSN or later ones, in order, found from the
    end of the log; None where that takes more than so many rows.
    """
    left = looks_max

    def scan_back(table: Table[V], prefix: bytes) -> Iterable[tuple[bytes, V]]:
        nonlocal left
        for pair in rows.scan_back(table, prefix):
            left -= 1
            if left < 0:
                raise _TooFar
            yield pair

    found: list[ChunkRecord] = []
    try:
        for row in walk(scan_back, rows, db_id, generation, backwards=True):
            if row.blob is None:
                continue
            if row.last < lsn:
                break
            found.append(row)
    except _TooFar:
        return None
    return found[::-1]


def chunk_page(
    rows: BothWays, db_id: int, generation: int, lsn: int, *, limit: int
) -> list[ChunkRecord]:
    """The first of the chunks valid at the generation that hold the LSN or later ones, in order.
    What it costs does not grow with the log.
    """
    start = _start(rows, db_id, generation, lsn)

    def scan(table: Table[V], prefix: bytes) -> Iterable[tuple[bytes, V]]:
        return rows.scan(table, prefix, start=prefix + number_key(start))

    found = walk(scan, rows, db_id, generation)
    wanted = (row for row in found if row.blob is not None and row.last >= lsn)
    return list(islice(wanted, limit))


class _TooFar(Exception):
    pass


def _start(rows: BothWays, db_id: int, generation: int, lsn: int) -> int:
    """A number below which no chunk valid at the generation holds the LSN or a later one."""
    starts: list[int] = []
    while True:
        start = _own_start(rows, db_id, generation, lsn)
        if start is not None:
            starts.append(start)
        parent = parent_of(rows, db_id)
        if parent is None:
            return min(starts, default=0)
        db_id, generation = parent.db_id, parent.generation


def _own_start(rows: BothWays, db_id: int, generation: int, lsn: int) -> int | None:
    """As `_start`, of the database's own rows; None where all of them begin above the LSN."""
    begins_at_most = _last_that_begins_by(rows, db_id, lsn)
    if begins_at_most is None:
        return None
    behind = chunk_prefix(db_id, begins_at_most + 1)
    for _, row in rows.scan_back(CHUNKS, number_key(db_id), before=behind):
        if row.blob is not None and is_valid_at(row, generation):
            return row.chunk_id if row.last >= lsn else row.chunk_id + 1
    return begins_at_most + 1


def _last_that_begins_by(rows: BothWays, db_id: int, lsn: int) -> int | None:
    """The highest chunk with a row, valid or not, whose first LSN is at most `lsn`."""
    prefix = number_key(db_id)
    newest = next(iter(rows.scan_back(CHUNKS, prefix)), None)
    if newest is None:
        return None
    found: int | None = None
    low, high = 0, newest[1].chunk_id
    while low <= high:
        middle = (low + high) // 2
        _, row = next(iter(rows.scan(CHUNKS, prefix, start=chunk_prefix(db_id, middle))))
        if row.first <= lsn:
            found, low = row.chunk_id, row.chunk_id + 1
        else:
            high = middle - 1
    return found
