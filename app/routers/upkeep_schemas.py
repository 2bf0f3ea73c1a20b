"""What the queue's state and the janitor's report look like."""

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field

from app.core.services.upkeep import QueueStatus, UpkeepReport
from app.routers.schemas import EXAMPLE_JOB_ID, Body, View, example


class QueueView(View):
    model_config = ConfigDict(
        json_schema_extra=example(
            {"state": "draining", "pending": 2, "in_flight": 1, "depth_max": 10_000}
        )
    )

    state: Literal["open", "draining", "drained"]
    """Drained: no new job is taken, and none waits or runs any more."""
    pending: int
    in_flight: int
    depth_max: int

    @classmethod
    def of(cls, status: QueueStatus) -> Self:
        return cls(
            state=status.state,
            pending=status.pending,
            in_flight=status.in_flight,
            depth_max=status.depth_max,
        )


class RunJanitorBody(Body):
    model_config = ConfigDict(json_schema_extra=example({"max_age_seconds": 0}))

    max_age_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0
    """Scratch of no live job that changed within that time stays."""


class JanitorView(View):
    model_config = ConfigDict(
        json_schema_extra=example(
            {
                "scanned": 3,
                "removed": [EXAMPLE_JOB_ID],
                "failed": [],
                "removed_bytes": 67_108_864,
                "released_bytes": 0,
                "quota_files": 12,
                "quota_corrected": 0,
                "quota_drift_bytes": 0,
            }
        )
    )

    scanned: int
    removed: list[str]
    """Jobs whose scratch directory is gone."""
    failed: list[str]
    removed_bytes: int
    released_bytes: int
    """Reservations that ended jobs still held."""
    quota_files: int
    quota_corrected: int
    """Files that the quota had counted wrong, or not at all."""
    quota_drift_bytes: int

    @classmethod
    def of(cls, report: UpkeepReport) -> Self:
        return cls(
            scanned=report.scratch.scanned,
            removed=list(report.scratch.removed),
            failed=list(report.scratch.failed),
            removed_bytes=report.scratch.removed_bytes,
            released_bytes=report.scratch.released_bytes,
            quota_files=report.quota.inodes,
            quota_corrected=report.quota.corrected,
            quota_drift_bytes=report.quota.drift_bytes,
        )
