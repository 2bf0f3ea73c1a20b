"""Jobs that publish chunks, `create_checkpoint` and `coalesce_chunks`: a thin hold between the
runner and the executor.
"""

from collections.abc import Mapping
from typing import Any

from app.core.checkpoint.executor import CheckpointExecutor
from app.core.jobs.runner import JobContext
from app.core.stores.manifest.ops import Op


class PublishChunks:
    def __init__(self, executor: CheckpointExecutor) -> None:
        self._executor = executor

    async def run(self, context: JobContext) -> Mapping[str, Any]:
        return await self._executor.run(context)

    async def abandon(self, context: JobContext) -> tuple[tuple[Op, ...], dict[str, Any]]:
        return await self._executor.abandon(context)

    async def pause(self, context: JobContext) -> tuple[Op, ...]:
        return await self._executor.pause(context)
