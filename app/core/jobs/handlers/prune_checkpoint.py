"""The `prune_checkpoint` job: what a deleted database leaves is removed and its blobs are retired.

What forks still need stays, with the tombstone, until the collector finds that nothing does.
"""

from collections.abc import Mapping
from typing import Any

from app.core.jobs.runner import JobContext
from app.core.retention.removal import DatabaseRemoval
from app.core.stores.manifest.ops import Op
from app.core.stores.manifest.store import ManifestStore


class PruneCheckpoint:
    def __init__(self, manifest: ManifestStore, removal: DatabaseRemoval) -> None:
        self._manifest = manifest
        self._removal = removal

    async def run(self, context: JobContext) -> Mapping[str, Any]:
        await context.update(reason="database.pruning", changes={"stage": "cleanup"})
        db_id = context.job.db_id
        removed = await self._removal.remove(db_id, touch=context.touch)
        with self._manifest.read() as view:
            forks = view.forks_of(db_id)
        return {
            "outcome": "pruned",
            "generations": removed.generations,
            "rows": removed.rows,
            "retired_blobs": removed.retired_blobs,
            "retired_bytes": removed.retired_bytes,
            "kept_for_forks": [f"{fork.tenant}/{fork.database}" for fork in forks],
        }

    async def abandon(self, context: JobContext) -> tuple[tuple[Op, ...], dict[str, Any]]:
        """The tombstone is final: the collector goes on with what is left."""
        del context
        return (), {}

    async def pause(self, context: JobContext) -> tuple[Op, ...]:
        del context
        return ()
