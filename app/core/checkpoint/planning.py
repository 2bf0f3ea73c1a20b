"""Decides what a checkpoint does: reads what the planner of the engine asks for, and asks it.

Invariants: I5: up to the last whole transaction of the sealed WAL. I7: what is decided here is
persisted before anything is done about it.
Cancellation: at any await; nothing is written. Crash: the same.
"""

from dataclasses import dataclass, replace
from typing import Protocol

from app.core.base.errors import InvariantViolation
from app.core.base.ids import CheckpointId, JobId, checkpoint_id
from app.core.checkpoint.page_planning import PlanningParts, committed_segments, load_changes
from app.core.checkpoint.parts import CheckpointLimits, CheckpointParts
from app.core.coordination.flags import flags_of
from app.core.engines.append_only.coalescing import plan_coalescing
from app.core.engines.base import CheckpointPlan, PageChanges, PlannerContext, SegmentView
from app.core.engines.planning import plan_checkpoint
from app.core.stores.manifest.records import (
    ChunkRecord,
    DatabaseRecord,
    FeatureFlags,
    JobRecord,
    WalSegmentRecord,
)
from app.core.stores.manifest.view import ManifestView


class Planning(Protocol):
    async def decide(self, job: JobRecord) -> CheckpointPlan | None:
        """None: there is nothing to do."""
        ...


class CheckpointPlanning:
    def __init__(self, parts: CheckpointParts, limits: CheckpointLimits) -> None:
        self._parts = parts
        self._limits = limits
        self._pages = PlanningParts(
            manifest=parts.manifest, pages=parts.pages, hot_cache=parts.hot_cache,
            pool=parts.pool, events=parts.events,
        )  # fmt: skip

    async def decide(self, job: JobRecord) -> CheckpointPlan | None:
        """Seals the WAL first, so that what is planned no longer moves. None: nothing has changed.
        Raises CorruptWal, CorruptBlob, RemoteUnavailable.
        """
        parts = self._parts
        await parts.wal.log(job.db_id).seal()
        segments = [
            info for info in parts.wal.log(job.db_id).sealed_segments() if info.state == "sealed"
        ]
        changes: PageChanges | None = None
        if segments and segments[0].engine_name == "libsql":
            log = parts.wal.log(job.db_id)
            segments = list(committed_segments(segments, await log.frames.read()))
            if segments:
                changes = await load_changes(self._pages, log, segments, db_id=job.db_id)
        found = await parts.manifest.read_in_thread(lambda view: _rows_of(view, job))
        database, rows, flags = found.database, found.segments, found.flags
        with_deltas = self._limits.deltas.enabled and flags.enable_chunk_deltas
        epoch = parts.ownership.epoch
        return plan_checkpoint(
            PlannerContext(
                database=database,
                chunks=found.chunks,
                segments=tuple(
                    SegmentView(
                        engine=info.engine_name,
                        segment_id=info.segment_id,
                        first_lsn=info.first_lsn,
                        last_lsn=info.last_lsn,
                        segment_bytes=info.file_bytes,
                        line_safe=info.line_safe,
                        visible_last=rows[info.segment_id].visible_last,
                    )
                    for info in segments
                    if rows[info.segment_id].state == "sealed"
                ),
                checkpoint_id=_checkpoint_id_of(job, database, epoch),
                epoch=epoch,
                pages=changes,
                limits=replace(self._limits.deltas, enabled=with_deltas),
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    database: DatabaseRecord
    chunks: tuple[ChunkRecord, ...]
    segments: dict[int, WalSegmentRecord]
    flags: FeatureFlags


def _rows_of(view: ManifestView, job: JobRecord) -> _Rows:
    """Walks over all chunks of the database. What is planned upon does not move meanwhile: nobody
    else may change the database.
    """
    database = view.database(job.db_id)
    if database is None:
        raise InvariantViolation("a checkpoint of no database", db_id=job.db_id)
    return _Rows(
        database=database,
        chunks=tuple(view.chunk_view(job.db_id, database.generation)),
        segments={row.segment_id: row for row in view.segments(job.db_id)},
        flags=flags_of(view, job.tenant),
    )


class CoalescingPlanning:
    """What merging small chunks does; the WAL is not looked at."""

    def __init__(self, parts: CheckpointParts) -> None:
        self._parts = parts

    async def decide(self, job: JobRecord) -> CheckpointPlan | None:
        epoch = self._parts.ownership.epoch

        def decide(view: ManifestView) -> CheckpointPlan | None:
            """Walks over all chunks of the database."""
            database = view.database(job.db_id)
            if database is None or database.state != "active":
                return None
            latest = view.generation(job.db_id, database.generation)
            if latest is None:
                return None
            return plan_coalescing(
                database,
                view.chunk_view(job.db_id, database.generation),
                published_lsn=latest.last_lsn,
                checkpoint_id=_checkpoint_id_of(job, database, epoch),
                epoch=epoch,
            )

        return await self._parts.manifest.read_in_thread(decide)


def _checkpoint_id_of(job: JobRecord, database: DatabaseRecord, epoch: int) -> CheckpointId:
    return checkpoint_id(
        generation=database.generation + 1,
        epoch=epoch,
        job_id=JobId(job.job_id),
        replans=job.replans,
    )
