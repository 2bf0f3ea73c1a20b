"""Databases: create, show, list, wait for durability, accept a loss."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from app.core.base.clock import Clock, wall_us
from app.core.base.errors import DatabaseConflict, DatabaseNotFound, InvalidRequest
from app.core.base.events import Events
from app.core.services.directory import DatabaseDirectory
from app.core.services.history import earliest_kept
from app.core.services.page_state import page_state
from app.core.stores.manifest.errors import NameTaken
from app.core.stores.manifest.ops import (
    CreateDatabase,
    ManifestBatch,
    RaiseFloor,
    RemoveSegment,
    SetHealth,
)
from app.core.stores.manifest.records import Codec, DatabaseRecord, Engine, HealthState
from app.core.stores.manifest.store import ManifestStore

DEFAULT_PAGE_BYTES = 4096
DEFAULT_CHUNK_BYTES = 64 * 1024 * 1024
PAGE_BYTES_RANGE = (512, 65536)
CHUNK_BYTES_RANGE = (65536, 1 << 30)


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseSpec:
    """What a creator asks for; None takes the default, and agrees with whatever exists."""

    engine: Engine
    page_size: int | None = None
    chunk_bytes: int | None = None
    compression: Codec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseStatus:
    record: DatabaseRecord
    first_lsn: int
    next_lsn: int
    page_count: int
    """Of the newest committed state, WAL included."""
    wal_bytes: int
    health: HealthState
    lost_from_lsn: int | None
    earliest_generation: int | None
    """The oldest that can be restored now, and that no rule is about to drop."""
    latest_generation: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DurableStatus:
    durable_lsn: int
    checkpointed_lsn: int


class Databases:
    def __init__(
        self,
        manifest: ManifestStore,
        directory: DatabaseDirectory,
        *,
        clock: Clock,
        now_us: Callable[[], int],
        events: Events,
    ) -> None:
        """`now_us` is the time by which generations expire."""
        self._manifest = manifest
        self._directory = directory
        self._clock = clock
        self._now_us = now_us
        self._events = events
        self._accepting = asyncio.Lock()

    async def create(
        self, tenant: str, name: str, spec: DatabaseSpec
    ) -> tuple[DatabaseStatus, bool]:
        """The database, and whether it is new. The same spec again gives the same database.
        Raises DatabaseConflict where a given field differs, InvalidRequest for a bad size.
        """
        wanted = check_spec(spec)
        try:
            existing = self._directory.find(tenant, name)
        except DatabaseNotFound:
            existing = None
        if existing is None:
            try:
                receipt = await self._manifest.commit(
                    ManifestBatch(
                        ops=(
                            CreateDatabase(
                                tenant=tenant,
                                name=name,
                                engine=wanted.engine,
                                page_size=wanted.page_size or 0,
                                chunk_bytes=wanted.chunk_bytes or DEFAULT_CHUNK_BYTES,
                                compression=wanted.compression or "none",
                                created_at_us=wall_us(self._clock),
                            ),
                        ),
                        reason="database.created",
                    )
                )
            except NameTaken:
                existing = self._directory.find(tenant, name)
            else:
                await self._directory.open(receipt.results[0])
                self._events.info(
                    "database.created", tenant=tenant, database=name, engine=spec.engine
                )
                return self.get(tenant, name), True
        check_same(existing, spec)
        await self._directory.open(existing.db_id)  # another may be about to, or have failed to
        return self.get(tenant, name), False

    def get(self, tenant: str, name: str) -> DatabaseStatus:
        """Raises DatabaseNotFound."""
        return self._status(self._directory.read(tenant, name))

    def list(self, tenant: str, *, limit: int, after: str | None) -> list[DatabaseStatus]:
        """In order of their names, from the one behind `after`. One that is just being made is left
        out.
        """
        found: list[DatabaseStatus] = []
        while len(found) < limit:
            with self._manifest.read() as view:
                records = view.databases(tenant=tenant, after_name=after, limit=limit - len(found))
            if not records:
                break
            found += [self._status(one) for one in records if self._directory.is_open(one.db_id)]
            after = records[-1].name
        return found

    async def wait_durable(
        self, tenant: str, name: str, *, min_lsn: int, wait_seconds: float
    ) -> DurableStatus:
        """Answers as soon as the bucket alone can restore `min_lsn`, or when the time is over.
        It forces nothing.
        """
        record = self._directory.read(tenant, name)
        try:
            async with asyncio.timeout(wait_seconds):
                while record.checkpointed_lsn < min_lsn:
                    changed = self._directory.checkpointed_feed(record.db_id)
                    record = self._directory.read(tenant, name)
                    if record.checkpointed_lsn >= min_lsn:
                        changed.cancel()
                        break
                    await changed
                    record = self._directory.read(tenant, name)
        except TimeoutError:
            record = self._directory.read(tenant, name)
        log = self._directory.log(record.db_id)
        return DurableStatus(durable_lsn=log.next_lsn - 1, checkpointed_lsn=record.checkpointed_lsn)

    async def acknowledge_loss(self, tenant: str, name: str) -> DatabaseStatus:
        """The operator accepts that unpublished WAL is lost; appends go on above every LSN that
        was ever given out (I14). Without a loss nothing changes.
        """
        async with self._accepting:  # whoever comes second finds no loss any more
            record = self._directory.read(tenant, name)
            log = self._directory.log(record.db_id)
            if log.health == "wal_lost":
                await self._manifest.commit(
                    ManifestBatch(
                        ops=(
                            RaiseFloor(db_id=record.db_id, floor_lsn=log.next_lsn),
                            SetHealth(db_id=record.db_id, health="ok"),
                            *(
                                RemoveSegment(db_id=record.db_id, segment_id=segment_id)
                                for segment_id in log.lost_segment_ids
                            ),
                        ),
                        reason="database.loss_acknowledged",
                        db_id=record.db_id,
                    )
                )
                await log.acknowledge_loss()
                self._events.warning(
                    "database.loss_acknowledged", tenant=tenant, database=name,
                    lost_from_lsn=record.lost_from_lsn,
                )  # fmt: skip
        return self.get(tenant, name)

    def _status(self, record: DatabaseRecord) -> DatabaseStatus:
        log = self._directory.log(record.db_id)
        with self._manifest.read() as view:
            earliest = earliest_kept(view, record, now_us=self._now_us())
            page_count = record.page_count
            if record.engine == "libsql":
                page_count = page_state(view, record, log).page_count
        return DatabaseStatus(
            record=record,
            first_lsn=record.first_lsn,
            next_lsn=log.next_lsn,
            page_count=page_count,
            wal_bytes=log.wal_bytes,
            health=record.health if log.health == "ok" else log.health,
            lost_from_lsn=log.lost_from_lsn,
            earliest_generation=earliest,
            latest_generation=record.generation or None,
        )


def check_spec(spec: DatabaseSpec) -> DatabaseSpec:
    """The spec with its defaults filled in. Raises InvalidRequest."""
    chunk_bytes = spec.chunk_bytes or DEFAULT_CHUNK_BYTES
    if not _power_of_two(chunk_bytes, CHUNK_BYTES_RANGE):
        raise InvalidRequest(
            "chunk_bytes must be a power of two from 65536 to 1073741824.", chunk_bytes=chunk_bytes
        )
    if spec.engine == "append_only":
        if spec.page_size is not None:
            raise InvalidRequest("page_size is for libsql databases only.")
        return DatabaseSpec(
            engine=spec.engine, chunk_bytes=chunk_bytes, compression=spec.compression or "none"
        )
    page_size = spec.page_size or DEFAULT_PAGE_BYTES
    if not _power_of_two(page_size, PAGE_BYTES_RANGE):
        raise InvalidRequest(
            "page_size must be a power of two from 512 to 65536.", page_size=page_size
        )
    return DatabaseSpec(
        engine=spec.engine, page_size=page_size, chunk_bytes=chunk_bytes,
        compression=spec.compression or "zstd",
    )  # fmt: skip


def check_same(existing: DatabaseRecord, spec: DatabaseSpec) -> None:
    """Raises DatabaseConflict naming each given field that differs."""
    given = {
        "engine": (spec.engine, existing.engine),
        "page_size": (spec.page_size, existing.page_size),
        "chunk_bytes": (spec.chunk_bytes, existing.chunk_bytes),
        "compression": (spec.compression, existing.compression),
    }
    differing = {
        name: {"given": asked, "existing": has}
        for name, (asked, has) in given.items()
        if asked is not None and asked != has
    }
    if differing:
        raise DatabaseConflict(
            f"The database exists with another {', '.join(differing)}.", differing=differing
        )


def _power_of_two(value: int, limits: tuple[int, int]) -> bool:
    return limits[0] <= value <= limits[1] and value & (value - 1) == 0
