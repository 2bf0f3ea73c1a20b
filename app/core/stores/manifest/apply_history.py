"""What the ops on snapshots and forks do to the rows, and what those refuse to others.

Pure but for the rows it is given, like `apply_catalogue`, of which this is a part.
"""

from typing import assert_never

import msgspec

from app.core.stores.manifest.errors import (
    GenerationGone,
    MissingRow,
    RowPinned,
    SnapshotTaken,
    WrongState,
)
from app.core.stores.manifest.lineage import adopt_every_chunk, forks_of, inheritors, parent_of
from app.core.stores.manifest.ops import (
    AdoptEveryChunk,
    CreateSnapshot,
    DeleteSnapshot,
    MarkSnapshotStored,
)
from app.core.stores.manifest.records import (
    ChunkDeltaRecord,
    ChunkRecord,
    DatabaseRecord,
    ForkRecord,
    SnapshotRecord,
)
from app.core.stores.manifest.rows import Rows
from app.core.stores.manifest.tables import (
    DATABASES,
    FORKS,
    GENERATIONS,
    SNAPSHOTS,
    fork_key,
    generation_key,
    number_key,
    snapshot_key,
)

HistoryOp = CreateSnapshot | MarkSnapshotStored | DeleteSnapshot | AdoptEveryChunk


def apply_history(rows: Rows, op: HistoryOp) -> None:
    match op:
        case CreateSnapshot(row=snapshot):
            _create_snapshot(rows, snapshot)
        case MarkSnapshotStored():
            row = _require_snapshot(rows, op.db_id, op.name)
            if op.key and (row.document is None or row.document.key != op.key):
                raise MissingRow("The snapshot was made anew.", db_id=op.db_id, snapshot=op.name)
            stored = msgspec.structs.replace(row, document_stored=True)
            rows.put(SNAPSHOTS, snapshot_key(op.db_id, op.name), stored)
        case DeleteSnapshot():
            _require_snapshot(rows, op.db_id, op.name)
            rows.delete(SNAPSHOTS, snapshot_key(op.db_id, op.name))
        case AdoptEveryChunk():
            adopt_every_chunk(rows, op.db_id)
        case _:
            assert_never(op)


def register_fork(rows: Rows, database: DatabaseRecord) -> None:
    """Called when a database's descriptor was written. One that inherits needs its parent."""
    parent = database.forked_from
    if parent is None:
        return
    if parent.inherits:
        above = rows.get(DATABASES, number_key(parent.db_id))
        if above is None or above.state == "tombstoned":
            raise MissingRow("No such database to fork.", db_id=parent.db_id)
        _require_generation(rows, parent.db_id, parent.generation)
    rows.put(
        FORKS,
        fork_key(parent.db_id, database.db_id),
        ForkRecord(
            db_id=parent.db_id,
            child_db_id=database.db_id,
            generation=parent.generation,
            tenant=database.tenant,
            database=database.name,
            first_lsn=database.first_lsn,
            next_chunk_id=database.next_chunk_id,
        ),
    )


def unregister_fork(rows: Rows, db_id: int) -> None:
    """Called when a database's descriptor goes. Forks that have all of their chunks themselves do
    without it.
    """
    if forks := [one for one in forks_of(rows, db_id) if parent_of(rows, one.child_db_id)]:
        raise RowPinned(
            "Forks of the database are registered.", db_id=db_id,
            names=[f"{fork.tenant}/{fork.database}" for fork in forks],
        )  # fmt: skip
    for key, fork in list(rows.scan(FORKS)):
        if db_id in {fork.db_id, fork.child_db_id}:
            rows.delete(FORKS, key)


def check_no_fork_needs(rows: Rows, row: ChunkRecord | ChunkDeltaRecord) -> None:
    """Before a row goes (I8). Raises RowPinned with the forks' names."""
    if names := [f"{fork.tenant}/{fork.database}" for fork in inheritors(rows, row)]:
        raise RowPinned(
            "A fork reads the row.", db_id=row.db_id, chunk_id=row.chunk_id,
            generation=row.generation, names=names,
        )  # fmt: skip


def check_no_snapshot(rows: Rows, db_id: int, generation: int | None = None) -> None:
    """None: of any generation. Raises RowPinned with the snapshots' names."""
    names = [
        snapshot.name
        for _, snapshot in rows.scan(SNAPSHOTS, number_key(db_id))
        if generation is None or snapshot.generation == generation
    ]
    if names:
        raise RowPinned("Snapshots pin it.", db_id=db_id, generation=generation, names=names)


def _create_snapshot(rows: Rows, snapshot: SnapshotRecord) -> None:
    database = rows.get(DATABASES, number_key(snapshot.db_id))
    if database is None:
        raise MissingRow("No such database.", db_id=snapshot.db_id)
    if database.state == "tombstoned":
        raise WrongState("The database is deleted.", db_id=snapshot.db_id)
    _require_generation(rows, snapshot.db_id, snapshot.generation)
    key = snapshot_key(snapshot.db_id, snapshot.name)
    if rows.get(SNAPSHOTS, key) is not None:
        raise SnapshotTaken(db_id=snapshot.db_id, snapshot=snapshot.name)
    rows.put(SNAPSHOTS, key, snapshot)


def _require_generation(rows: Rows, db_id: int, generation: int) -> None:
    if rows.get(GENERATIONS, generation_key(db_id, generation)) is None:
        raise GenerationGone(db_id=db_id, generation=generation)


def _require_snapshot(rows: Rows, db_id: int, name: str) -> SnapshotRecord:
    row = rows.get(SNAPSHOTS, snapshot_key(db_id, name))
    if row is None:
        raise MissingRow("No such snapshot.", db_id=db_id, snapshot=name)
    return row
