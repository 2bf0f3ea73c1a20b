"""The write-ahead logs on this disk, database by database. Loop-confined; nothing is changed."""

from dataclasses import dataclass
from itertools import islice

from app.core.base.errors import DatabaseNotFound
from app.core.services.directory import DatabaseDirectory
from app.core.stores.manifest.records import DatabaseRecord, Engine, HealthState, WalSegmentRecord
from app.core.stores.manifest.store import ManifestStore


@dataclass(frozen=True, slots=True, kw_only=True)
class LogOverview:
    tenant: str
    database: str
    db_id: int
    engine: Engine
    health: HealthState
    first_lsn: int | None
    next_lsn: int
    checkpointed_lsn: int
    wal_bytes: int
    unpublished_bytes: int
    segments: tuple[WalSegmentRecord, ...]


class WalOverview:
    def __init__(self, manifest: ManifestStore, directory: DatabaseDirectory) -> None:
        self._manifest = manifest
        self._directory = directory

    def list(self, *, limit: int, after: int | None) -> list[LogOverview]:
        """By db_id, from the one behind `after`."""
        with self._manifest.read() as view:
            records = [
                record
                for record in view.all_databases()
                if record.state != "tombstoned" and (after is None or record.db_id > after)
            ]
        logs = (self._of(record) for record in records)
        return list(islice((log for log in logs if log is not None), limit))

    def _of(self, record: DatabaseRecord) -> LogOverview | None:
        try:
            log = self._directory.log(record.db_id)
        except DatabaseNotFound:
            return None  # it is being deleted
        with self._manifest.read() as view:
            segments = tuple(view.segments(record.db_id))
        return LogOverview(
            tenant=record.tenant,
            database=record.name,
            db_id=record.db_id,
            engine=record.engine,
            health=log.health,
            first_lsn=log.first_lsn,
            next_lsn=log.next_lsn,
            checkpointed_lsn=record.checkpointed_lsn,
            wal_bytes=log.wal_bytes,
            unpublished_bytes=log.unpublished_bytes,
            segments=segments,
        )
