"""What a checkpoint's stages see of the job that they belong to."""

from typing import Any, Protocol

from app.core.stores.manifest.conditions import Precondition
from app.core.stores.manifest.ops import Op, Receipt
from app.core.stores.manifest.records import JobRecord


class JobHold(Protocol):
    """The executor's hold on its job row; `jobs.runner.JobContext` is one."""

    job: JobRecord

    async def update(
        self,
        *,
        reason: str,
        changes: dict[str, Any],
        ops: tuple[Op, ...] = (),
        preconditions: tuple[Precondition, ...] = (),
        allow_cancelled: bool = False,
    ) -> Receipt: ...

    def touch(self) -> None: ...
