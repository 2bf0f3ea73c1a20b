"""The job queue as a whole, and the janitor on demand."""

from app.client.calls import Calls, decoded
from app.client.wire import Answer

JANITOR_SECONDS_MAX = 600.0


class QueueState(Answer, frozen=True):
    state: str
    pending: int
    in_flight: int
    depth_max: int


class JanitorReport(Answer, frozen=True):
    scanned: int
    removed: list[str]
    failed: list[str]
    removed_bytes: int
    released_bytes: int
    quota_files: int
    quota_corrected: int
    quota_drift_bytes: int


class Upkeep:
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def queue(self) -> QueueState:
        return await self._calls.get("/admin/queue", QueueState)

    async def drain_queue(self) -> QueueState:
        return decoded(await self._calls.send("POST", "/admin/queue/drain"), QueueState)

    async def resume_queue(self) -> QueueState:
        return decoded(await self._calls.send("POST", "/admin/queue/resume"), QueueState)

    async def run_janitor(self, *, max_age_seconds: float = 0.0) -> JanitorReport:
        """Takes as long as the data directory has files."""
        response = await self._calls.send(
            "POST",
            "/admin/janitor/run",
            json={"max_age_seconds": max_age_seconds},
            wait_seconds=JANITOR_SECONDS_MAX,
        )
        return decoded(response, JanitorReport)
