"""Names to open databases: the one look-up every service starts with. Loop-confined."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from weakref import WeakValueDictionary

from app.core.base.errors import DatabaseNotFound, WrongEngine
from app.core.base.events import Events
from app.core.formats.segment import EngineCode
from app.core.stores.manifest.ops import ManifestBatch, Op, RaiseFloor, SetHealth
from app.core.stores.manifest.records import DatabaseRecord, Engine, WalSegmentRecord
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.wal.log import WalLog
from app.core.stores.wal.remembered import RememberedAppend
from app.core.stores.wal.room import EndlessRoom, WalRoom
from app.core.stores.wal.segments import CatalogSegment, LogConfig
from app.core.stores.wal.store import WalStore

ENGINE_CODES: dict[Engine, EngineCode] = {
    "append_only": EngineCode.APPEND_ONLY,
    "libsql": EngineCode.LIBSQL,
}


class DatabaseDirectory:
    def __init__(
        self,
        manifest: ManifestStore,
        wal: WalStore,
        *,
        events: Events,
        open_room: Callable[[DatabaseRecord], WalRoom] = lambda _: EndlessRoom(),
    ) -> None:
        self._manifest = manifest
        self._wal = wal
        self._open_room = open_room
        self._events = events
        self._ids: dict[tuple[str, str], DatabaseRecord] = {}  # fixed properties only
        self._checkpointed: dict[int, set[asyncio.Future[None]]] = defaultdict(set)
        self._opening: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()

    async def open_all(self) -> None:
        """At start: recovers every database's WAL. Damage is reported per database."""
        with self._manifest.read() as view:
            db_ids = [record.db_id for record in view.all_databases()]
        for db_id in db_ids:
            await self.open(db_id)

    async def open(self, db_id: int) -> WalLog:
        """The database's log; one that is open, or is being opened by another, is that one."""
        async with self._opening.setdefault(db_id, asyncio.Lock()):
            try:
                return self._wal.log(db_id)
            except DatabaseNotFound:
                return await self._open(db_id)

    async def _open(self, db_id: int) -> WalLog:
        with self._manifest.read() as view:
            record = view.database(db_id)
            rows = view.segments(db_id)
            remembered = view.remembered_appends(db_id)
        if record is None:
            raise DatabaseNotFound(db_id=db_id)
        log = await self._wal.open_log(
            LogConfig(
                db_id=db_id,
                engine=ENGINE_CODES[record.engine],
                chunk_bytes=record.chunk_bytes,
                floor_lsn=record.floor_lsn,
                has_lived=_has_lived(record, rows),
                page_size=record.page_size,
                remembered=tuple(
                    RememberedAppend(
                        key_hash=append.key_hash,
                        body_hash=append.body_hash,
                        first_lsn=append.first_lsn,
                        last_lsn=append.last_lsn,
                        payload_bytes=append.payload_bytes,
                        appended_at_us=append.appended_at_us,
                    )
                    for appends in remembered.values()
                    for append in appends
                ),
            ),
            tuple(catalog_segment(row) for row in rows),
            room=self._open_room(record),
        )
        await self._tell_health(record, log)
        return log

    def find(self, tenant: str, name: str) -> DatabaseRecord:
        """The database's fixed properties (ids, engine, sizes), from memory where known; its
        other fields may be old. Raises DatabaseNotFound.
        """
        known = self._ids.get((tenant, name))
        if known is None:
            known = self.read(tenant, name)
            self._ids[tenant, name] = known
        return known

    def read(self, tenant: str, name: str) -> DatabaseRecord:
        """The row as it is now. Raises DatabaseNotFound."""
        with self._manifest.read() as view:
            db_id = view.database_id(tenant, name)
            record = view.database(db_id) if db_id is not None else None
        if record is None or record.state == "tombstoned":
            raise DatabaseNotFound(
                f"There is no database {tenant}/{name}.", tenant=tenant, database=name
            )
        return record

    def require(self, tenant: str, name: str, engine: Engine) -> tuple[DatabaseRecord, WalLog]:
        """Raises DatabaseNotFound, WrongEngine."""
        record = self.find(tenant, name)
        if record.engine != engine:
            raise WrongEngine(
                f"{tenant}/{name} is of the engine {record.engine}; this call is for {engine}.",
                engine=record.engine,
            )
        return record, self.log(record.db_id)

    def log(self, db_id: int) -> WalLog:
        return self._wal.log(db_id)

    def is_open(self, db_id: int) -> bool:
        """False while a database is being made or taken apart."""
        try:
            self._wal.log(db_id)
        except DatabaseNotFound:
            return False
        return True

    def forget(self, tenant: str, name: str) -> None:
        self._ids.pop((tenant, name), None)

    def checkpointed_feed(self, db_id: int) -> asyncio.Future[None]:
        """Resolves when `checkpointed_lsn` next moves. Take it before reading."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiters = self._checkpointed[db_id]
        waiters.add(waiter)
        waiter.add_done_callback(waiters.discard)
        return waiter

    def notify_checkpointed(self, db_id: int) -> None:
        for waiter in list(self._checkpointed.pop(db_id, ())):
            if not waiter.done():
                waiter.set_result(None)

    async def _tell_health(self, record: DatabaseRecord, log: WalLog) -> None:
        """Puts what recovery found into the row, so that it is shown after the next restart too."""
        if log.health == record.health or (
            log.health == "ok" and record.health == "unhealthy_generation"
        ):
            return
        ops: list[Op] = [
            SetHealth(db_id=record.db_id, health=log.health, lost_from_lsn=log.lost_from_lsn)
        ]
        if log.health == "wal_lost":
            ops.append(RaiseFloor(db_id=record.db_id, floor_lsn=log.next_lsn))
        await self._manifest.commit(
            ManifestBatch(ops=tuple(ops), reason="database.health", db_id=record.db_id)
        )
        self._events.error(
            "database.unhealthy", tenant=record.tenant, database=record.name, health=log.health,
            lost_from_lsn=log.lost_from_lsn,
        )  # fmt: skip


def _has_lived(record: DatabaseRecord, rows: Sequence[WalSegmentRecord]) -> bool:
    """Whether it had segments, or published, which takes a log that was open."""
    born_at = record.forked_from.generation if record.forked_from else 0
    return record.state != "tombstoned" and (bool(rows) or record.generation > born_at)


def catalog_segment(row: WalSegmentRecord) -> CatalogSegment:
    return CatalogSegment(
        segment_id=row.segment_id,
        first_lsn=row.first_lsn,
        ceiling_lsn=row.ceiling_lsn,
        # Of a dropped one, as of a published one, nothing depends on the file.
        state="checkpointed" if row.state == "dropped" else row.state,
        last_lsn=row.last_lsn,
    )
