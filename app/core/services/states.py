"""Which state of a libsql database a caller means: the newest, a generation, a snapshot, a time."""

from collections.abc import Iterator
from dataclasses import dataclass

from app.core.reads.image import generation_at
from app.core.reads.page_store import PageStore
from app.core.reads.read_point import ReadPoint
from app.core.retention.selection import require_snapshot
from app.core.services.directory import DatabaseDirectory
from app.core.stores.manifest.records import DatabaseRecord, GenerationRecord
from app.core.stores.manifest.store import ManifestStore

_RECORDS_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class Newest:
    """With what the write-ahead log has."""


@dataclass(frozen=True, slots=True)
class AtGeneration:
    generation: int


@dataclass(frozen=True, slots=True)
class AtSnapshot:
    name: str


@dataclass(frozen=True, slots=True)
class AtTime:
    """The newest generation committed by then."""

    time_us: int


PublishedSelector = AtGeneration | AtSnapshot | AtTime
StateSelector = Newest | PublishedSelector


class States:
    def __init__(
        self, manifest: ManifestStore, directory: DatabaseDirectory, store: PageStore
    ) -> None:
        self._manifest = manifest
        self._directory = directory
        self._store = store

    async def open(self, tenant: str, name: str, selector: StateSelector) -> ReadPoint:
        """To be released by the caller. Raises DatabaseNotFound, WrongEngine, GenerationExpired,
        NotFound, SnapshotNotFound, NoGeneration, CorruptWal.
        """
        database, _ = self._directory.require(tenant, name, "libsql")
        if isinstance(selector, Newest):
            return await self._store.point(database.db_id)
        generation = self.generation_of(database, selector)
        return await self._store.point(database.db_id, generation=generation)

    def generation_of(self, database: DatabaseRecord, selector: PublishedSelector) -> int:
        """Which may have expired: reading tells. Raises SnapshotNotFound, GenerationExpired,
        NoGeneration.
        """
        match selector:
            case AtGeneration(generation):
                return generation
            case AtTime(time_us):
                parent = database.forked_from
                first_ever = 1 if parent is None else parent.generation
                retained = self._generations(database.db_id)
                return generation_at(retained, time_us, first_ever=first_ever).generation
            case AtSnapshot(snapshot):
                with self._manifest.read() as view:
                    return require_snapshot(view, database, snapshot).generation

    def _generations(self, db_id: int) -> Iterator[GenerationRecord]:
        after: int | None = None
        while True:
            with self._manifest.read() as view:
                records = view.generations(db_id, after=after, limit=_RECORDS_AT_ONCE)
            yield from records
            if len(records) < _RECORDS_AT_ONCE:
                return
            after = records[-1].generation
