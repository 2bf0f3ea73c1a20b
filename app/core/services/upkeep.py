"""What an operator does to a running service: drain the queue, clear scratch, check the quota."""

from dataclasses import dataclass
from typing import Literal

from app.core.coordination.reconciliation import QuotaReconciliation, ReconciliationReport
from app.core.jobs.queue import JobQueue
from app.core.workers.janitor import JanitorReport, ScratchJanitor


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueStatus:
    state: Literal["open", "draining", "drained"]
    """Drained: no new job is taken, and none waits or runs any more."""
    pending: int
    in_flight: int
    depth_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UpkeepReport:
    scratch: JanitorReport
    quota: ReconciliationReport


class Upkeep:
    def __init__(
        self, queue: JobQueue, janitor: ScratchJanitor, reconciliation: QuotaReconciliation
    ) -> None:
        self._queue = queue
        self._janitor = janitor
        self._reconciliation = reconciliation

    def queue(self) -> QueueStatus:
        in_flight = len(self._queue.claimed_ids)
        pending = self._queue.depth - self._queue.aside_count
        state: Literal["open", "draining", "drained"] = "open"
        if self._queue.draining:
            state = "draining" if pending or in_flight else "drained"
        return QueueStatus(
            state=state, pending=pending, in_flight=in_flight, depth_max=self._queue.depth_max
        )

    async def drain_queue(self) -> QueueStatus:
        """New jobs are refused from here on, restarts included; those that are there go on."""
        await self._queue.set_draining(True)
        return self.queue()

    async def resume_queue(self) -> QueueStatus:
        await self._queue.set_draining(False)
        return self.queue()

    async def run_janitor(self, *, max_age_seconds: float) -> UpkeepReport:
        """Scratch of no live job goes if it is that old, and the quota's books are made right."""
        scratch = await self._janitor.run_once(max_age_seconds=max_age_seconds)
        quota = await self._reconciliation.run_once(live_jobs=self._queue.unfinished_ids)
        return UpkeepReport(scratch=scratch, quota=quota)
