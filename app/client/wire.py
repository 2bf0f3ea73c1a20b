"""The JSON of the contract as types. Members that a newer service adds are ignored."""

from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

import msgspec

T = TypeVar("T")

Engine = Literal["append_only", "libsql"]
Codec = Literal["none", "zstd", "lz4"]
JobState = Literal["pending", "in_flight", "completed", "failed", "cancelled"]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Base of everything that the service answers."""


class Page(Answer, Generic[T], frozen=True):
    items: list[T]
    next_cursor: str | None


class Health(Answer, frozen=True):
    state: str
    lost_from_lsn: int | None = None


class ForkParent(Answer, frozen=True):
    tenant: str
    database: str
    generation: int


class Retention(Answer, frozen=True):
    keep_generations: int | None
    keep_seconds: int | None
    minimum_generations: int


class Database(Answer, frozen=True):
    tenant: str
    database: str
    db_id: int
    engine: Engine
    page_size: int | None
    chunk_bytes: int
    compression: Codec
    state: str
    generation: int
    first_lsn: int
    next_lsn: int
    checkpointed_lsn: int
    page_count: int
    wal_bytes: int
    created_at: datetime
    forked_from: ForkParent | None
    health: Health
    retention: Retention | None = None
    earliest_generation: int | None = None
    latest_generation: int | None = None


class Durability(Answer, frozen=True):
    durable_lsn: int
    """The last LSN that survives a crash of the node."""
    checkpointed_lsn: int
    """The last LSN that survives the loss of the node."""


class Appended(Answer, frozen=True):
    first_lsn: int
    last_lsn: int
    count: int
    bytes: int


class Generation(Answer, frozen=True):
    generation: int
    checkpoint_id: str
    created_at: datetime
    first_lsn: int
    last_lsn: int
    page_count: int
    base_chunks: int
    delta_chunks: int
    bytes_uploaded: int
    superseded_at: datetime | None
    verified_at: datetime | None


class Snapshot(Answer, frozen=True):
    name: str
    generation: int
    last_lsn: int
    page_count: int
    created_at: datetime


class Progress(Answer, frozen=True):
    staged_chunks: int
    uploaded_blobs: int
    total_chunks: int
    uploaded_bytes: int
    total_bytes: int


class Job(Answer, frozen=True):
    id: str
    kind: str
    tenant: str
    database: str
    state: JobState
    stage: str | None
    progress: Progress
    attempts: int
    reason: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    error: dict[str, Any] | None
    """A problem."""
    result: dict[str, Any] | None

    @property
    def ended(self) -> bool:
        return self.state in {"completed", "failed", "cancelled"}


class Lease(Answer, frozen=True):
    tenant: str
    database: str
    chunk_id: int
    generation: int
    job_id: str
    token: int
    registered_at: datetime
    expires_at: datetime


class Change(Answer, frozen=True):
    sequence: int
    committed_at: datetime
    tenant: str
    database: str
    generation: int
    reason: str
    ops: list[dict[str, Any]]


class Readiness(Answer, frozen=True):
    status: str
    reasons: list[str]
    degraded: list[str]

    @property
    def ready(self) -> bool:
        return self.status == "ready"


class Finding(Answer, frozen=True):
    invariant: str
    """As `docs` number them: I1, I2, …"""
    where: str
    detail: str


class FsckReport(Answer, frozen=True):
    findings: list[Finding]
    checked: dict[str, int]


class WalStored(Answer, frozen=True):
    accepted_offset: int
    salt1: int
    salt2: int
    first_lsn: int | None
    """None where the body held no new commit."""
    last_lsn: int | None
    frames: int
    commits: int
    page_count: int


class ImageStored(Answer, frozen=True):
    lsn: int
    page_count: int
    changed_pages: int


class WalPosition(Answer, frozen=True):
    """How far the service has a log; without offset and salts it has none."""

    last_lsn: int
    offset: int | None = None
    salt1: int | None = None
    salt2: int | None = None
    checksum1: int | None = None
    checksum2: int | None = None
