"""The part of fsck that looks at what collection rests on: its indexes and its queue (I8)."""

from collections.abc import Callable, Iterable

from app.core.stores.manifest.derived import index_entries
from app.core.stores.manifest.records import ChunkDeltaRecord, ChunkRecord, GcRecord
from app.core.stores.manifest.view import ManifestView

Row = ChunkRecord | ChunkDeltaRecord


def index_differences(view: ManifestView) -> list[str]:
    """Where the indexes that collection trusts are not what the rows say."""
    expected: dict[str, set[bytes]] = {}
    for record in view.all_databases():
        rows: list[Row] = [*view.chunk_rows(record.db_id)]
        rows += view.delta_rows(record.db_id)
        for row in rows:
            for table, key in index_entries(row):
                expected.setdefault(table, set()).add(key)
    return [
        f"{table}[{key.hex()}] {'is missing' if key in expected.get(table, ()) else 'has no row'}"
        for table, found in view.derived_indexes().items()
        for key in found ^ expected.get(table, set())
    ]


def check_retired(
    retired: Iterable[GcRecord], rows: Iterable[Row], add: Callable[[str, str, str], None]
) -> None:
    """A blob is queued only while no row names it, as its own or as a base."""
    queued = {row.key for row in retired}
    for row in rows:
        if row.blob is not None and row.blob.key in queued:
            add("I8", row.blob.key, "a blob that a row names is queued for collection")
        if isinstance(row, ChunkDeltaRecord) and row.base_key in queued:
            add("I8", row.base_key, "a base of a delta is queued for collection")
