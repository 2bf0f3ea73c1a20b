"""What diagnoses look like."""

from typing import Literal, Self

from pydantic import ConfigDict

from app.core.base.clock import rfc3339
from app.core.services.backups import ManifestBackup
from app.core.services.explaining import JobExplanation, WaitKind, WaitReason
from app.core.services.wal_overview import LogOverview
from app.core.stores.manifest.records import Engine, HealthState, JobStage, JobState
from app.routers.schemas import EXAMPLE_JOB_ID, EXAMPLE_TIME, PageOf, View, example


class WaitReasonView(View):
    kind: WaitKind
    detail: str
    job_id: str | None
    """Who has what is waited for; null also where that is not yours to see."""
    chunk_id: int | None
    until: str | None

    @classmethod
    def of(cls, reason: WaitReason) -> Self:
        return cls(
            kind=reason.kind,
            detail=reason.detail,
            job_id=reason.job_id,
            chunk_id=reason.chunk_id,
            until=None if reason.until_us is None else rfc3339(reason.until_us),
        )


class HeldLeaseView(View):
    chunk_id: int
    token: int
    expires_at: str


class ExplanationView(View):
    model_config = ConfigDict(
        json_schema_extra=example(
            {
                "job_id": EXAMPLE_JOB_ID,
                "state": "pending",
                "stage": None,
                "attempts": 2,
                "cancel_requested": False,
                "summary": "It waits for: backoff.",
                "waits_for": [
                    {
                        "kind": "backoff",
                        "detail": "Attempt 2 failed after remote_unavailable: "
                        "The remote store does not answer as it should.",
                        "job_id": None,
                        "chunk_id": None,
                        "until": EXAMPLE_TIME,
                    }
                ],
                "leases": [],
            }
        )
    )

    job_id: str
    state: JobState
    stage: JobStage | None
    attempts: int
    cancel_requested: bool
    summary: str
    waits_for: list[WaitReasonView]
    leases: list[HeldLeaseView]
    """Those that the job itself holds."""

    @classmethod
    def of(cls, explanation: JobExplanation, *, shows_others: bool) -> Self:
        """Without `shows_others`, what concerns all tenants together is left out (I12)."""
        job = explanation.job
        shown = [
            reason
            for reason in explanation.waits_for
            if shows_others or reason.kind not in _CONCERN_ALL
        ]
        return cls(
            job_id=job.job_id,
            state=job.state,
            stage=job.stage,
            attempts=job.attempts,
            cancel_requested=job.cancel_requested,
            summary=explanation.summary,
            waits_for=[WaitReasonView.of(reason) for reason in shown],
            leases=[
                HeldLeaseView(
                    chunk_id=lease.chunk_id,
                    token=lease.token,
                    expires_at=rfc3339(lease.expires_at_us),
                )
                for lease in explanation.leases
            ],
        )


_CONCERN_ALL: frozenset[WaitKind] = frozenset({"concurrency", "limiter", "quota"})


class LogView(View):
    model_config = ConfigDict(
        json_schema_extra=example(
            {
                "tenant": "acme",
                "database": "events",
                "db_id": 1,
                "engine": "append_only",
                "health": "ok",
                "first_lsn": 901,
                "next_lsn": 1001,
                "checkpointed_lsn": 900,
                "wal_bytes": 68_064,
                "unpublished_bytes": 68_064,
                "segments": [
                    {
                        "segment_id": 7,
                        "state": "open",
                        "first_lsn": 901,
                        "last_lsn": None,
                        "bytes": 68_064,
                    }
                ],
            }
        )
    )

    class SegmentView(View):
        segment_id: int
        state: Literal["open", "sealed", "checkpointed"]
        first_lsn: int
        last_lsn: int | None
        """null while it is open."""
        bytes: int

    tenant: str
    database: str
    db_id: int
    engine: Engine
    health: HealthState
    first_lsn: int | None
    """The oldest in the WAL; null: it is empty."""
    next_lsn: int
    checkpointed_lsn: int
    wal_bytes: int
    unpublished_bytes: int
    segments: list[SegmentView]

    @classmethod
    def of(cls, log: LogOverview) -> Self:
        return cls(
            tenant=log.tenant,
            database=log.database,
            db_id=log.db_id,
            engine=log.engine,
            health=log.health,
            first_lsn=log.first_lsn,
            next_lsn=log.next_lsn,
            checkpointed_lsn=log.checkpointed_lsn,
            wal_bytes=log.wal_bytes,
            unpublished_bytes=log.unpublished_bytes,
            segments=[
                cls.SegmentView(
                    segment_id=row.segment_id,
                    state=row.state,
                    first_lsn=row.first_lsn,
                    last_lsn=row.last_lsn or None,
                    bytes=row.bytes,
                )
                for row in log.segments
            ],
        )


class LogPage(PageOf):
    items: list[LogView]


class BackupView(View):
    model_config = ConfigDict(
        json_schema_extra=example(
            {
                "path": "/var/lib/bop/backups/manifest-20261123T210500Z-19",
                "bytes": 90_112,
                "sequence": 19,
            }
        )
    )

    path: str
    bytes: int
    sequence: int
    """It holds at least all changes up to this one."""

    @classmethod
    def of(cls, backup: ManifestBackup) -> Self:
        return cls(path=str(backup.path), bytes=backup.bytes, sequence=backup.sequence)
