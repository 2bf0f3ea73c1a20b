"""What was published, and when."""

from app.core.services.directory import DatabaseDirectory
from app.core.stores.manifest.records import GenerationRecord
from app.core.stores.manifest.store import ManifestStore


class History:
    def __init__(self, manifest: ManifestStore, directory: DatabaseDirectory) -> None:
        self._manifest = manifest
        self._directory = directory

    def generations(
        self, tenant: str, name: str, *, limit: int, after: int | None
    ) -> list[GenerationRecord]:
        """Oldest first, from the one behind `after`. Raises DatabaseNotFound."""
        record = self._directory.read(tenant, name)
        with self._manifest.read() as view:
            return view.generations(record.db_id, after=after, limit=limit)
