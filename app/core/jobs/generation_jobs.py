"""Jobs about one published generation: what they are asked for, and what holds it meanwhile."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

from app.core.base.clock import Clock, Randomness, wall_us
from app.core.base.errors import DatabaseNotFound
from app.core.base.ids import new_ulid
from app.core.reads.generation_blobs import blobs_of
from app.core.reads.read_point import GenerationPins
from app.core.retention.selection import missing_generation
from app.core.stores.manifest.records import BlobRef, DatabaseRecord, JobRecord
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.manifest.view import ManifestView

GenerationJobKind = Literal["verify_manifest", "download_checkpoint"]


def generation_job(
    kind: GenerationJobKind,
    database: DatabaseRecord,
    *,
    generation: int,
    principal: str,
    reason: str | None,
    clock: Clock,
    randomness: Randomness,
) -> JobRecord:
    """It has no deadline: it takes as long as its pace makes it, and a stall ends an attempt."""
    return JobRecord(
        job_id=new_ulid(clock, randomness),
        kind=kind,
        tenant=database.tenant,
        database=database.name,
        db_id=database.db_id,
        created_at_us=wall_us(clock),
        params={"generation": generation},
        reason=reason,
        principal=principal,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldGeneration:
    database: DatabaseRecord
    generation: int
    blobs: list[BlobRef]
    bytes: int


@asynccontextmanager
async def held_generation(
    manifest: ManifestStore, pins: GenerationPins, job: JobRecord
) -> AsyncIterator[HeldGeneration]:
    """The job's generation, pinned: nothing of it is collected within (I8). Raises
    DatabaseNotFound, GenerationExpired.
    """
    generation = int(job.params["generation"])
    unpin = pins.pin(job.db_id, generation)  # first: what is found then stays
    try:

        def look(view: ManifestView) -> HeldGeneration:
            database = view.database(job.db_id)
            if database is None or database.state == "tombstoned":
                raise DatabaseNotFound(f"{job.tenant}/{job.database} is gone.")
            if view.generation(job.db_id, generation) is None:
                raise missing_generation(database, generation)
            blobs = blobs_of(view, job.db_id, generation)
            return HeldGeneration(
                database=database,
                generation=generation,
                blobs=blobs,
                bytes=sum(blob.bytes for blob in blobs),
            )

        yield await manifest.read_in_thread(look)
    finally:
        unpin()
