"""What the manifest's rows hold.

Rows are msgspec structs encoded as msgpack arrays, `schema_version` first. Fields are only ever
appended, with defaults, so an older row decodes; a changed meaning takes a new schema version and
a migration. Timestamps are microseconds since the Unix epoch, sizes bytes; LSN and page ranges
are inclusive (`first_…`, `last_…`) because they are stored facts, not loop bounds.
"""

from typing import Any, Literal

import msgspec

SCHEMA_VERSION = 1

Engine = Literal["append_only", "libsql"]
Codec = Literal["none", "zstd", "lz4"]
DatabaseState = Literal["active", "draining", "tombstoned"]
HealthState = Literal["ok", "corrupt_wal", "wal_lost", "unhealthy_generation"]
SegmentState = Literal["open", "sealed", "checkpointed", "dropped"]
"""`dropped`: a truncation took all of it; the file goes once no reader holds it."""
JobKind = Literal[
    "create_checkpoint",
    "truncate_append_only",
    "verify_manifest",
    "download_checkpoint",
    "prune_checkpoint",
    "coalesce_chunks",
]
VerificationOutcome = Literal["ok", "repaired", "damaged", "missing"]
JobState = Literal["pending", "in_flight", "completed", "failed", "cancelled"]
JobStage = Literal[
    "planning",
    "waiting_for_lease",
    "reserving",
    "staging",
    "uploading",
    "cleanup",
    "publishing",
]
MUTATING_KINDS: frozenset[JobKind] = frozenset(
    {"create_checkpoint", "truncate_append_only", "prune_checkpoint", "coalesce_chunks"}
)
ENDED_STATES: frozenset[JobState] = frozenset({"completed", "failed", "cancelled"})


class Record(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    schema_version: int = SCHEMA_VERSION


class FeatureFlags(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    enable_checkpoints: bool = True
    enable_chunk_deltas: bool = True
    enable_append_only_truncation: bool = True
    enable_cold_scan: bool = True
    checkpoint_interval_seconds: int | None = None  # None: the service's default


class TenantRecord(Record, array_like=True, frozen=True, kw_only=True):
    tenant: str
    flags: FeatureFlags = FeatureFlags()
    limit_bytes: int | None = None
    job_limit_bytes: int | None = None


class Retention(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    keep_generations: int | None = None
    keep_seconds: int | None = 86_400
    minimum_generations: int = 2


class ForkParent(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    tenant: str
    database: str
    db_id: int
    generation: int
    inherits: bool = True
    """False: every chunk is the fork's own, nothing falls through to the parent (`lineage.py`)."""


class DatabaseRecord(Record, array_like=True, frozen=True, kw_only=True):
    db_id: int
    tenant: str
    name: str
    engine: Engine
    page_size: int  # 0 for append_only
    chunk_bytes: int
    compression: Codec
    created_at_us: int
    state: DatabaseState = "active"
    generation: int = 0
    first_lsn: int = 1
    """The oldest readable LSN."""
    floor_lsn: int = 1
    """No LSN below it is ever given out again; above what was published, lost or recovered."""
    checkpointed_lsn: int = 0
    """The last LSN that the bucket alone can restore."""
    next_chunk_id: int = 0
    page_count: int = 0
    health: HealthState = "ok"
    lost_from_lsn: int | None = None
    retention: Retention = Retention()
    forked_from: ForkParent | None = None
    wal_position: bytes = b""
    """libsql: the footer (`formats/frame_run.py`) of the last request whose WAL may be gone."""


class WalSegmentRecord(Record, array_like=True, frozen=True, kw_only=True):
    db_id: int
    segment_id: int
    first_lsn: int
    ceiling_lsn: int
    """While open, no LSN at or above it can be in the segment: what a lost WAL may have used."""
    state: SegmentState = "open"
    last_lsn: int = 0  # 0 while open
    bytes: int = 0
    covering_generation: int | None = None
    visible_last: int | None = None
    """What a tail truncation left of [first_lsn, last_lsn]; None: all of it."""


class BlobRef(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """An immutable object on the remote store, as it was confirmed there."""

    key: str
    sha256: bytes
    crc64: int
    bytes: int


class ChunkRecord(Record, array_like=True, frozen=True, kw_only=True):
    """A base blob's row, or a `drop` (no blob): valid in [generation, superseded_at)."""

    db_id: int
    chunk_id: int
    generation: int
    blob: BlobRef | None
    first: int
    """First page number (libsql) or LSN (append_only)."""
    last: int
    visible_last: int
    """What a reader sees of [first, last]; a tail truncation lowers it."""
    codec: Codec = "none"
    directory_offset: int = 0
    directory_bytes: int = 0
    logical_bytes: int = 0
    count: int = 0
    line_safe: bool = False
    """append_only: no record holds a newline, so NDJSON can carry all of them."""
    origin_db_id: int = 0
    superseded_at: int | None = None


class ChunkDeltaRecord(Record, array_like=True, frozen=True, kw_only=True):
    db_id: int
    chunk_id: int
    generation: int
    delta_id: int
    blob: BlobRef
    base_key: str
    """The base blob that the pages are encoded against; empty: complete pages."""
    pages: bytes
    """Roaring bitmap, portable format, of page numbers."""
    codec: Codec = "none"
    directory_offset: int = 0
    directory_bytes: int = 0
    logical_bytes: int = 0
    count: int = 0
    origin_db_id: int = 0
    superseded_at: int | None = None


class GenerationRecord(Record, array_like=True, frozen=True, kw_only=True):
    db_id: int
    generation: int
    checkpoint_id: str
    first_lsn: int
    last_lsn: int
    page_count: int
    committed_at_us: int
    base_chunks: int
    delta_chunks: int
    bytes_uploaded: int
    document_key: str
    document_stored: bool = False
    superseded_at_us: int | None = None
    verified_at_us: int | None = None


class SnapshotRecord(Record, array_like=True, frozen=True, kw_only=True):
    """A named pin on a generation."""

    db_id: int
    name: str
    generation: int
    last_lsn: int
    page_count: int
    created_at_us: int
    document: BlobRef | None = None
    """Its object on the remote store, known with the row and written after it."""
    document_stored: bool = False


class ForkRecord(Record, array_like=True, frozen=True, kw_only=True):
    """`child_db_id` was made from database `db_id` at `generation`. It stays until the child's last
    row is gone.
    """

    db_id: int
    child_db_id: int
    generation: int
    tenant: str
    """The child's, as `database` is."""
    database: str
    first_lsn: int = 1
    """As it was when the fork was made, as `next_chunk_id` is: for its first document."""
    next_chunk_id: int = 0


class ChangeRecord(Record, array_like=True, frozen=True, kw_only=True):
    """One committed change of the catalogue. Replaying all of them in order gives the catalogue."""

    sequence: int
    committed_at_us: int
    reason: str
    db_id: int
    tenant: str
    database: str
    generation: int
    ops: tuple[msgspec.Raw, ...]
    """The batch's catalogue ops, each as its own msgpack (tagged, see `ops.decode_op`)."""


class BlobIntent(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """The row a job will publish, recorded before its blob's upload, so that a failure knows what
    may lie on the store and a resumed job knows what it staged. It has a `row` or a `delta`; a
    drop has nothing to upload.
    """

    row: ChunkRecord | None
    uploaded: bool = False
    delta: ChunkDeltaRecord | None = None


class Progress(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    staged_chunks: int = 0
    uploaded_blobs: int = 0
    total_chunks: int = 0
    uploaded_bytes: int = 0
    total_bytes: int = 0


class JobFailure(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """A domain error, kept: `kind` is the ErrorKind's value."""

    kind: str
    code: str
    title: str
    detail: str
    fields: dict[str, Any] = {}


class JobRecord(Record, array_like=True, frozen=True, kw_only=True):
    job_id: str
    kind: JobKind
    tenant: str
    database: str
    db_id: int
    created_at_us: int
    params: dict[str, Any] = {}
    reason: str | None = None
    principal: str = ""
    state: JobState = "pending"
    stage: JobStage | None = None
    attempts: int = 0
    run: int = 0
    """Counts claims, restarts included; a stale actor's run no longer matches (I6)."""
    not_before_us: int = 0
    deadline_us: int | None = None
    started_at_us: int | None = None
    finished_at_us: int | None = None
    cancel_requested: bool = False
    plan: bytes | None = None
    """The engine's encoded CheckpointPlan; present from the planning commit on."""
    intents: tuple[BlobIntent, ...] = ()
    published_generation: int | None = None
    """The marker set by the publishing transaction itself."""
    progress: Progress = Progress()
    error: JobFailure | None = None
    result: dict[str, Any] | None = None
    cancelled_by: str | None = None
    """The truncation that asked for the cancellation, if one did."""
    trace_id: str = ""
    """The trace of the request that asked for the job: its log lines belong to it."""
    replans: int = 0
    """Plans that went stale; each plan has keys of its own."""
    request_id: str = ""
    """Of the request that asked for the job; empty where the service did."""


class IdempotencyRecord(Record, array_like=True, frozen=True, kw_only=True):
    """The first answer to a request that carried an Idempotency-Key."""

    scope_hash: bytes  # principal, route and key
    body_hash: bytes
    created_at_us: int
    status: int
    headers: dict[str, str]
    body: bytes


class RememberedAppend(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    key_hash: bytes  # 16 bytes
    body_hash: bytes  # 16 bytes
    first_lsn: int
    last_lsn: int
    payload_bytes: int
    appended_at_us: int


class LeaseRecord(Record, array_like=True, frozen=True, kw_only=True):
    db_id: int
    chunk_id: int
    generation: int
    job_id: str
    token: int
    process_id: str
    """The process that holds it; a lease of an earlier process is dead."""
    registered_at_us: int
    expires_at_us: int  # for people
    expires_at_monotonic: float  # decides, within process_id


class VerificationRecord(Record, array_like=True, frozen=True, kw_only=True):
    """What the last look at a blob's whole content on the remote store found."""

    key: str
    sha256: bytes
    bytes: int
    outcome: VerificationOutcome
    verified_at_us: int
    job_id: str
    method: str = "sha256"
    detail: str = ""


class GcRecord(Record, array_like=True, frozen=True, kw_only=True):
    """A blob that may go once `eligible_at_us` has passed and nothing reaches it."""

    key: str
    bytes: int
    db_id: int
    eligible_at_us: int
    sequence: int = 0
    """Given by the queue."""
    reason: str
    doomed: bool = False
    """The row is gone and deletion may be under way: no publication may name the key again."""


class CursorRecord(Record, array_like=True, frozen=True, kw_only=True):
    """A subscriber of the change log: all up to `acknowledged` is behind it. It has expired when
    the log was trimmed beyond that.
    """

    principal: str
    name: str
    acknowledged: int
    created_at_us: int
    acknowledged_at_us: int
