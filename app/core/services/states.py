"""Which state of a libsql database a caller means: the newest, a generation, a snapshot, a time."""

from collections.abc import Iterator
from dataclasses import dataclass

from app.core.base.errors import SnapshotNotFound
from app.core.reads.image import generation_at
from app.core.reads.page_store import PageStore
from app.core.reads.read_point import ReadPoint
from app.core.services.directory import DatabaseDirectory
from app.core.stores.manifest.records import GenerationRecord
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


StateSelector = Newest | AtGeneration | AtSnapshot | AtTime


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
        match selector:
            case Newest():
                return await self._store.point(database.db_id)
            case AtGeneration(generation):
                return await self._store.point(database.db_id, generation=generation)
            case AtTime(time_us):
                found = generation_at(self._generations(database.db_id), time_us)
                return await self._store.point(database.db_id, generation=found.generation)
            case AtSnapshot(snapshot):
                raise SnapshotNotFound(
                    f"There is no snapshot {snapshot} of {tenant}/{name}.", snapshot=snapshot
                )

    def _generations(self, db_id: int) -> Iterator[GenerationRecord]:
        after: int | None = None
        while True:
            with self._manifest.read() as view:
                records = view.generations(db_id, after=after, limit=_RECORDS_AT_ONCE)
            yield from records
            if len(records) < _RECORDS_AT_ONCE:
                return
            after = records[-1].generation
