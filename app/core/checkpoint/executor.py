"""Runs a checkpoint: plan → reserve → stage → upload → clean up → publish → document → done.

Invariants: I2 every blob is confirmed by the store before the manifest names it. I3 one batch
publishes, and the generation document is stored before the job completes and before any WAL goes.
I4 WAL goes last. I6 lease tokens, generation and run are checked inside the publishing
transaction. I7 the persisted plan fixes all that a retry does. I9, I13 every exit gives back the
reservation and the scratch directory. I15 once published, only onwards.
Concurrency: one run per database at a time (the queue sees to that); chunks side by side, bounded.
Cancellation: at any `await`; what was committed is resumed from, the rest is done again.
Crash: the same. Scratch and reservation of a dead process are swept at start.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec

from app.core.base import failpoints
from app.core.base.clock import wall_us
from app.core.base.errors import BopError, JobCancelled, StalePlan
from app.core.base.tasks import run_beside, uninterrupted
from app.core.checkpoint.blob_making import BlobMaking
from app.core.checkpoint.completion import complete_publication
from app.core.checkpoint.intents import (
    all_made,
    blobs_of,
    rows_of,
    staged_name,
)
from app.core.checkpoint.job_hold import JobHold
from app.core.checkpoint.outcome import delta_chain_lengths, merged_chunks, result_of
from app.core.checkpoint.parts import CheckpointLimits, CheckpointParts, job_fields
from app.core.checkpoint.planning import Planning
from app.core.checkpoint.publication import publication_batch
from app.core.coordination.leases import keep_leases
from app.core.coordination.quota import Reservation
from app.core.engines.base import (
    CheckpointPlan,
    decode_plan,
    encode_plan,
)
from app.core.reads.page_cache import CheckpointScope
from app.core.stores.manifest.conditions import ExpectGeneration
from app.core.stores.manifest.errors import GenerationMoved, KeyDoomed, LeaseLost
from app.core.stores.manifest.ops import (
    AcquireLease,
    CompensateCheckpoint,
    Op,
    ReleaseLeases,
    RetireBlob,
)
from app.core.stores.manifest.records import JobRecord, Progress
from app.core.stores.remote.keys import generation_document_key

REPLANS_MAX = 5


class CheckpointExecutor:
    """`planning` says what is done: `CheckpointPlanning`, or `CoalescingPlanning`."""

    def __init__(
        self, parts: CheckpointParts, limits: CheckpointLimits, planning: Planning
    ) -> None:
        self._parts = parts
        self._limits = limits
        self._planning = planning
        self._blobs = BlobMaking(parts, limits)
        self._reservations: dict[str, Reservation] = {}

    async def run(self, hold: JobHold) -> Mapping[str, Any]:
        """One attempt, resumed from where the job's row stands. Returns the job's result."""
        for _ in range(REPLANS_MAX):
            try:
                return await self._run(hold)
            except (StalePlan, GenerationMoved, LeaseLost, KeyDoomed) as stale:
                if hold.job.published_generation is not None:
                    raise
                await self._replan(hold, stale)
        raise StalePlan(f"The plan went stale {REPLANS_MAX} times in a row.")

    async def pause(self, hold: JobHold) -> tuple[Op, ...]:
        """Gives back scratch, reservation and leases until the next attempt."""
        await self._clean_up(hold)
        return (ReleaseLeases(job_id=hold.job.job_id),)

    async def abandon(self, hold: JobHold) -> tuple[tuple[Op, ...], dict[str, Any]]:
        """The job ends unpublished: nothing local stays, and what may be on the store is retired
        in the commit that ends the job.
        """
        await self._clean_up(hold)
        self._parts.events.warning("checkpoint.failed", **job_fields(hold.job))
        return (*self._retire(hold.job), *_compensation(hold.job)), {"plan": None, "intents": ()}

    # --- the stages, in order -----------------------------------------------------------------

    async def _run(self, hold: JobHold) -> Mapping[str, Any]:
        if hold.job.published_generation is not None:
            await self._clean_up(hold)  # a power cut may have brought the scratch back
            return await self._finish(hold, started=None)
        if self._is_deleted(hold.job.db_id):
            raise JobCancelled("The database was deleted.")
        started = self._parts.clock.monotonic()
        self._parts.events.info("checkpoint.started", **job_fields(hold.job))
        planned = await self._plan(hold)
        if planned is None:
            return self._no_changes(hold.job)
        plan, tokens = planned
        with self._told_to_caches(hold, plan):
            await run_beside(
                self._make(hold, plan, tokens),
                keep_leases(
                    self._parts.manifest,
                    job_id=hold.job.job_id,
                    count=len(tokens),
                    ttl_seconds=self._limits.lease_ttl_seconds,
                    clock=self._parts.clock,
                ),
            )
        return await self._finish(hold, started=started)

    def _is_deleted(self, db_id: int) -> bool:
        with self._parts.manifest.read() as view:
            database = view.database(db_id)
        return database is None or database.state == "tombstoned"

    @contextmanager
    def _told_to_caches(self, hold: JobHold, plan: CheckpointPlan) -> Iterator[None]:
        cache = self._parts.pages.cache
        scope = CheckpointScope(db_id=plan.db_id, chunk_ids=plan.leased_chunk_ids)
        cache.checkpoint_started(scope)
        try:
            yield
        finally:
            cache.checkpoint_ended(scope, generation=hold.job.published_generation)

    async def _make(
        self, hold: JobHold, plan: CheckpointPlan, tokens: tuple[tuple[int, int], ...]
    ) -> None:
        if not all_made(hold.job.intents, plan):
            await self._reserve(hold, plan)
            await self._blobs.run(hold, plan)
        await self._keep_local(hold, plan)
        await self._publish(hold, plan, tokens)

    async def _plan(
        self, hold: JobHold
    ) -> tuple[CheckpointPlan, tuple[tuple[int, int], ...]] | None:
        """The persisted plan, or a new one, with its leases taken in the same commit."""
        job = hold.job
        if job.plan is None:
            failpoints.fp("job.before_plan")
            plan = await self._planning.decide(job)
            if plan is None:
                return None
        else:
            plan = decode_plan(job.plan)
        receipt = await hold.update(
            reason="checkpoint.planned",
            changes={
                "plan": encode_plan(plan),
                "stage": "planning",
                "progress": msgspec.structs.replace(
                    job.progress,
                    total_chunks=len(plan.actions),
                    total_bytes=plan.staged_bytes_max,
                ),
            },
            ops=tuple(
                AcquireLease(
                    db_id=plan.db_id,
                    chunk_id=chunk_id,
                    generation=plan.target_generation,
                    job_id=job.job_id,
                    ttl_seconds=self._limits.lease_ttl_seconds,
                )
                for chunk_id in plan.leased_chunk_ids
            ),
            preconditions=(
                ExpectGeneration(db_id=plan.db_id, generation=plan.expected_generation),
            ),
        )
        failpoints.fp("job.after_plan")
        tokens = receipt.results[: len(plan.leased_chunk_ids)]
        return plan, tuple(zip(plan.leased_chunk_ids, tokens, strict=True))

    async def _reserve(self, hold: JobHold, plan: CheckpointPlan) -> None:
        await hold.update(reason="checkpoint.reserving", changes={"stage": "reserving"})
        parts, job = self._parts, hold.job
        parts.quota.forget_scratch(job.job_id)  # of an earlier process: the reservation covers it
        self._reservations[job.job_id] = await parts.quota.reserve(
            tenant=job.tenant,
            job_id=job.job_id,
            size_bytes=plan.room_bytes(links=parts.scratch_links),
            drain_since=parts.wal_since(job.db_id) if plan.frees_wal else None,
        )
        failpoints.fp("quota.after_reserve")

    async def _keep_local(self, hold: JobHold, plan: CheckpointPlan) -> None:
        """Links the blobs into the hot cache, and keeps page blobs' directories beyond it; then
        scratch and reservation go.
        """
        await hold.update(reason="checkpoint.cleanup", changes={"stage": "cleanup"})
        parts = self._parts
        directory = await parts.scratch.create(hold.job.job_id)
        reservation = self._reservations.get(hold.job.job_id)
        for row in rows_of(hold.job.intents):
            if (blob := row.blob) is None:
                continue
            path = directory.file(staged_name(row.chunk_id))
            kept = await parts.hot_cache.admit_link(
                path, sha256=blob.sha256.hex(), size_bytes=blob.bytes
            )
            if kept and reservation is not None:
                reservation.spend(blob.bytes)
            if plan.engine == "libsql":
                await parts.directory_files.put_from(
                    path, blob.sha256.hex(),
                    offset=row.directory_offset, length=row.directory_bytes,
                )  # fmt: skip
        failpoints.fp("cleanup.after_links")
        await self._clean_up(hold)
        parts.events.info("checkpoint.cleaned_up", **job_fields(hold.job))
        failpoints.fp("cleanup.after_scratch")

    async def _publish(
        self, hold: JobHold, plan: CheckpointPlan, tokens: tuple[tuple[int, int], ...]
    ) -> None:
        parts, job = self._parts, hold.job
        await hold.update(reason="checkpoint.publishing", changes={"stage": "publishing"})
        await parts.ownership.confirm()
        log = parts.wal.log(job.db_id)
        batch = publication_batch(
            plan,
            rows=rows_of(job.intents),
            committed_at_us=wall_us(parts.clock),
            document_key=generation_document_key(
                tenant=job.tenant,
                database=job.database,
                db_id=job.db_id,
                generation=plan.target_generation,
            ),
            job_id=job.job_id,
            tokens=tokens,
            epoch=parts.ownership.epoch,
            remembered={
                segment_id: log.remembered_of(segment_id) for segment_id in plan.segment_ids
            },
        )

        async def publish() -> None:
            failpoints.fp("publish.before_commit")
            await hold.update(
                reason="checkpoint.published",
                changes={"published_generation": plan.target_generation},
                ops=batch.ops,
                preconditions=batch.preconditions,
            )
            failpoints.fp("publish.after_commit")
            log.mark_checkpointed(plan.segment_ids)
            self._tell_published(hold.job, plan)

        await uninterrupted(publish())  # the commit takes effect whoever waits for it

    def _tell_published(self, job: JobRecord, plan: CheckpointPlan) -> None:
        self._parts.events.info(
            "checkpoint.published",
            generation=plan.target_generation,
            checkpoint_id=plan.checkpoint_id,
            first_lsn=plan.first_lsn,
            last_lsn=plan.last_lsn,
            chunks=len(plan.actions),
            chunk_bytes=[blob.bytes for blob in blobs_of(rows_of(job.intents))],
            merged_chunks=merged_chunks(plan),
            delta_chain_lengths=delta_chain_lengths(plan),
            **job_fields(job),
        )

    # --- after the publication: only onwards --------------------------------------------------

    async def _finish(self, hold: JobHold, *, started: float | None) -> Mapping[str, Any]:
        """`started`: when the attempt that also published began."""
        assert hold.job.plan is not None
        plan = decode_plan(hold.job.plan)
        await complete_publication(self._parts, hold)
        result = result_of(plan, rows_of(hold.job.intents))
        self._parts.events.info(
            "checkpoint.completed",
            seconds=None if started is None else self._parts.clock.monotonic() - started,
            bytes_uploaded=result["bytes_uploaded"],
            bytes_dirtied=plan.bytes_dirtied,
            **job_fields(hold.job),
        )
        return result

    # --- ways out -----------------------------------------------------------------------------

    async def _replan(self, hold: JobHold, stale: Exception) -> None:
        self._parts.events.warning(
            "checkpoint.replanning", detail=str(stale), **job_fields(hold.job)
        )
        await self._clean_up(hold)
        await hold.update(
            reason="checkpoint.replanning",
            changes={
                "plan": None,
                "intents": (),
                "progress": Progress(),
                "replans": hold.job.replans + 1,  # other keys: the old ones are on their way out
            },
            ops=self._retire(hold.job),
        )

    async def _clean_up(self, hold: JobHold) -> None:
        """Scratch and reservation go; nothing there is fine. Scratch that cannot be removed now is
        told and left to the janitor: the job goes on without it.
        """
        try:
            await self._parts.scratch.remove(hold.job.job_id)
        except (BopError, OSError) as error:
            self._parts.events.error(
                "checkpoint.scratch_left", error=repr(error), **job_fields(hold.job)
            )
        self._parts.quota.forget_scratch(hold.job.job_id)
        reservation = self._reservations.pop(hold.job.job_id, None)
        if reservation is not None:
            reservation.release()

    def _retire(self, job: JobRecord) -> tuple[Op, ...]:
        eligible_at_us = wall_us(self._parts.clock) + int(self._limits.gc_grace_seconds * 1e6)
        return (
            *(
                RetireBlob(
                    blob=blob,
                    db_id=job.db_id,
                    eligible_at_us=eligible_at_us,
                    reason="unpublished",
                )
                for blob in blobs_of(rows_of(job.intents))
            ),
            ReleaseLeases(job_id=job.job_id),
        )

    def _no_changes(self, job: JobRecord) -> Mapping[str, Any]:
        with self._parts.manifest.read() as view:
            latest = view.latest_generation(job.db_id)
        self._parts.events.info("checkpoint.unchanged", **job_fields(job))
        return {
            "outcome": "no_changes",
            "generation": latest.generation if latest else 0,
            "checkpoint_id": latest.checkpoint_id if latest else None,
            "first_lsn": latest.first_lsn if latest else None,
            "last_lsn": latest.last_lsn if latest else None,
            "bytes_uploaded": 0,
            "chunks": [],
        }


def _compensation(job: JobRecord) -> tuple[Op, ...]:
    """What the change log says of a checkpoint that a truncation cancelled."""
    if job.cancelled_by is None:
        return ()
    return (
        CompensateCheckpoint(db_id=job.db_id, job_id=job.job_id, cancelled_by=job.cancelled_by),
    )
