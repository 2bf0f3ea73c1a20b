"""Keeps the change log bounded: what no subscriber needs goes, some at a time.

Invariants: I11: the log holds at most its history and what live cursors have not acknowledged, and
a cursor counts as live up to the lag cap. I14: see `stores/manifest/change_log.py`.
Concurrency: one round at a time; each step is a commit of its own, so that others get between.
Cancellation, crash: the next round goes on.
"""

from app.core.base.clock import Clock
from app.core.base.errors import BopError
from app.core.base.events import Events
from app.core.stores.manifest.ops import ManifestBatch, TrimChangeLog
from app.core.stores.manifest.store import ManifestStore

INTERVAL_SECONDS = 30.0


class ChangeTrim:
    name = "change_trim"

    def __init__(
        self,
        manifest: ManifestStore,
        *,
        clock: Clock,
        events: Events,
        history_count: int,
        lag_count_max: int,
    ) -> None:
        self._manifest = manifest
        self._clock = clock
        self._events = events
        self._op = TrimChangeLog(history_count=history_count, lag_count_max=lag_count_max)

    async def run(self) -> None:
        while True:
            try:
                await self.run_once()
            except BopError as error:
                self._events.error("changes.trim_failed", code=error.code, detail=str(error))
            await self._clock.sleep(INTERVAL_SECONDS)

    async def run_once(self) -> int:
        """Returns how many changes went."""
        total = 0
        while self._may_have_work():
            receipt = await self._manifest.commit(
                ManifestBatch(ops=(self._op,), reason="changes.trimmed")
            )
            if not (trimmed := receipt.results[0]):
                break
            total += trimmed
        if total:
            self._events.info("changes.trimmed", changes=total)
        return total

    def _may_have_work(self) -> bool:
        """Without a write transaction."""
        with self._manifest.read() as view:
            return view.last_sequence() - view.trimmed_through() > self._op.history_count
