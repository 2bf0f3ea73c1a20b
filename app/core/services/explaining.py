"""Why a job is where it is: what it waits for, and who has that.

Invariants: nothing is changed, and nothing is guessed: what is said comes from the rows, the queue
and the limits as they are now.
Concurrency: loop-confined; one moment of the manifest. Cancellation, crash: nothing is held.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from app.core.base.clock import Clock, wall_us
from app.core.base.errors import JobNotFound
from app.core.coordination.quota import StorageQuota
from app.core.jobs.queue import JobQueue
from app.core.stores.manifest.records import (
    ENDED_STATES,
    MUTATING_KINDS,
    JobRecord,
    LeaseRecord,
)
from app.core.stores.manifest.store import ManifestStore

WaitKind = Literal[
    "backoff", "concurrency", "database", "lease", "limiter", "prefix", "quota", "remote"
]
REMOTE_STAGES = frozenset({"uploading", "publishing", "planning", "staging"})


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitReason:
    kind: WaitKind
    detail: str
    job_id: str | None = None
    """Who has what is waited for."""
    chunk_id: int | None = None
    until_us: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteLoad:
    """How the remote store takes requests now."""

    failing: bool
    in_flight: int
    limit: int
    waiting: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobExplanation:
    job: JobRecord
    summary: str
    waits_for: tuple[WaitReason, ...]
    leases: tuple[LeaseRecord, ...]
    """Those that the job itself holds."""


class Explaining:
    def __init__(
        self,
        manifest: ManifestStore,
        queue: JobQueue,
        quota: StorageQuota,
        *,
        clock: Clock,
        job_concurrency: int,
        prefix_problem: Callable[[], str | None],
        remote_load: Callable[[], RemoteLoad],
    ) -> None:
        """`prefix_problem` gives None once the prefix is claimed."""
        self._manifest = manifest
        self._queue = queue
        self._quota = quota
        self._clock = clock
        self._job_concurrency = job_concurrency
        self._prefix_problem = prefix_problem
        self._remote_load = remote_load

    def explain(self, job_id: str) -> JobExplanation:
        """Raises JobNotFound."""
        with self._manifest.read() as view:
            job = view.job(job_id)
            if job is None:
                raise JobNotFound(f"There is no job {job_id}.", job_id=job_id)
            unfinished = view.unfinished_jobs()
            leases = view.database_leases(job.db_id)
        own = tuple(lease for lease in leases if lease.job_id == job.job_id)
        others = [lease for lease in leases if lease.job_id != job.job_id]
        if job.state in ENDED_STATES:
            reasons: tuple[WaitReason, ...] = ()
        elif job.state == "pending":
            reasons = tuple(self._before_it_runs(job, unfinished))
        else:
            reasons = tuple(self._while_it_runs(job, others))
        return JobExplanation(
            job=job, summary=_summary(job, reasons), waits_for=reasons, leases=own
        )

    def _before_it_runs(self, job: JobRecord, unfinished: Sequence[JobRecord]) -> list[WaitReason]:
        found: list[WaitReason] = []
        if (problem := self._prefix_problem()) is not None:
            found.append(WaitReason(kind="prefix", detail=problem))
        running = [other for other in unfinished if other.job_id in self._queue.claimed_ids]
        if job.kind in MUTATING_KINDS:
            found += [
                WaitReason(
                    kind="database",
                    detail=f"{other.kind} of the same database runs; one at a time does.",
                    job_id=other.job_id,
                )
                for other in running
                if other.db_id == job.db_id and other.kind in MUTATING_KINDS
            ]
        if wait_seconds := self._queue.wait_seconds(job):
            found.append(self._backoff(job, wait_seconds))
            if job.error is not None and job.error.code == "quota_exhausted":
                found.append(self._quota_use(job))
        elif len(running) >= self._job_concurrency:
            found.append(
                WaitReason(
                    kind="concurrency",
                    detail=f"{len(running)} jobs run, as many as BOP_JOB_CONCURRENCY allows.",
                )
            )
        return found

    def _while_it_runs(self, job: JobRecord, others: Sequence[LeaseRecord]) -> list[WaitReason]:
        found: list[WaitReason] = []
        if job.stage == "waiting_for_lease":
            found += [
                WaitReason(
                    kind="lease",
                    detail=f"Chunk {lease.chunk_id} is leased, and renewed while its job works.",
                    job_id=lease.job_id,
                    chunk_id=lease.chunk_id,
                    until_us=lease.expires_at_us,
                )
                for lease in others
            ]
        if job.stage == "reserving":
            found.append(self._quota_use(job))
        if job.stage in REMOTE_STAGES:
            load = self._remote_load()
            if load.failing:
                found.append(
                    WaitReason(
                        kind="remote", detail="The remote store fails; requests are tried again."
                    )
                )
            if load.waiting:
                found.append(
                    WaitReason(
                        kind="limiter",
                        detail=f"{load.waiting} requests wait; {load.in_flight} of {load.limit} "
                        "are with the remote store.",
                    )
                )
        return found

    def _backoff(self, job: JobRecord, wait_seconds: float) -> WaitReason:
        why = "" if job.error is None else f" after {job.error.code}: {job.error.detail}"
        return WaitReason(
            kind="backoff",
            detail=f"Attempt {job.attempts} failed{why}",
            until_us=wall_us(self._clock) + round(wait_seconds * 1e6),
        )

    def _quota_use(self, job: JobRecord) -> WaitReason:
        use = self._quota.snapshot()
        tenant = next((one for one in use.tenants if one.tenant == job.tenant), None)
        detail = f"{use.global_used_bytes} of {use.global_limit_bytes} bytes are in use in all"
        if tenant is not None and tenant.limit_bytes is not None:
            detail += f", {tenant.used_bytes} of the tenant's {tenant.limit_bytes}"
        return WaitReason(kind="quota", detail=f"{detail}.")


def _summary(job: JobRecord, reasons: Sequence[WaitReason]) -> str:
    if job.state in ENDED_STATES:
        return f"It has ended: {job.state}."
    asked = " It was asked to end." if job.cancel_requested else ""
    if reasons:
        kinds = ", ".join(dict.fromkeys(reason.kind for reason in reasons))
        return f"It waits for: {kinds}.{asked}"
    if job.state == "pending":
        return f"It is next in turn.{asked}"
    return f"It works ({job.stage}).{asked}"
