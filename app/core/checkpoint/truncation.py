"""Drops records of an append_only database: plan → publish → document → WAL → done.

Invariants: I3 one batch changes catalogue, WAL catalogue, descriptor and the job's marker. I6
generation, run and epoch are checked inside it, and that nobody holds a lease on the database. I14
LSNs are not given out again. Blobs are left to their rows: those of superseded rows go when no
retained generation needs them (I8).
Concurrency: the job holds its database's slot. Appends go on meanwhile.
Cancellation, crash: before the batch nothing has happened, and the same range is planned again;
after it only onwards (`completion.py`).
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from app.core.base import failpoints
from app.core.base.clock import wall_us
from app.core.base.errors import DatabaseNotFound, SnapshotPinned
from app.core.base.ids import JobId, checkpoint_id
from app.core.base.tasks import uninterrupted
from app.core.checkpoint.completion import complete_publication
from app.core.checkpoint.job_hold import JobHold
from app.core.checkpoint.parts import CheckpointParts, job_fields
from app.core.checkpoint.publication import remembered_ops
from app.core.retention.pins import pins_of, pins_within
from app.core.retention.truncation_plan import (
    TruncationContext,
    TruncationPlan,
    TruncationRequest,
    plan_truncation,
)
from app.core.stores.manifest.conditions import ExpectEpoch, ExpectGeneration, ExpectNoLeases
from app.core.stores.manifest.ops import (
    CutSegment,
    Op,
    PublishGeneration,
    RaiseFirstLsn,
    RaiseFloor,
    SupersedeChunk,
    UpsertChunk,
)
from app.core.stores.manifest.records import DatabaseRecord, GenerationRecord, JobRecord
from app.core.stores.manifest.view import ManifestView
from app.core.stores.remote.keys import generation_document_key


class TruncationOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What the publishing batch did, persisted with it as the job's `plan`."""

    generation: int
    first_lsn: int
    dropped_first: int
    dropped_last: int
    chunk_ids: tuple[int, ...]
    """Of which something was dropped."""


_decode_outcome = msgspec.msgpack.Decoder(TruncationOutcome).decode


class TruncationExecutor:
    def __init__(self, parts: CheckpointParts) -> None:
        self._parts = parts

    async def run(self, hold: JobHold) -> Mapping[str, Any]:
        """Resumed from where the job's row stands. Returns the job's result. Raises SnapshotPinned,
        DatabaseNotFound, LeaseConflict.
        """
        request = TruncationRequest.of(hold.job.params)
        if hold.job.published_generation is None:
            failpoints.fp("truncate.before_plan")
            database, plan = await self._parts.manifest.read_in_thread(
                lambda view: decide(view, hold.job.db_id, request)
            )
            if plan is None:
                return _unchanged(request, database)
            await self._publish(hold, plan, database)
        await complete_publication(self._parts, hold)
        assert hold.job.plan is not None
        outcome = _decode_outcome(hold.job.plan)
        return _result(request, outcome)

    async def _publish(self, hold: JobHold, plan: TruncationPlan, database: DatabaseRecord) -> None:
        parts = self._parts
        await hold.update(reason="truncation.publishing", changes={"stage": "publishing"})
        await parts.ownership.confirm()
        log = parts.wal.log(plan.db_id)
        dropped = [cut.segment_id for cut in plan.cuts if cut.drops_all]
        remembered = [
            op
            for segment_id in dropped
            for op in remembered_ops(plan.db_id, segment_id, log.remembered_of(segment_id))
        ]
        outcome = TruncationOutcome(
            generation=plan.target_generation,
            first_lsn=plan.first_lsn,
            dropped_first=plan.dropped_first,
            dropped_last=plan.dropped_last,
            chunk_ids=tuple(row.chunk_id for row in plan.superseded),
        )
        epoch = parts.ownership.epoch
        generation = generation_of(
            plan, hold.job, epoch=epoch, committed_at_us=wall_us(parts.clock)
        )

        async def publish() -> None:
            failpoints.fp("truncate.before_commit")
            await hold.update(
                reason="truncation.published",
                changes={
                    "published_generation": plan.target_generation,
                    "plan": msgspec.msgpack.encode(outcome),
                },
                ops=(
                    *truncation_ops(plan, generation, next_chunk_id=database.next_chunk_id),
                    *remembered,
                ),
                preconditions=(
                    ExpectGeneration(db_id=plan.db_id, generation=plan.expected_generation),
                    ExpectNoLeases(db_id=plan.db_id),
                    ExpectEpoch(epoch=epoch),
                ),
            )
            failpoints.fp("truncate.after_commit")
            log.mark_checkpointed(dropped)
            parts.events.info(
                "truncation.published",
                generation=plan.target_generation,
                first_lsn=plan.first_lsn,
                dropped_first_lsn=plan.dropped_first,
                dropped_last_lsn=plan.dropped_last,
                chunks=len(plan.superseded),
                segments=len(plan.cuts),
                **job_fields(hold.job),
            )

        await uninterrupted(publish())  # the commit takes effect whoever waits for it


def decide(
    view: ManifestView, db_id: int, request: TruncationRequest
) -> tuple[DatabaseRecord, TruncationPlan | None]:
    """Walks over all chunks of the database. Raises DatabaseNotFound, SnapshotPinned."""
    database = view.database(db_id)
    if database is None or database.state == "tombstoned":
        raise DatabaseNotFound(db_id=db_id)
    latest = view.generation(db_id, database.generation)
    plan = plan_truncation(
        request,
        TruncationContext(
            database=database,
            published_lsn=0 if latest is None else latest.last_lsn,
            chunks=view.chunk_view(db_id, database.generation),
            segments=view.segments(db_id),
        ),
    )
    if plan is not None:
        check_pins(view, plan)
    return database, plan


def check_pins(view: ManifestView, plan: TruncationPlan) -> None:
    """Raises SnapshotPinned with the names of the snapshots whose generation shows a chunk to be
    dropped, and of the forks that read one.
    """
    snapshots = pins_of(view.snapshots(plan.db_id), ())
    names: set[str] = set()
    for row in plan.superseded:
        pins = pins_within(snapshots, generation=row.generation, superseded_at=None)
        names.update(pin.name for pin in pins)
        names.update(f"{fork.tenant}/{fork.database}" for fork in view.inheriting_forks(row))
    if names:
        raise SnapshotPinned(
            f"Chunks to be dropped are still needed by: {', '.join(sorted(names))}.",
            names=sorted(names),
        )


def generation_of(
    plan: TruncationPlan, job: JobRecord, *, epoch: int, committed_at_us: int
) -> GenerationRecord:
    """It has no blobs of its own, and LSNs only if dropped ones were never published."""
    return GenerationRecord(
        db_id=plan.db_id,
        generation=plan.target_generation,
        checkpoint_id=checkpoint_id(
            generation=plan.target_generation, epoch=epoch, job_id=JobId(job.job_id)
        ),
        first_lsn=plan.covered_from,
        last_lsn=plan.published_lsn,
        page_count=0,
        committed_at_us=committed_at_us,
        base_chunks=0,
        delta_chunks=0,
        bytes_uploaded=0,
        document_key=generation_document_key(
            tenant=job.tenant,
            database=job.database,
            db_id=plan.db_id,
            generation=plan.target_generation,
        ),
    )


def truncation_ops(
    plan: TruncationPlan, generation: GenerationRecord, *, next_chunk_id: int
) -> tuple[Op, ...]:
    """Catalogue, WAL catalogue and descriptor, in one batch (I3)."""
    ops: list[Op] = [
        SupersedeChunk(
            db_id=plan.db_id,
            chunk_id=row.chunk_id,
            generation=row.generation,
            superseded_at=plan.target_generation,
        )
        for row in plan.superseded
    ]
    ops += [UpsertChunk(row=row) for row in plan.renewed]
    ops += [
        CutSegment(db_id=plan.db_id, segment_id=cut.segment_id, visible_last=cut.visible_last)
        for cut in plan.cuts
    ]
    ops += [
        PublishGeneration(row=generation, next_chunk_id=next_chunk_id),
        RaiseFloor(db_id=plan.db_id, floor_lsn=plan.floor_lsn),
        RaiseFirstLsn(db_id=plan.db_id, first_lsn=plan.first_lsn),
    ]
    return tuple(ops)


def _result(request: TruncationRequest, outcome: TruncationOutcome) -> dict[str, Any]:
    return {
        "outcome": "truncated",
        "direction": request.direction,
        "generation": outcome.generation,
        "first_lsn": outcome.first_lsn,
        "dropped": {"first_lsn": outcome.dropped_first, "last_lsn": outcome.dropped_last},
        "chunks": list(outcome.chunk_ids),
    }


def _unchanged(request: TruncationRequest, database: DatabaseRecord) -> dict[str, Any]:
    return {
        "outcome": "no_changes",
        "direction": request.direction,
        "generation": database.generation,
        "first_lsn": database.first_lsn,
        "dropped": None,
        "chunks": [],
    }
