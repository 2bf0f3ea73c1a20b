"""The `verify_manifest` job: reads a generation's blobs again and compares all of their bytes.

Invariants: I10: damage becomes known, is told, and is mended from a local copy where that is right;
the generation is `verified` only once all of its blobs were. I8: the generation is pinned.
I7: what the job found is in the ledger, blob by blob, each in the commit that moves its progress:
a resumed run goes on behind it.
Concurrency: one blob at a time, at a pace that all verification shares; other jobs of the database
run beside it. Cancellation: between blobs or within one; the ledger stays. Crash: the same.
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from app.core.base import failpoints
from app.core.base.clock import Clock, wall_us
from app.core.base.errors import CorruptBlob, DatabaseNotFound, GenerationExpired
from app.core.base.events import Events
from app.core.coordination.pace import Pace
from app.core.jobs.generation_jobs import HeldGeneration, held_generation
from app.core.jobs.runner import JobContext
from app.core.reads.blob_check import BlobCheck, Verdict
from app.core.reads.generation_blobs import blobs_of
from app.core.reads.read_point import GenerationPins
from app.core.stores.manifest.ops import MarkVerified, Op, PutVerification, SetHealth
from app.core.stores.manifest.records import (
    BlobRef,
    JobRecord,
    Progress,
    VerificationOutcome,
    VerificationRecord,
)
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.manifest.view import ManifestView

KEYS_TOLD_MAX = 100
_BAD: frozenset[VerificationOutcome] = frozenset({"damaged", "missing"})


@dataclass(frozen=True, slots=True, kw_only=True)
class VerificationParts:
    manifest: ManifestStore
    pins: GenerationPins
    check: BlobCheck
    pace: Pace
    confirm_ownership: Callable[[], Awaitable[None]]
    """Asked before an object is replaced (I17)."""
    clock: Clock
    events: Events


class VerifyManifest:
    def __init__(self, parts: VerificationParts) -> None:
        self._parts = parts

    async def run(self, context: JobContext) -> Mapping[str, Any]:
        """Raises CorruptBlob, once all was looked at, where something stayed damaged."""
        parts, job = self._parts, context.job
        async with held_generation(parts.manifest, parts.pins, job) as held:
            known = await parts.manifest.read_in_thread(lambda view: ledger_of(view, job, held))
            done = {record.key: record for record in known}
            tally = _Tally()
            for record in known:
                tally.add(record)
            for blob in held.blobs:
                if blob.key not in done:
                    record = await self._verify(context, blob)
                    done[blob.key] = record
                    tally.add(record)
                    await self._note(context, held, record, tally)
            return await self._conclude(context, held, list(done.values()))

    async def abandon(self, context: JobContext) -> tuple[tuple[Op, ...], dict[str, Any]]:
        parts, job = self._parts, context.job
        try:
            async with held_generation(parts.manifest, parts.pins, job) as held:
                found = await parts.manifest.read_in_thread(lambda view: ledger_of(view, job, held))
                return (), {"result": report(held, found)}
        except (DatabaseNotFound, GenerationExpired):
            return (), {}

    async def pause(self, context: JobContext) -> tuple[Op, ...]:
        del context
        return ()

    async def _verify(self, context: JobContext, blob: BlobRef) -> VerificationRecord:
        parts = self._parts

        async def turn(size_bytes: int) -> None:
            await parts.pace.take(size_bytes, on_wait=context.touch)

        verdict = await parts.check.check(blob, turn)
        outcome: VerificationOutcome = verdict.outcome
        if outcome in _BAD:
            self._tell(context.job, blob, verdict)
            await parts.confirm_ownership()
            if await parts.check.repair(blob, turn, on_moved=context.touch):
                outcome = "repaired"
        parts.events.debug("verification.checked", outcome=outcome, bytes=blob.bytes)
        return VerificationRecord(
            key=blob.key,
            sha256=blob.sha256,
            bytes=blob.bytes,
            outcome=outcome,
            verified_at_us=wall_us(parts.clock),
            job_id=context.job.job_id,
            detail=verdict.detail,
        )

    async def _note(
        self,
        context: JobContext,
        held: HeldGeneration,
        record: VerificationRecord,
        tally: "_Tally",
    ) -> None:
        ops: list[Op] = [PutVerification(record=record)]
        if record.outcome in _BAD:
            with self._parts.manifest.read() as view:
                database = view.database(context.job.db_id)
            if database is not None and database.health == "ok":
                ops.append(SetHealth(db_id=database.db_id, health="unhealthy_generation"))
        progress = Progress(
            staged_chunks=tally.blobs,
            uploaded_blobs=tally.repaired,
            total_chunks=len(held.blobs),
            uploaded_bytes=tally.bytes,
            total_bytes=held.bytes,
        )
        await context.update(
            reason="verification.recorded", ops=tuple(ops), changes={"progress": progress}
        )
        failpoints.fp("verify.after_record")

    async def _conclude(
        self, context: JobContext, held: HeldGeneration, found: list[VerificationRecord]
    ) -> Mapping[str, Any]:
        result = report(held, found)
        bad = [record.key for record in found if record.outcome in _BAD]
        fields: dict[str, Any] = {
            "tenant": context.job.tenant, "database": context.job.database,
            "generation": held.generation, "blobs": len(found),
        }  # fmt: skip
        if bad:
            self._parts.events.error("verification.failed", damaged=len(bad), key=bad[0], **fields)
            raise CorruptBlob(
                f"{len(bad)} of {len(found)} blobs of generation {held.generation} are damaged or "
                "gone, and no local copy is right.",
                key=bad[0],
                generation=held.generation,
                damaged=len(bad),
            )
        ops: list[Op] = [
            MarkVerified(
                db_id=context.job.db_id,
                generation=held.generation,
                verified_at_us=wall_us(self._parts.clock),
            )
        ]
        db_id = context.job.db_id
        if await self._parts.manifest.read_in_thread(lambda view: has_recovered(view, db_id)):
            ops.append(SetHealth(db_id=db_id, health="ok"))
        await context.update(reason="generation.verified", ops=tuple(ops), changes={})
        self._parts.events.info("generation.verified", **fields)
        return result

    def _tell(self, job: JobRecord, blob: BlobRef, verdict: Verdict) -> None:
        """The alert: whatever comes of it, an object was not what it should be."""
        self._parts.events.error(
            "verification.damaged",
            tenant=job.tenant,
            database=job.database,
            generation=job.params["generation"],
            key=blob.key,
            outcome=verdict.outcome,
            detail=verdict.detail,
        )


@dataclass(slots=True)
class _Tally:
    blobs: int = 0
    repaired: int = 0
    bytes: int = 0

    def add(self, record: VerificationRecord) -> None:
        self.blobs += 1
        self.repaired += record.outcome == "repaired"
        self.bytes += record.bytes


def ledger_of(view: ManifestView, job: JobRecord, held: HeldGeneration) -> list[VerificationRecord]:
    """What this job has recorded so far."""
    records = (view.verification(blob.key) for blob in held.blobs)
    return [record for record in records if record is not None and record.job_id == job.job_id]


def has_recovered(view: ManifestView, db_id: int) -> bool:
    """The database counts as unhealthy, though none of its blobs is known to be damaged now."""
    database = view.database(db_id)
    if database is None or database.health != "unhealthy_generation":
        return False
    blobs = [row.blob for row in view.chunk_rows(db_id) if row.blob is not None]
    blobs += [row.blob for row in view.delta_rows(db_id)]
    blobs += blobs_of(view, db_id, database.generation)  # a fork's may be its parent's
    records = (view.verification(blob.key) for blob in blobs)
    return all(record is None or record.outcome not in _BAD for record in records)


def report(held: HeldGeneration, found: list[VerificationRecord]) -> dict[str, Any]:
    """The job's result. One that was given up before its last blob verified a part."""
    counts = Counter(record.outcome for record in found)
    bad = [
        {"key": record.key, "outcome": record.outcome, "detail": record.detail}
        for record in found
        if record.outcome != "ok"
    ]
    is_whole = {blob.key for blob in held.blobs} == {record.key for record in found}
    outcome = "verified" if is_whole else "partial"
    return {
        "outcome": "damaged" if counts.keys() & _BAD else outcome,
        "generation": held.generation,
        "blobs": len(held.blobs),
        "verified_blobs": len(found),
        "verified_bytes": sum(record.bytes for record in found),
        "repaired_blobs": counts["repaired"],
        "damaged_blobs": counts["damaged"] + counts["missing"],
        "findings": bad[:KEYS_TOLD_MAX],
    }
