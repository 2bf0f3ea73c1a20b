"""What a fork reads of its parent: how chunks fall through, and when they stop doing so.

A chunk of a fork is wholly inherited or wholly its own. While the fork has no row of a chunk, it
has the rows that its parent had at the generation of the fork, and so on upwards. The first change
of a chunk *adopts* them: the rows are copied, blobs stay where they are. A chunk that is its own
never falls through again; where its last row goes, a drop stays behind in its place.

So a fork costs no row when it is made, a change of it costs the rows of the chunks it touches, and
nothing that happens to the parent after the fork shows in it. Pure but for the rows it is given;
used by the writer, the replay and the views alike.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol, TypeVar

import msgspec

from app.core.stores.manifest.records import (
    ChunkDeltaRecord,
    ChunkRecord,
    ForkParent,
    ForkRecord,
)
from app.core.stores.manifest.tables import (
    CHUNKS,
    DATABASES,
    DELTAS,
    FORKS,
    Table,
    chunk_prefix,
    number_key,
)

FORK_DEPTH_MAX = 8
"""Levels that a chunk may fall through. A fork beyond it adopts every chunk when it is made."""

V = TypeVar("V")
Row = TypeVar("Row", ChunkRecord, ChunkDeltaRecord)

replace = msgspec.structs.replace


class ReadRows(Protocol):
    def get(self, table: Table[V], key: bytes, /) -> V | None: ...

    def scan(self, table: Table[V], prefix: bytes, /) -> Iterable[tuple[bytes, V]]: ...


class Scan(Protocol):
    def __call__(self, table: Table[V], prefix: bytes, /) -> Iterable[tuple[bytes, V]]: ...


class WriteRows(ReadRows, Protocol):
    def put(self, table: Table[V], key: bytes, value: V, /) -> None: ...

    def delete(self, table: Table[Any], key: bytes, /) -> None: ...


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """Rows of one chunk, by generation. `bases` holds drops too."""

    bases: tuple[ChunkRecord, ...]
    deltas: tuple[ChunkDeltaRecord, ...]


# --- reading


def parent_of(rows: ReadRows, db_id: int) -> ForkParent | None:
    """Where the chunks of a fork fall through to; None for any other database."""
    database = rows.get(DATABASES, number_key(db_id))
    parent = None if database is None else database.forked_from
    return parent if parent is not None and parent.inherits else None


def depth_of(rows: ReadRows, db_id: int) -> int:
    """Levels below the database; 0: nothing of it falls through."""
    depth = 0
    while (parent := parent_of(rows, db_id)) is not None:
        depth, db_id = depth + 1, parent.db_id
    return depth


def chunk_rows(rows: ReadRows, db_id: int, chunk_id: int) -> ChunkRows:
    """The chunk's own rows, whatever their validity, or those that it inherits."""
    own = _own(rows, db_id, chunk_id)
    return own if own.bases else inherited_rows(rows, db_id, chunk_id)


def inherited_rows(rows: ReadRows, db_id: int, chunk_id: int) -> ChunkRows:
    """What falls through, as rows of this database: those valid at the fork, and the bases that
    deltas among them are encoded against.
    """
    parent = parent_of(rows, db_id)
    if parent is None:
        return ChunkRows((), ())
    above = chunk_rows(rows, parent.db_id, chunk_id)
    deltas = [row for row in above.deltas if is_valid_at(row, parent.generation)]
    encoded_against = {row.base_key for row in deltas}
    bases = [
        row
        for row in above.bases
        if is_valid_at(row, parent.generation)
        or (row.blob is not None and row.blob.key in encoded_against)
    ]
    return ChunkRows(
        tuple(_as_row_of(db_id, row, parent.generation) for row in bases),
        tuple(_as_row_of(db_id, row, parent.generation) for row in deltas),
    )


def chunks_at(rows: ReadRows, db_id: int, generation: int) -> list[ChunkRecord]:
    """The bases and drops valid at the generation, by chunk."""
    return list(walk(rows.scan, rows, db_id, generation))


def walk(
    scan: Scan, rows: ReadRows, db_id: int, generation: int, *, backwards: bool = False
) -> Iterator[ChunkRecord]:
    """The bases and drops valid at the generation, chunk by chunk, as far as they are asked for."""
    parent = parent_of(rows, db_id)
    own = (row for _, row in scan(CHUNKS, number_key(db_id)))
    if parent is None:
        yield from (row for row in own if is_valid_at(row, generation))
        return
    inherited = walk(scan, rows, parent.db_id, parent.generation, backwards=backwards)
    above = (_as_row_of(db_id, row, parent.generation) for row in inherited)
    waiting = next(above, None)
    for chunk_id, group in groupby(own, key=lambda row: row.chunk_id):
        while waiting is not None and (
            waiting.chunk_id > chunk_id if backwards else waiting.chunk_id < chunk_id
        ):
            yield waiting
            waiting = next(above, None)
        if waiting is not None and waiting.chunk_id == chunk_id:
            waiting = next(above, None)
        yield from (row for row in group if is_valid_at(row, generation))
    while waiting is not None:
        yield waiting
        waiting = next(above, None)


def deltas_at(rows: ReadRows, db_id: int, generation: int) -> list[ChunkDeltaRecord]:
    """The deltas valid at the generation, by chunk, oldest first."""
    found = [row for _, row in rows.scan(DELTAS, number_key(db_id)) if is_valid_at(row, generation)]
    parent = parent_of(rows, db_id)
    if parent is None:
        return found
    owned = {row.chunk_id for _, row in rows.scan(CHUNKS, number_key(db_id))}
    found += [
        _as_row_of(db_id, row, parent.generation)
        for row in deltas_at(rows, parent.db_id, parent.generation)
        if row.chunk_id not in owned
    ]
    return sorted(found, key=lambda row: (row.chunk_id, row.generation))


def is_valid_at(row: ChunkRecord | ChunkDeltaRecord, generation: int) -> bool:
    """Valid in [generation, superseded_at)."""
    return row.generation <= generation and (
        row.superseded_at is None or generation < row.superseded_at
    )


# --- who needs a row


def forks_of(rows: ReadRows, db_id: int) -> list[ForkRecord]:
    return [row for _, row in rows.scan(FORKS, number_key(db_id))]


def inheritors(rows: ReadRows, row: ChunkRecord | ChunkDeltaRecord) -> Iterator[ForkRecord]:
    """The forks of the row's database that read it through fall-through: it has to stay for them.
    A deleted fork needs it only for forks of its own.
    """
    for fork in forks_of(rows, row.db_id):
        if _falls_through(rows, fork.child_db_id, row.chunk_id) and _reaches(rows, fork, row):
            yield fork


def _falls_through(rows: ReadRows, db_id: int, chunk_id: int) -> bool:
    """Whether the chunk of this fork, or of a fork of it, is still its parent's."""
    if parent_of(rows, db_id) is None or _own(rows, db_id, chunk_id).bases:
        return False
    database = rows.get(DATABASES, number_key(db_id))
    if database is not None and database.state != "tombstoned":
        return True
    return any(_falls_through(rows, fork.child_db_id, chunk_id) for fork in forks_of(rows, db_id))


def _reaches(rows: ReadRows, fork: ForkRecord, row: ChunkRecord | ChunkDeltaRecord) -> bool:
    if is_valid_at(row, fork.generation):
        return True
    if isinstance(row, ChunkDeltaRecord) or row.blob is None:
        return False
    return any(
        delta.base_key == row.blob.key and is_valid_at(delta, fork.generation)
        for delta in _own(rows, row.db_id, row.chunk_id).deltas
    )


# --- writing


def adopt_chunk(rows: WriteRows, db_id: int, chunk_id: int) -> None:
    """Makes an inherited chunk the fork's own; for any other chunk nothing happens."""
    if parent_of(rows, db_id) is None or _own(rows, db_id, chunk_id).bases:
        return
    inherited = inherited_rows(rows, db_id, chunk_id)
    for base in inherited.bases:
        rows.put(CHUNKS, chunk_prefix(db_id, chunk_id) + number_key(base.generation), base)
    for delta in inherited.deltas:
        rows.put(DELTAS, chunk_prefix(db_id, chunk_id) + number_key(delta.generation), delta)


def adopt_every_chunk(rows: WriteRows, db_id: int) -> None:
    """Nothing falls through any more. Costs a row for each chunk and delta."""
    database = rows.get(DATABASES, number_key(db_id))
    if database is None or database.forked_from is None:
        return
    for row in chunks_at(rows, db_id, database.generation):
        adopt_chunk(rows, db_id, row.chunk_id)
    parent = replace(database.forked_from, inherits=False)
    rows.put(DATABASES, number_key(db_id), replace(database, forked_from=parent))


def leave_drop(rows: WriteRows, gone: ChunkRecord) -> None:
    """Called when a base or drop went: if that was the last row of a chunk which would fall
    through to the parent again, a drop takes its place. In a deleted database only where a fork
    of it would then see through.
    """
    database = rows.get(DATABASES, number_key(gone.db_id))
    if database is None or parent_of(rows, gone.db_id) is None:
        return
    if database.state == "tombstoned" and not any(
        _falls_through(rows, fork.child_db_id, gone.chunk_id) for fork in forks_of(rows, gone.db_id)
    ):
        return
    if _own(rows, gone.db_id, gone.chunk_id).bases:
        return
    if not inherited_rows(rows, gone.db_id, gone.chunk_id).bases:
        return
    at = gone.generation if gone.superseded_at is None else gone.superseded_at
    drop = ChunkRecord(
        db_id=gone.db_id,
        chunk_id=gone.chunk_id,
        generation=at,
        blob=None,
        first=gone.first,
        last=gone.last,
        visible_last=gone.first - 1,
        origin_db_id=gone.origin_db_id,
    )
    rows.put(CHUNKS, chunk_prefix(gone.db_id, gone.chunk_id) + number_key(at), drop)


# ---


def _own(rows: ReadRows, db_id: int, chunk_id: int) -> ChunkRows:
    prefix = chunk_prefix(db_id, chunk_id)
    return ChunkRows(
        tuple(row for _, row in rows.scan(CHUNKS, prefix)),
        tuple(row for _, row in rows.scan(DELTAS, prefix)),
    )


def _as_row_of(db_id: int, row: Row, generation: int) -> Row:
    """The row in a fork that was made at `generation`: what came after does not show."""
    ends = row.superseded_at
    return replace(
        row,
        db_id=db_id,
        origin_db_id=row.origin_db_id or row.db_id,
        superseded_at=None if ends is not None and ends > generation else ends,
    )
