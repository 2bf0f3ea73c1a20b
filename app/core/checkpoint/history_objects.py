"""What the bucket says of snapshots and forks, written behind their commit.

Invariants: I3: a fork's `checkpointed_lsn` rises only once its generation document is stored.
I13: the row comes first. A crash in between leaves a row whose object is missing, which
`store_missing` writes; an object without a row can only be one whose snapshot or fork went
meanwhile, and that is queued for the collector, which confirms that the prefix is ours (I17).
Concurrency: two at once write the same bytes under the same key. Cancellation: at any await.
Crash: rows say what is stored; the rest is found again.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import msgspec

from app.core.base import failpoints
from app.core.base.errors import BopError, Unavailable
from app.core.base.events import Events
from app.core.checkpoint.document_store import ReadyDocument, make_document, store_document
from app.core.retention.snapshot_document import encode_snapshot
from app.core.stores.manifest.errors import MissingRow
from app.core.stores.manifest.ops import (
    AdvanceCheckpointed,
    ManifestBatch,
    MarkSnapshotStored,
    RetireBlob,
)
from app.core.stores.manifest.records import BlobRef, ForkRecord, GenerationRecord, SnapshotRecord
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.manifest.view import ManifestView
from app.core.stores.remote.protocol import BytesBody, RemoteStore


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryObjects:
    manifest: ManifestStore
    remote: Callable[[], RemoteStore]
    on_durable: Callable[[int], None]
    """Told a db_id whose `checkpointed_lsn` moved."""
    events: Events

    async def store_missing(self) -> int:
        """Everything whose row says that it is not stored. Returns how many were. Raises
        RemoteUnavailable and OwnershipLost at once, what concerns a single object behind the rest.
        """
        with self.manifest.read() as view:
            snapshots = [row for row in view.all_snapshots() if not row.document_stored]
            forks = [row for row in view.all_forks() if _first_generation(view, row) is not None]
        steps: list[Callable[[], Awaitable[None]]] = [
            *(partial(self.store_snapshot, row) for row in snapshots),
            *(partial(self.store_fork, fork) for fork in forks),
        ]
        failed: BopError | None = None
        for step in steps:
            try:
                await step()
            except Unavailable:
                raise
            except BopError as error:
                failed = error
        if failed is not None:
            raise failed
        return len(steps)

    async def store_snapshot(self, row: SnapshotRecord) -> None:
        """Raises RemoteUnavailable."""
        with self.manifest.read() as view:
            database = view.database(row.db_id)
        if database is None or row.document is None:
            return
        key, crc = row.document.key, row.document.crc64
        body = BytesBody(data=encode_snapshot(database, row), crc64=crc)
        failpoints.fp("snapshot.before_document")
        await self.remote().put_blob(key, body)
        failpoints.fp("snapshot.after_document")
        mark = MarkSnapshotStored(db_id=row.db_id, name=row.name, key=key)
        try:
            await self.manifest.commit(
                ManifestBatch(ops=(mark,), reason="snapshot.stored", db_id=row.db_id)
            )
        except MissingRow:  # deleted meanwhile, and its object with it, but then came this one
            await self._retire(row.document, db_id=row.db_id)

    async def store_fork(self, fork: ForkRecord) -> None:
        """The document of a fork's first generation: its whole chunk view, so that the bucket alone
        restores the fork whatever becomes of its parent. Raises RemoteUnavailable, OwnershipLost.
        """
        found = await self.manifest.read_in_thread(lambda view: _first_document(view, fork))
        if found is None:
            return
        generation, ready = found
        failpoints.fp("fork.before_document")
        await store_document(self.remote(), ready)
        failpoints.fp("fork.after_document")
        durable = AdvanceCheckpointed(
            db_id=fork.child_db_id, generation=generation.generation, lsn=generation.last_lsn
        )
        try:
            await self.manifest.commit(
                ManifestBatch(ops=(durable,), reason="fork.durable", db_id=fork.child_db_id)
            )
        except MissingRow:  # the generation expired, or the fork was deleted, meanwhile
            gone = BlobRef(key=generation.document_key, sha256=b"", crc64=0, bytes=0)
            await self._retire(gone, db_id=fork.child_db_id)
            return
        self.on_durable(fork.child_db_id)
        self.events.info(
            "fork.durable", tenant=fork.tenant, database=fork.database, db_id=fork.child_db_id,
            generation=generation.generation, chunks=len(ready.document.chunks),
        )  # fmt: skip

    async def _retire(self, blob: BlobRef, *, db_id: int) -> None:
        """It may have been collected before it was stored."""
        retire = RetireBlob(blob=blob, db_id=db_id, eligible_at_us=0, reason="unreachable")
        await self.manifest.commit(
            ManifestBatch(ops=(retire,), reason="collection.retired", db_id=db_id)
        )


def _first_generation(view: ManifestView, fork: ForkRecord) -> GenerationRecord | None:
    """The generation that the fork began with, if its document still has to be stored."""
    database = view.database(fork.child_db_id)
    if database is None or database.state == "tombstoned":
        return None
    generation = view.generation(fork.child_db_id, fork.generation)
    return None if generation is None or generation.document_stored else generation


def _first_document(
    view: ManifestView, fork: ForkRecord
) -> tuple[GenerationRecord, ReadyDocument] | None:
    generation, database = _first_generation(view, fork), view.database(fork.child_db_id)
    if generation is None or database is None:
        return None
    # As the descriptor was when the fork was made: a second attempt must say the same (I7).
    database = msgspec.structs.replace(
        database, first_lsn=fork.first_lsn, next_chunk_id=fork.next_chunk_id, wal_position=b""
    )
    chunks = view.chunk_states(database.db_id, generation.generation)
    deltas = view.delta_view(database.db_id, generation.generation)
    return generation, make_document(database, generation, chunks, deltas)
