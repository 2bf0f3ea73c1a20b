"""How far the remote store is behind: for each database, the age of the newest position that the
bucket alone restores, and how old and large the WAL is that would be lost with this disk.

Invariants: only what is durable and confirmed counts as remote: a generation whose document is
stored (I3). Ages count from commit times on disk, so that a restart does not make anything look
fresh. Concurrency: the manifest is read on a thread; logs on the loop. Cancellation, crash: nothing
is held.
"""

from dataclasses import dataclass

from app.core.base.clock import Clock, wall_us
from app.core.base.errors import DatabaseNotFound
from app.core.services.directory import DatabaseDirectory
from app.core.stores.manifest.records import DatabaseRecord
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.manifest.view import ManifestView


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseFreshness:
    tenant: str
    database: str
    remote_age_seconds: float
    """Since the newest remote position was committed; since the database was made, without one."""
    unpublished_age_seconds: float
    """The same while there is WAL beyond it; 0 while the bucket has everything."""
    unpublished_bytes: int
    healthy: bool = True
    """Neither its WAL nor a generation of it is damaged or lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Position:
    record: DatabaseRecord
    since_us: int


class Freshness:
    def __init__(
        self, manifest: ManifestStore, directory: DatabaseDirectory, *, clock: Clock
    ) -> None:
        self._manifest = manifest
        self._directory = directory
        self._clock = clock

    async def look(self) -> list[DatabaseFreshness]:
        """In the order in which the databases were made."""
        positions = await self._manifest.read_in_thread(_positions)
        now = wall_us(self._clock)
        found = (self._of(position, now) for position in positions)
        return [one for one in found if one is not None]

    def _of(self, position: _Position, now_us: int) -> DatabaseFreshness | None:
        record = position.record
        try:
            log = self._directory.log(record.db_id)
        except DatabaseNotFound:
            return None  # it was deleted meanwhile
        age_seconds = max(0.0, (now_us - position.since_us) / 1e6)
        behind = log.durable_lsn > record.checkpointed_lsn and log.unpublished_bytes > 0
        return DatabaseFreshness(
            tenant=record.tenant,
            database=record.name,
            remote_age_seconds=age_seconds,
            unpublished_age_seconds=age_seconds if behind else 0.0,
            unpublished_bytes=log.unpublished_bytes if behind else 0,
            healthy=record.health == "ok" and log.health == "ok",
        )


def _positions(view: ManifestView) -> list[_Position]:
    found = []
    for record in view.all_databases():
        if record.state == "tombstoned":
            continue
        newest = view.latest_generation(record.db_id)
        if newest is not None and not newest.document_stored:
            newest = view.generation(record.db_id, newest.generation - 1)
        since_us = record.created_at_us if newest is None else newest.committed_at_us
        found.append(_Position(record=record, since_us=since_us))
    return found
