"""Forks: a new database that begins as another one's generation, and copies nothing of it.

Invariants: I8: the parent's generation is judged inside the committing transaction; from then on
what falls through is pinned by the fork's registration. I14: LSNs go on above every one that the
generation holds. I3: `checkpointed_lsn` is 0 until the fork's own document is in the bucket, which
`HistoryUpload` sees to: it costs time in proportion to the chunks, and the fork does not.
Concurrency: two of one name: one is refused. Cancellation: once committed, the fork is opened too.
Crash: an id may be left unused; a committed fork is opened at start.
"""

from collections.abc import Callable

import msgspec

from app.core.base.clock import Clock, wall_us
from app.core.base.errors import DatabaseConflict, DatabaseNotFound, GenerationExpired
from app.core.base.events import Events
from app.core.base.tasks import uninterrupted
from app.core.retention.selection import select_generation
from app.core.services.databases import DatabaseStatus
from app.core.services.directory import DatabaseDirectory
from app.core.stores.manifest.errors import GenerationGone, MissingRow, NameTaken
from app.core.stores.manifest.lineage import FORK_DEPTH_MAX
from app.core.stores.manifest.ops import (
    AdoptEveryChunk,
    ManifestBatch,
    Op,
    RestoreDatabase,
    RestoreGeneration,
    TakeDatabaseId,
)
from app.core.stores.manifest.records import DatabaseRecord, ForkParent, GenerationRecord
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.remote.keys import generation_document_key
from app.core.workers.history_upload import HistoryUpload


class Forks:
    def __init__(
        self,
        manifest: ManifestStore,
        directory: DatabaseDirectory,
        upload: HistoryUpload,
        *,
        clock: Clock,
        events: Events,
    ) -> None:
        self._manifest = manifest
        self._directory = directory
        self._upload = upload
        self._clock = clock
        self._events = events

    async def create(
        self,
        tenant: str,
        database: str,
        *,
        fork_tenant: str,
        fork_database: str,
        generation: int | None = None,
        snapshot: str | None = None,
        remember: Callable[[DatabaseStatus], Op] | None = None,
    ) -> DatabaseStatus:
        """By default of the newest published generation, WAL excluded. `remember` gives an op for
        the same commit. Raises DatabaseNotFound, DatabaseConflict, NoGeneration, GenerationExpired,
        NotFound, SnapshotNotFound.
        """
        parent = self._directory.read(tenant, database)
        with self._manifest.read() as view:
            start = select_generation(view, parent, generation=generation, snapshot=snapshot)
            lsns = None
            if parent.engine == "append_only":
                lsns = view.log_range(parent.db_id, start.generation)
            depth = view.fork_depth(parent.db_id) + 1
            taken = view.database_id(fork_tenant, fork_database) is not None
        if taken:
            raise _name_taken(fork_tenant, fork_database)
        receipt = await self._manifest.commit(
            ManifestBatch(ops=(TakeDatabaseId(),), reason="database.id_taken")
        )
        record, first = forked(
            parent, start, lsns,
            db_id=receipt.results[0], tenant=fork_tenant, name=fork_database,
            now_us=wall_us(self._clock),
        )  # fmt: skip
        status = _status(record)
        ops: list[Op] = [RestoreDatabase(record=record), RestoreGeneration(row=first)]
        if depth > FORK_DEPTH_MAX:
            ops.append(AdoptEveryChunk(db_id=record.db_id))
        if remember is not None:
            ops.append(remember(status))
        await uninterrupted(self._make(parent, record, tuple(ops)))
        self._upload.wake()
        return status

    async def _make(
        self, parent: DatabaseRecord, record: DatabaseRecord, ops: tuple[Op, ...]
    ) -> None:
        try:
            await self._manifest.commit(
                ManifestBatch(ops=ops, reason="database.forked", db_id=record.db_id)
            )
        except NameTaken as refusal:
            raise _name_taken(record.tenant, record.name) from refusal
        except GenerationGone as refusal:
            raise GenerationExpired(
                f"Generation {record.generation} is no longer retained.",
                generation=record.generation,
            ) from refusal
        except MissingRow as refusal:
            raise DatabaseNotFound(tenant=parent.tenant, database=parent.name) from refusal
        await self._directory.open(record.db_id)
        self._events.info(
            "database.forked", tenant=record.tenant, database=record.name, db_id=record.db_id,
            parent=f"{parent.tenant}/{parent.name}", generation=record.generation,
        )  # fmt: skip


def forked(
    parent: DatabaseRecord,
    start: GenerationRecord,
    lsns: tuple[int, int] | None,
    *,
    db_id: int,
    tenant: str,
    name: str,
    now_us: int,
) -> tuple[DatabaseRecord, GenerationRecord]:
    """The fork's descriptor and its first generation, which has the number of the parent's: rows
    that are adopted later keep their own. `lsns` is the first and last one in append_only chunks.
    Pure.
    """
    next_lsn = max(start.last_lsn, lsns[1] if lsns is not None else 0) + 1
    first_lsn = parent.first_lsn
    if parent.engine == "append_only":
        first_lsn = lsns[0] if lsns is not None else next_lsn
    record = DatabaseRecord(
        db_id=db_id,
        tenant=tenant,
        name=name,
        engine=parent.engine,
        page_size=parent.page_size,
        chunk_bytes=parent.chunk_bytes,
        compression=parent.compression,
        created_at_us=now_us,
        generation=start.generation,
        first_lsn=first_lsn,
        floor_lsn=next_lsn,
        next_chunk_id=parent.next_chunk_id,
        page_count=start.page_count,
        forked_from=ForkParent(
            tenant=parent.tenant,
            database=parent.name,
            db_id=parent.db_id,
            generation=start.generation,
        ),
    )
    first = msgspec.structs.replace(
        start,
        db_id=db_id,
        committed_at_us=now_us,
        base_chunks=0,
        delta_chunks=0,
        bytes_uploaded=0,
        document_key=generation_document_key(
            tenant=tenant, database=name, db_id=db_id, generation=start.generation
        ),
        document_stored=False,
        superseded_at_us=None,
        verified_at_us=None,
    )
    return record, first


def _status(record: DatabaseRecord) -> DatabaseStatus:
    return DatabaseStatus(
        record=record,
        first_lsn=record.first_lsn,
        next_lsn=record.floor_lsn,
        page_count=record.page_count,
        wal_bytes=0,
        health="ok",
        lost_from_lsn=None,
        earliest_generation=record.generation,
        latest_generation=record.generation,
    )


def _name_taken(tenant: str, name: str) -> DatabaseConflict:
    return DatabaseConflict(f"{tenant}/{name} exists already.", tenant=tenant, database=name)
