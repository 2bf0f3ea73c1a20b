"""`recover`: rebuilds the manifest of an empty data directory from the bucket alone (I3).

Everything published comes back: every generation whose document is there, its chunks, and the
snapshots that pin it. Forks come back as databases that have all their chunks themselves. LSNs go
on 2^32 above the last published one, because the lost node may have given out some that never
were (I14). Crash: run it again; it only ever writes into a manifest without databases.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from app.core.base.errors import StartRefused
from app.core.base.events import Events
from app.core.base.tasks import for_each
from app.core.checkpoint.generation_document import (
    GenerationDocument,
    decode_document,
    restored_database,
    restored_deltas,
    restored_generation,
    restored_rows,
)
from app.core.retention.snapshot_document import decode_snapshot, restored_snapshot
from app.core.stores.manifest.ops import (
    CreateSnapshot,
    ManifestBatch,
    Op,
    RestoreDatabase,
    RestoreGeneration,
    UpsertChunk,
    UpsertChunkDelta,
)
from app.core.stores.manifest.records import (
    ChunkDeltaRecord,
    ChunkRecord,
    SnapshotRecord,
)
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.remote.keys import DOCUMENTS_PREFIX, SNAPSHOTS_PREFIX
from app.core.stores.remote.protocol import RemoteStore

Row = TypeVar("Row", ChunkRecord, ChunkDeltaRecord)

LSN_GAP = 1 << 32
DOCUMENTS_AT_ONCE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveredDatabase:
    tenant: str
    database: str
    db_id: int
    generations: int
    snapshots: int
    chunks: int
    last_lsn: int
    next_lsn: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoverReport:
    databases: tuple[RecoveredDatabase, ...]
    skipped: tuple[str, ...]
    """Databases whose name a newer one has taken since."""

    @property
    def generations(self) -> int:
        return sum(database.generations for database in self.databases)


async def recover_databases(
    manifest: ManifestStore,
    remote: RemoteStore,
    *,
    events: Events,
    progress: Callable[[int, int], None],
) -> RecoverReport:
    """Raises StartRefused unless the manifest is empty; CorruptBlob for a damaged document.
    `progress` is told (documents read, documents in all).
    """
    with manifest.read() as view:
        if view.all_databases():
            raise StartRefused(
                "The data directory already holds databases; recover works on an empty one."
            )
    keys = sorted([info.key async for info in remote.list_blobs(DOCUMENTS_PREFIX)])
    snapshots = await _load_snapshots(remote)
    read = 0

    async def load(key: str) -> tuple[str, GenerationDocument]:
        nonlocal read
        document = decode_document(await remote.get_blob(key), key=key)
        read += 1
        progress(read, len(keys))
        return key, document

    by_database: dict[int, list[tuple[str, GenerationDocument]]] = defaultdict(list)
    for key, document in await for_each(keys, load, limit=DOCUMENTS_AT_ONCE):
        by_database[document.database.db_id].append((key, document))
    restored: list[RecoveredDatabase] = []
    skipped: list[str] = []
    taken: set[tuple[str, str]] = set()
    for db_id in sorted(by_database, reverse=True):  # ids grow: the newest of a name wins
        documents = sorted(by_database[db_id], key=lambda pair: pair[1].generation.generation)
        newest = documents[-1][1].database
        if (newest.tenant, newest.name) in taken:
            skipped.append(f"{newest.tenant}/{newest.name} (db_id {db_id})")
            continue
        taken.add((newest.tenant, newest.name))
        restored.append(await _restore(manifest, documents, snapshots.get(db_id, ())))
        events.info(
            "database.recovered", tenant=newest.tenant, database=newest.name, db_id=db_id,
            generations=len(documents),
        )  # fmt: skip
    return RecoverReport(databases=tuple(reversed(restored)), skipped=tuple(skipped))


async def _load_snapshots(remote: RemoteStore) -> dict[int, list[SnapshotRecord]]:
    """By db_id."""
    keys = sorted([info.key async for info in remote.list_blobs(SNAPSHOTS_PREFIX)])
    found: dict[int, list[SnapshotRecord]] = defaultdict(list)

    async def load(key: str) -> SnapshotRecord:
        data = await remote.get_blob(key)
        return restored_snapshot(decode_snapshot(data, key=key), data=data, key=key)

    for row in await for_each(keys, load, limit=DOCUMENTS_AT_ONCE):
        found[row.db_id].append(row)
    return found


async def _restore(
    manifest: ManifestStore,
    documents: Sequence[tuple[str, GenerationDocument]],
    snapshots: Sequence[SnapshotRecord],
) -> RecoveredDatabase:
    newest = documents[-1][1]
    record = restored_database(newest, floor_lsn=newest.generation.last_lsn + 1 + LSN_GAP)
    rows = catalogue_rows([document for _, document in documents])
    ops: list[Op] = [RestoreDatabase(record=record)]
    ops += [UpsertChunk(row=row) for row in rows]
    ops += [
        UpsertChunkDelta(row=row) for row in delta_rows([document for _, document in documents])
    ]
    for position, (key, document) in enumerate(documents):
        generation = restored_generation(document, document_key=key)
        if position + 1 < len(documents):
            following = documents[position + 1][1].generation
            generation = msgspec.structs.replace(
                generation, superseded_at_us=following.committed_at_us
            )
        ops.append(RestoreGeneration(row=generation))
    pinned = pinned_rows(snapshots, {_number(document) for _, document in documents})
    ops += [CreateSnapshot(row=row) for row in pinned]
    await manifest.commit(
        ManifestBatch(ops=tuple(ops), reason="database.recovered", db_id=record.db_id)
    )
    return RecoveredDatabase(
        tenant=record.tenant,
        database=record.name,
        db_id=record.db_id,
        generations=len(documents),
        snapshots=len(pinned),
        chunks=len(newest.chunks),
        last_lsn=newest.generation.last_lsn,
        next_lsn=record.floor_lsn,
    )


def pinned_rows(
    snapshots: Sequence[SnapshotRecord], generations: Collection[int]
) -> list[SnapshotRecord]:
    """The snapshots whose generation is there; of two of one name (the older was deleted, and its
    document not yet) the newer. Pure.
    """
    by_age = sorted(snapshots, key=lambda row: row.created_at_us)
    return list({row.name: row for row in by_age if row.generation in generations}.values())


def catalogue_rows(documents: Sequence[GenerationDocument]) -> list[ChunkRecord]:
    """Every base and drop that the documents (of one database, in generation order) name, each
    valid until the row that follows it of its chunk, or the first later document that no longer
    has it: of the generations between two documents nothing is known. Pure.
    """
    return _with_validity([(_number(one), restored_rows(one)) for one in documents])


def delta_rows(documents: Sequence[GenerationDocument]) -> list[ChunkDeltaRecord]:
    """Every delta that the documents name, valid likewise. Pure."""
    return _with_validity([(_number(one), restored_deltas(one)) for one in documents])


def _number(document: GenerationDocument) -> int:
    return document.generation.generation


def _with_validity(views: Sequence[tuple[int, Sequence[Row]]]) -> list[Row]:
    rows: dict[tuple[int, int], Row] = {}
    open_rows: set[tuple[int, int]] = set()
    for generation, view in views:
        here = {(row.chunk_id, row.generation): row for row in view}
        first = {row.chunk_id: row.generation for row in reversed(view)}
        for gone in open_rows - here.keys():
            chunk_id, since = gone
            end = first.get(chunk_id, generation)
            rows[gone] = msgspec.structs.replace(
                rows[gone], superseded_at=end if since < end else generation
            )
        rows.update({place: row for place, row in here.items() if place not in rows})
        open_rows = set(here)
    return [rows[place] for place in sorted(rows)]
