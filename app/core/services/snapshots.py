"""Snapshots: names that pin a generation.

Invariants: I8: the row is the pin; it is committed before anything else is done, and judged there
against the generation's row, so that a collection under way is met or refused. I13: the document
in the bucket follows the row; without one the row stands and the document is stored later.
Concurrency: two of one name: one is refused inside its transaction. Cancellation: at any await;
a commit may still take effect. Crash: see `checkpoint/history_objects.py`.
"""

import asyncio
from collections.abc import Callable

from app.core.base.clock import Clock, wall_us
from app.core.base.errors import (
    BopError,
    DatabaseNotFound,
    GenerationExpired,
    SnapshotExists,
    SnapshotNotFound,
)
from app.core.base.events import Events
from app.core.retention.selection import require_snapshot, select_generation
from app.core.retention.snapshot_document import with_document
from app.core.services.directory import DatabaseDirectory
from app.core.stores.manifest.errors import GenerationGone, MissingRow, SnapshotTaken, WrongState
from app.core.stores.manifest.ops import (
    CreateSnapshot,
    DeleteSnapshot,
    ManifestBatch,
    Op,
)
from app.core.stores.manifest.records import SnapshotRecord
from app.core.stores.manifest.store import ManifestStore
from app.core.workers.history_upload import HistoryUpload

STORE_SECONDS = 10.0
"""How long a new snapshot waits for its document. It is a pin without one, too."""


class Snapshots:
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
        name: str,
        *,
        generation: int | None = None,
        remember: Callable[[SnapshotRecord], Op] | None = None,
    ) -> SnapshotRecord:
        """By default of the newest published generation. `remember` gives an op for the same
        commit. Raises DatabaseNotFound, NoGeneration, GenerationExpired, NotFound, SnapshotExists.
        """
        record = self._directory.read(tenant, database)
        with self._manifest.read() as view:
            pinned = select_generation(view, record, generation=generation)
        row = with_document(
            record,
            SnapshotRecord(
                db_id=record.db_id,
                name=name,
                generation=pinned.generation,
                last_lsn=pinned.last_lsn,
                page_count=pinned.page_count,
                created_at_us=wall_us(self._clock),
            ),
        )
        ops: list[Op] = [CreateSnapshot(row=row)]
        if remember is not None:
            ops.append(remember(row))
        try:
            await self._manifest.commit(
                ManifestBatch(ops=tuple(ops), reason="snapshot.created", db_id=record.db_id)
            )
        except SnapshotTaken as refusal:
            raise SnapshotExists(
                f"{tenant}/{database} has a snapshot {name}.", snapshot=name
            ) from refusal
        except GenerationGone as refusal:
            raise GenerationExpired(
                f"Generation {row.generation} is no longer retained.", generation=row.generation
            ) from refusal
        except (MissingRow, WrongState) as refusal:
            raise DatabaseNotFound(tenant=tenant, database=database) from refusal
        self._events.info(
            "snapshot.created", tenant=tenant, database=database, snapshot=name,
            generation=row.generation,
        )  # fmt: skip
        try:
            async with asyncio.timeout(STORE_SECONDS):
                await self._upload.objects.store_snapshot(row)
        except (TimeoutError, BopError) as error:  # the row stands, and the rest follows
            self._events.warning("snapshot.document_waits", snapshot=name, detail=str(error))
            self._upload.wake()
        return row

    def get(self, tenant: str, database: str, name: str) -> SnapshotRecord:
        """Raises DatabaseNotFound, SnapshotNotFound."""
        record = self._directory.read(tenant, database)
        with self._manifest.read() as view:
            return require_snapshot(view, record, name)

    def list(
        self, tenant: str, database: str, *, limit: int, after: str | None
    ) -> list[SnapshotRecord]:
        """By name, from the one behind `after`. Raises DatabaseNotFound."""
        record = self._directory.read(tenant, database)
        with self._manifest.read() as view:
            found = view.snapshots(record.db_id)
        return [one for one in found if after is None or one.name > after][:limit]

    async def delete(self, tenant: str, database: str, name: str) -> None:
        """The pin is gone on return; its document goes with the next collection. Raises
        DatabaseNotFound, SnapshotNotFound.
        """
        row = self.get(tenant, database, name)
        gone = DeleteSnapshot(db_id=row.db_id, name=name)
        try:
            await self._manifest.commit(
                ManifestBatch(ops=(gone,), reason="snapshot.deleted", db_id=row.db_id)
            )
        except MissingRow as refusal:
            raise SnapshotNotFound(snapshot=name) from refusal
        self._events.info("snapshot.deleted", tenant=tenant, database=database, snapshot=name)
