"""The newest generation of each database, read once per version of the manifest.

A read of a hot page takes little more than two rows of the manifest otherwise. Rows of a version
are right for as long as that version is the newest; who was told of a commit never sees older ones.
Concurrency: loop-confined, without an await. Memory: a few rows for each database, the least
recently read go first. Crash: nothing here outlives the process.
"""

from collections import OrderedDict
from dataclasses import dataclass

from app.core.base.errors import DatabaseNotFound
from app.core.stores.manifest.records import DatabaseRecord
from app.core.stores.manifest.store import ManifestStore

HEADS_MAX = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """`generation` 0: nothing is published; then `lsn` and `page_count` are 0, too."""

    database: DatabaseRecord
    generation: int
    lsn: int
    page_count: int
    pages_per_chunk: int
    version: int
    """Of the manifest's view that this was read in."""


class Heads:
    def __init__(self, manifest: ManifestStore, *, heads_max: int = HEADS_MAX) -> None:
        self._manifest = manifest
        self._heads_max = heads_max
        self._heads: OrderedDict[int, Head] = OrderedDict()

    def __len__(self) -> int:
        return len(self._heads)

    def get(self, db_id: int) -> Head:
        """As it is now. Raises DatabaseNotFound."""
        head = self._heads.get(db_id)
        if head is None or head.version != self._manifest.version:
            self._heads.pop(db_id, None)
            head = self._heads[db_id] = self._read(db_id)
            if len(self._heads) > self._heads_max:
                self._heads.popitem(last=False)
        else:
            self._heads.move_to_end(db_id)
        return head

    def _read(self, db_id: int) -> Head:
        with self._manifest.read() as view:
            version = view.version()  # the view's own: the newest commit may not be in it yet
            database = view.database(db_id)
            if database is None or database.state == "tombstoned":
                raise DatabaseNotFound(db_id=db_id)
            published = view.generation(db_id, database.generation)
        return Head(
            database=database,
            generation=0 if published is None else published.generation,
            lsn=0 if published is None else published.last_lsn,
            page_count=0 if published is None else published.page_count,
            pages_per_chunk=database.chunk_bytes // max(1, database.page_size),
            version=version,
        )
