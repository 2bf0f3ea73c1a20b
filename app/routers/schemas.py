"""What the API's JSON looks like, and how records become it.

Bodies of requests refuse unknown fields. Every model has an example; the OpenAPI document shows
it beside each body.
"""

from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Self

import msgspec
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from app.core.base.clock import rfc3339
from app.core.services.databases import DatabaseStatus, DurableStatus
from app.core.services.pages_in import ImageStored, WalStored
from app.core.stores.manifest.records import (
    Codec,
    DatabaseState,
    Engine,
    GenerationRecord,
    HealthState,
    JobKind,
    JobRecord,
    JobStage,
    JobState,
)
from app.routers.problems import failure_members

NAME_PATTERN = r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$"
EXAMPLE_JOB_ID = "01JDB4N0Z8Q3V5W7X9Y1A2B3C4"
EXAMPLE_TIME = "2026-11-23T21:05:00.000000Z"

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
PowerOfTwo = Annotated[int, Field(json_schema_extra={"description": "A power of two."})]


class Body(BaseModel):
    """A request's JSON: unknown fields are refused, numbers are not guessed from strings."""

    model_config = ConfigDict(extra="forbid", strict=True)


class View(BaseModel):
    """An answer's JSON."""

    model_config = ConfigDict(extra="forbid")


def example(value: dict[str, Any]) -> dict[str, Any]:
    return {"examples": [value]}


# --- databases --------------------------------------------------------------------------------


class CreateDatabaseBody(Body):
    model_config = ConfigDict(
        json_schema_extra=example(
            {"engine": "append_only", "chunk_bytes": 67_108_864, "compression": "none"}
        )
    )

    engine: Engine
    page_size: Annotated[int | None, Field(ge=512, le=65_536)] = None
    """libsql only; a power of two. Default 4096."""
    chunk_bytes: Annotated[int | None, Field(ge=65_536, le=1_073_741_824)] = None
    """A power of two. Default 64 MiB."""
    compression: Codec | None = None
    """Default `zstd` for libsql, `none` for append_only."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        for name, value in (("page_size", self.page_size), ("chunk_bytes", self.chunk_bytes)):
            if value is not None and value & (value - 1):
                raise ValueError(f"{name} must be a power of two")
        if self.engine != "libsql" and self.page_size is not None:
            raise ValueError("page_size is for libsql databases only")
        return self


class HealthView(View):
    state: HealthState
    lost_from_lsn: int | None


class ForkParentView(View):
    tenant: str
    database: str
    generation: int


class RetentionView(View):
    keep_generations: int | None
    keep_seconds: int | None
    minimum_generations: int


class DatabaseView(View):
    model_config = ConfigDict(
        json_schema_extra=example(
            {
                "tenant": "acme",
                "database": "events",
                "db_id": 1,
                "engine": "append_only",
                "page_size": None,
                "chunk_bytes": 67_108_864,
                "compression": "none",
                "state": "active",
                "generation": 1,
                "first_lsn": 1,
                "next_lsn": 1001,
                "checkpointed_lsn": 1000,
                "page_count": 0,
                "wal_bytes": 0,
                "created_at": EXAMPLE_TIME,
                "forked_from": None,
                "health": {"state": "ok", "lost_from_lsn": None},
                "retention": {
                    "keep_generations": None,
                    "keep_seconds": 86_400,
                    "minimum_generations": 2,
                },
                "earliest_generation": 1,
                "latest_generation": 1,
            }
        )
    )

    tenant: str
    database: str
    db_id: int
    engine: Engine
    page_size: int | None
    """null for append_only."""
    chunk_bytes: int
    compression: Codec
    state: DatabaseState
    generation: int
    first_lsn: int
    """The oldest readable LSN."""
    next_lsn: int
    """The LSN that the next record or frame gets."""
    checkpointed_lsn: int
    """The last LSN that the bucket alone can restore; 0: none."""
    page_count: int
    wal_bytes: int
    created_at: str
    forked_from: ForkParentView | None
    health: HealthView
    retention: RetentionView
    earliest_generation: int | None
    latest_generation: int | None

    @classmethod
    def of(cls, status: DatabaseStatus) -> Self:
        record, parent = status.record, status.record.forked_from
        return cls(
            tenant=record.tenant,
            database=record.name,
            db_id=record.db_id,
            engine=record.engine,
            page_size=record.page_size or None,
            chunk_bytes=record.chunk_bytes,
            compression=record.compression,
            state=record.state,
            generation=record.generation,
            first_lsn=status.first_lsn,
            next_lsn=status.next_lsn,
            checkpointed_lsn=record.checkpointed_lsn,
            page_count=status.page_count,
            wal_bytes=status.wal_bytes,
            created_at=rfc3339(record.created_at_us),
            forked_from=None
            if parent is None
            else ForkParentView(
                tenant=parent.tenant, database=parent.database, generation=parent.generation
            ),
            health=HealthView(state=status.health, lost_from_lsn=status.lost_from_lsn),
            retention=RetentionView(
                keep_generations=record.retention.keep_generations,
                keep_seconds=record.retention.keep_seconds,
                minimum_generations=record.retention.minimum_generations,
            ),
            earliest_generation=status.earliest_generation,
            latest_generation=status.latest_generation,
        )


class DurableView(View):
    model_config = ConfigDict(
        json_schema_extra=example({"durable_lsn": 1000, "checkpointed_lsn": 900})
    )

    durable_lsn: int
    """The last LSN that survives a crash of this node."""
    checkpointed_lsn: int
    """The last LSN that survives the loss of this node."""

    @classmethod
    def of(cls, status: DurableStatus) -> Self:
        return cls(durable_lsn=status.durable_lsn, checkpointed_lsn=status.checkpointed_lsn)


class AppendedView(View):
    model_config = ConfigDict(
        json_schema_extra=example(
            {"first_lsn": 1, "last_lsn": 1000, "count": 1000, "bytes": 64_000}
        )
    )

    first_lsn: int
    last_lsn: int
    count: int
    bytes: int
    """The records' own bytes together, without framing."""


class WalStoredView(View):
    model_config = ConfigDict(
        json_schema_extra=example(
            {
                "accepted_offset": 12_392,
                "salt1": 3_141_592_653,
                "salt2": 2_718_281_828,
                "first_lsn": 1,
                "last_lsn": 3,
                "frames": 3,
                "commits": 1,
                "page_count": 2,
            }
        )
    )

    accepted_offset: int
    """Where the log goes on; 0: nothing of it is stored."""
    salt1: int | None
    salt2: int | None
    first_lsn: int | None
    """null: the body held no new commit."""
    last_lsn: int | None
    frames: int
    """Stored, each with an LSN: those of pages beyond the database's end are not."""
    commits: int
    page_count: int

    @classmethod
    def of(cls, stored: WalStored) -> Self:
        salt1, salt2 = stored.salts or (None, None)
        return cls(
            accepted_offset=stored.accepted_offset,
            salt1=salt1,
            salt2=salt2,
            first_lsn=stored.first_lsn,
            last_lsn=stored.last_lsn,
            frames=stored.frames,
            commits=stored.commits,
            page_count=stored.page_count,
        )


class ImageStoredView(View):
    model_config = ConfigDict(
        json_schema_extra=example({"lsn": 65_536, "page_count": 65_536, "changed_pages": 65_536})
    )

    lsn: int
    """The last one that the image took."""
    page_count: int
    changed_pages: int

    @classmethod
    def of(cls, stored: ImageStored) -> Self:
        return cls(lsn=stored.lsn, page_count=stored.page_count, changed_pages=stored.changed_pages)


# --- history ----------------------------------------------------------------------------------


class GenerationView(View):
    model_config = ConfigDict(
        json_schema_extra=example(
            {
                "generation": 1,
                "checkpoint_id": f"0000000001-000001-{EXAMPLE_JOB_ID}",
                "created_at": EXAMPLE_TIME,
                "first_lsn": 1,
                "last_lsn": 1000,
                "page_count": 0,
                "base_chunks": 1,
                "delta_chunks": 0,
                "bytes_uploaded": 68_000,
                "superseded_at": None,
                "verified_at": None,
            }
        )
    )

    generation: int
    checkpoint_id: str
    created_at: str
    first_lsn: int
    last_lsn: int
    page_count: int
    base_chunks: int
    delta_chunks: int
    bytes_uploaded: int
    superseded_at: str | None
    verified_at: str | None

    @classmethod
    def of(cls, record: GenerationRecord) -> Self:
        return cls(
            generation=record.generation,
            checkpoint_id=record.checkpoint_id,
            created_at=rfc3339(record.committed_at_us),
            first_lsn=record.first_lsn,
            last_lsn=record.last_lsn,
            page_count=record.page_count,
            base_chunks=record.base_chunks,
            delta_chunks=record.delta_chunks,
            bytes_uploaded=record.bytes_uploaded,
            superseded_at=_time(record.superseded_at_us),
            verified_at=_time(record.verified_at_us),
        )


# --- jobs -------------------------------------------------------------------------------------


class TriggerCheckpointBody(Body):
    model_config = ConfigDict(
        json_schema_extra=example(
            {"tenant": "acme", "database": "events", "reason": "before the upgrade"}
        )
    )

    tenant: Name
    database: Name
    reason: Annotated[str | None, Field(max_length=1024)] = None


class ProgressView(View):
    staged_chunks: int
    uploaded_blobs: int
    total_chunks: int
    uploaded_bytes: int
    total_bytes: int


class JobView(View):
    model_config = ConfigDict(
        json_schema_extra=example(
            {
                "id": EXAMPLE_JOB_ID,
                "kind": "create_checkpoint",
                "tenant": "acme",
                "database": "events",
                "state": "completed",
                "stage": None,
                "progress": {
                    "staged_chunks": 1,
                    "uploaded_blobs": 1,
                    "total_chunks": 1,
                    "uploaded_bytes": 68_000,
                    "total_bytes": 68_000,
                },
                "attempts": 1,
                "reason": "before the upgrade",
                "created_at": EXAMPLE_TIME,
                "started_at": EXAMPLE_TIME,
                "finished_at": EXAMPLE_TIME,
                "error": None,
                "result": {
                    "outcome": "published",
                    "generation": 1,
                    "checkpoint_id": f"0000000001-000001-{EXAMPLE_JOB_ID}",
                    "first_lsn": 1,
                    "last_lsn": 1000,
                    "bytes_uploaded": 68_000,
                    "chunks": [
                        {
                            "chunk_id": 0,
                            "action": "seal_as_base",
                            "pages": 0,
                            "bytes": 68_000,
                            "blob_key": "checkpoints/acme/events/…/chunk-0-1-….blob",
                        }
                    ],
                },
            }
        )
    )

    id: str
    kind: JobKind
    tenant: str
    database: str
    state: JobState
    stage: JobStage | None
    progress: ProgressView
    attempts: int
    reason: str | None
    created_at: str
    started_at: str | None
    finished_at: str | None
    error: dict[str, Any] | None
    """A problem, as in RFC 9457; `request_id` is that of the request that asked for the job, null
    where the service did.
    """
    result: dict[str, Any] | None

    @classmethod
    def of(cls, job: JobRecord) -> Self:
        return cls(
            id=job.job_id,
            kind=job.kind,
            tenant=job.tenant,
            database=job.database,
            state=job.state,
            stage=job.stage,
            progress=ProgressView(**msgspec.structs.asdict(job.progress)),
            attempts=job.attempts,
            reason=job.reason,
            created_at=rfc3339(job.created_at_us),
            started_at=_time(job.started_at_us),
            finished_at=_time(job.finished_at_us),
            error=(
                None
                if job.error is None
                else plain(failure_members(job.error, request_id=job.request_id))
            ),
            result=plain(job.result),
        )


class PageOf(View):
    """One page of a list."""

    items: list[Any]
    next_cursor: str | None
    """Pass it as `?cursor=` for the next page; null: this was the last."""


class DatabasePage(PageOf):
    items: list[DatabaseView]


class GenerationPage(PageOf):
    items: list[GenerationView]


class JobPage(PageOf):
    items: list[JobView]


class FieldError(BaseModel):
    loc: list[str | int]
    msg: str
    type: str


class Problem(BaseModel):
    """RFC 9457. `code` is stable; further members depend on it."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    errors: list[FieldError] | None = None
    """Of `invalid_request`: what is wrong where."""


def plain(value: Any) -> Any:
    """Records and what they hold as JSON values: structs by field name, bytes in hexadecimal."""
    match value:
        case _ if is_dataclass(value) and not isinstance(value, type):
            return {one.name: plain(getattr(value, one.name)) for one in fields(value)}
        case msgspec.Struct():
            names = (field.name for field in msgspec.structs.fields(value))
            return {name: plain(getattr(value, name)) for name in names}
        case dict():
            return {str(name): plain(one) for name, one in value.items()}
        case list() | tuple():
            return [plain(one) for one in value]
        case bytes():
            return value.hex()
        case _:
            return value


def _time(timestamp_us: int | None) -> str | None:
    return None if timestamp_us is None else rfc3339(timestamp_us)
