"""The part of fsck that looks at the WAL (I1, I4)."""

from collections.abc import Callable, Iterable
from pathlib import Path

from app.core.base.tasks import BlockingPool
from app.core.formats.damage import Damage
from app.core.stores.manifest.records import DatabaseRecord, WalSegmentRecord
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.wal.disk import SystemDisk
from app.core.stores.wal.segments import segment_name
from app.core.stores.wal.unregistered import (
    known_lsn,
    newer_than_rows_blocking,
    segment_ids_blocking,
)
from app.core.stores.wal.verification import verify_segment_blocking


class WalCheck:
    def __init__(self, manifest: ManifestStore, wal_root: Path, *, pool: BlockingPool) -> None:
        self._manifest = manifest
        self._wal_root = wal_root
        self._pool = pool

    async def run(
        self,
        segments: Iterable[WalSegmentRecord],
        databases: Iterable[DatabaseRecord],
        *,
        add: Callable[[str, str, str], None],
        count: Callable[[str], None],
    ) -> None:
        """Sealed segments byte for byte; open ones are recovery's to judge."""
        for row in segments:
            path = self._wal_root / str(row.db_id) / segment_name(row.segment_id)
            where = f"wal/{row.db_id}/{row.segment_id}"
            if row.state in {"checkpointed", "dropped"} or not await self._still(row):
                continue
            if not path.exists():
                if await self._still(row):
                    add("I4", where, "WAL that no generation covers is missing")
                continue
            count("wal_segments")
            if row.state == "sealed":
                try:
                    await self._pool.run(verify_segment_blocking, path)
                except FileNotFoundError:
                    continue
                except Damage as damage:
                    add("I1", where, str(damage))

        for database in databases:
            if (newer := await self._newer_than_rows(database.db_id)) is not None:
                where = f"wal/{database.db_id}/{newer}"
                add("I1", where, "acknowledged after this manifest, an older one, was made")

    async def _newer_than_rows(self, db_id: int) -> int | None:
        """The files first: by the time their rows are read, each acknowledged one has its row."""
        disk, directory = SystemDisk(), self._wal_root / str(db_id)
        files = await self._pool.run(segment_ids_blocking, disk, directory)
        with self._manifest.read() as view:
            database, rows = view.database(db_id), view.segments(db_id)
        if database is None or files <= {row.segment_id for row in rows}:
            return None
        return await self._pool.run(
            lambda: newer_than_rows_blocking(
                disk,
                directory,
                db_id=db_id,
                segment_ids=files - {row.segment_id for row in rows},
                known_lsn=known_lsn(database.floor_lsn, rows),
            )
        )

    async def _still(self, row: WalSegmentRecord) -> bool:
        with self._manifest.read() as view:
            return row in view.segments(row.db_id)
