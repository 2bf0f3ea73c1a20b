"""Checkpoints on demand."""

from collections.abc import Callable

from app.core.coordination.flags import require_enabled
from app.core.jobs.checkpoint_requests import CheckpointRequests
from app.core.services.directory import DatabaseDirectory
from app.core.stores.manifest.ops import Op
from app.core.stores.manifest.records import JobRecord
from app.core.stores.manifest.store import ManifestStore


class Checkpoints:
    def __init__(
        self, manifest: ManifestStore, directory: DatabaseDirectory, requests: CheckpointRequests
    ) -> None:
        self._manifest = manifest
        self._directory = directory
        self._requests = requests

    async def trigger(
        self,
        tenant: str,
        database: str,
        *,
        reason: str | None,
        principal: str,
        remember: Callable[[JobRecord], Op] | None = None,
    ) -> JobRecord:
        """A pending job that covers all that was acknowledged before this call: one that waits
        and has not planned yet, or a new one. `remember` makes the op that stores the answer, in
        the job's own commit. Raises DatabaseNotFound, FeatureDisabled, QueueDrained,
        Backpressure.
        """
        record = self._directory.read(tenant, database)
        with self._manifest.read() as view:
            require_enabled(view, tenant, "enable_checkpoints")
        return await self._requests.request(
            record, reason=reason, principal=principal, remember=remember
        )
