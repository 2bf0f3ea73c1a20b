"""The manifest's tables: their names, their keys, what a row holds.

Keys are big-endian, so that LMDB's byte order is the order of the numbers. Everything here is
pure. Index tables hold no facts of their own; the ops that write a row keep its index right.
"""

import hashlib
from struct import Struct
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from app.core.stores.manifest.admin_records import ApprovalRecord, AuditRecord
from app.core.stores.manifest.encoding import AppendsCodec, BytesCodec, Codec, RecordCodec
from app.core.stores.manifest.errors import CorruptRow
from app.core.stores.manifest.records import (
    ChangeRecord,
    ChunkDeltaRecord,
    ChunkRecord,
    CursorRecord,
    DatabaseRecord,
    ForkRecord,
    GcRecord,
    GenerationRecord,
    IdempotencyRecord,
    JobKind,
    JobRecord,
    LeaseRecord,
    RememberedAppend,
    SnapshotRecord,
    TenantRecord,
    VerificationRecord,
    WalSegmentRecord,
)

V = TypeVar("V")

KEY_BYTES_MAX = 511  # LMDB's limit as it is built by default
_JOINED_KEY_BYTES_MAX = 480

_u64 = Struct(">Q").pack
_two = Struct(">QQ").pack
_three = Struct(">QQQ").pack
_unpack_u64 = Struct(">Q").unpack
_superseded = Struct(">QQQQB")
_reference = Struct(">16scQQQ")


class Table(Generic[V]):
    """One sub-database. Compared by identity; the name is what LMDB knows it by."""

    __slots__ = ("codec", "name", "stored_name")

    def __init__(self, name: str, codec: Codec[V]) -> None:
        self.name = name
        self.stored_name = name.encode()
        self.codec = codec

    def __repr__(self) -> str:
        return f"Table({self.name})"


SCHEMA: Table[bytes] = Table("schema", BytesCodec())
TENANTS = Table("tenants", RecordCodec(TenantRecord))
DATABASES = Table("databases", RecordCodec(DatabaseRecord))
DATABASE_NAMES: Table[bytes] = Table("database_names", BytesCodec())
SEGMENTS = Table("wal_catalog", RecordCodec(WalSegmentRecord))
CHUNKS = Table("chunk_catalog", RecordCodec(ChunkRecord))
DELTAS = Table("chunk_delta_index", RecordCodec(ChunkDeltaRecord))
GENERATIONS = Table("generations", RecordCodec(GenerationRecord))
SNAPSHOTS = Table("snapshot_index", RecordCodec(SnapshotRecord))
FORKS = Table("forks", RecordCodec(ForkRecord))
CHANGE_LOG = Table("change_log", RecordCodec(ChangeRecord))
CHANGE_BASE: Table[bytes] = Table("change_base", BytesCodec())
CHANGE_CURSORS = Table("change_cursors", RecordCodec(CursorRecord))
JOBS = Table("job_queue", RecordCodec(JobRecord))
JOBS_PENDING: Table[bytes] = Table("job_pending_index", BytesCodec())
JOBS_UNFINISHED: Table[bytes] = Table("job_unfinished_index", BytesCodec())
IDEMPOTENCY = Table("idempotency_keys", RecordCodec(IdempotencyRecord))
REMEMBERED: Table[tuple[RememberedAppend, ...]] = Table(
    "remembered_appends", AppendsCodec(tuple[RememberedAppend, ...])
)
LEASES = Table("chunk_leases", RecordCodec(LeaseRecord))
LEASES_BY_JOB: Table[bytes] = Table("chunk_lease_job_index", BytesCodec())
GC_QUEUE = Table("gc_queue", RecordCodec(GcRecord))
GC_KEYS: Table[bytes] = Table("gc_key_index", BytesCodec())
BLOB_REFERENCES: Table[bytes] = Table("blob_reference_index", BytesCodec())
SUPERSEDED: Table[bytes] = Table("superseded_index", BytesCodec())
APPROVALS = Table("approvals", RecordCodec(ApprovalRecord))
AUDIT_LOG = Table("audit_log", RecordCodec(AuditRecord))
VERIFICATION = Table("verification", RecordCodec(VerificationRecord))

TABLES: tuple[Table[Any], ...] = (
    SCHEMA,
    TENANTS,
    DATABASES,
    DATABASE_NAMES,
    SEGMENTS,
    CHUNKS,
    DELTAS,
    GENERATIONS,
    SNAPSHOTS,
    FORKS,
    CHANGE_LOG,
    CHANGE_BASE,
    CHANGE_CURSORS,
    JOBS,
    JOBS_PENDING,
    JOBS_UNFINISHED,
    IDEMPOTENCY,
    REMEMBERED,
    LEASES,
    LEASES_BY_JOB,
    GC_QUEUE,
    GC_KEYS,
    BLOB_REFERENCES,
    SUPERSEDED,
    APPROVALS,
    AUDIT_LOG,
    VERIFICATION,
)

CATALOGUE_TABLES: tuple[Table[Any], ...] = (
    DATABASES,
    DATABASE_NAMES,
    SEGMENTS,
    CHUNKS,
    DELTAS,
    GENERATIONS,
    SNAPSHOTS,
    FORKS,
)
"""What replaying the change log gives (I14)."""

DERIVED_INDEXES: tuple[Table[bytes], ...] = (BLOB_REFERENCES, SUPERSEDED)
"""What follows from the rows of chunks and deltas (`derived.py`)."""

# --- keys of `schema`

CHANGE_SEQUENCE = b"counter/change_sequence"
CHANGE_BASE_SEQUENCE = b"counter/change_base_sequence"
"""All changes up to it are trimmed, and in `change_base`."""
DATABASE_IDS = b"counter/database_id"
LEASE_TOKENS = b"counter/lease_token"
GC_SEQUENCE = b"counter/gc_sequence"
AUDIT_SEQUENCE = b"counter/audit_sequence"
META_PREFIX = b"meta/"
LEDGER_PREFIX = b"migration/"


def meta_key(name: str) -> bytes:
    return META_PREFIX + name.encode()


def ledger_key(number: int) -> bytes:
    return LEDGER_PREFIX + b"%04d" % number


# --- keys of the other tables


def number_key(number: int) -> bytes:
    """`databases`, `change_log`, `audit_log`."""
    return _u64(number)


def number_of(raw: bytes) -> int:
    """Raises CorruptRow."""
    if len(raw) != 8:
        raise CorruptRow(f"{len(raw)} bytes are no number.")
    value: int = _unpack_u64(raw)[0]
    return value


def name_key(tenant: str, name: str) -> bytes:
    return f"{tenant}/{name}".encode()


def segment_key(db_id: int, segment_id: int) -> bytes:
    """`wal_catalog`, `remembered_appends`."""
    return _two(db_id, segment_id)


def generation_key(db_id: int, generation: int) -> bytes:
    return _two(db_id, generation)


def snapshot_key(db_id: int, name: str) -> bytes:
    return _u64(db_id) + name.encode()


def fork_key(db_id: int, child_db_id: int) -> bytes:
    """The parent first."""
    return _two(db_id, child_db_id)


def chunk_prefix(db_id: int, chunk_id: int) -> bytes:
    """Also the key of `chunk_leases`."""
    return _two(db_id, chunk_id)


def chunk_row_key(db_id: int, chunk_id: int, generation: int) -> bytes:
    """`chunk_catalog`, `chunk_delta_index`."""
    return _three(db_id, chunk_id, generation)


def pending_key(db_id: int, kind: JobKind, job_id: str) -> bytes:
    return pending_prefix(db_id, kind) + job_id.encode()


def pending_prefix(db_id: int, kind: JobKind) -> bytes:
    return _u64(db_id) + kind.encode() + b"/"


def job_lease_key(job_id: str, db_id: int, chunk_id: int) -> bytes:
    """Its tail is the lease's own key."""
    return job_lease_prefix(job_id) + _two(db_id, chunk_id)


def job_lease_prefix(job_id: str) -> bytes:
    return job_id.encode() + b"/"


def gc_row_key(eligible_at_us: int, sequence: int) -> bytes:
    return _two(eligible_at_us, sequence)


def blob_key(key: str) -> bytes:
    """`gc_key_index`, `verification`. An object's key, or its hash where LMDB could not hold it."""
    raw = key.encode()
    if len(raw) <= _JOINED_KEY_BYTES_MAX:
        return raw
    return b"sha256:" + hashlib.sha256(raw).digest()


def base_key(table: Table[Any], key: bytes) -> bytes:
    """`change_base`: the row `key` of a catalogue's table, as it was when the log was trimmed."""
    return base_prefix(table) + key


def base_prefix(table: Table[Any]) -> bytes:
    return table.stored_name + b"/"


def cursor_key(principal: str, name: str) -> bytes:
    return cursor_prefix(principal) + name.encode()


def cursor_prefix(principal: str) -> bytes:
    """Principals may have any name of any length."""
    return hashlib.sha256(principal.encode()).digest()


NameKind = Literal["chunk", "delta", "base"]
"""How a row names a blob: as a chunk's, as a delta's, or as what a delta is encoded against."""
_KIND_BYTES: dict[NameKind, bytes] = {"chunk": b"c", "delta": b"d", "base": b"b"}
_KINDS: dict[bytes, NameKind] = {raw: kind for kind, raw in _KIND_BYTES.items()}


class BlobReference(NamedTuple):
    kind: NameKind
    db_id: int
    chunk_id: int
    generation: int


def blob_reference_prefix(key: str) -> bytes:
    """Two keys with one digest would keep each other: an error on the safe side."""
    return hashlib.sha256(key.encode()).digest()[:16]


def blob_reference_key(
    key: str, kind: NameKind, db_id: int, chunk_id: int, generation: int
) -> bytes:
    return _reference.pack(
        blob_reference_prefix(key), _KIND_BYTES[kind], db_id, chunk_id, generation
    )


def blob_reference_of(raw: bytes) -> BlobReference:
    _, kind, db_id, chunk_id, generation = _reference.unpack(raw)
    return BlobReference(_KINDS[kind], db_id, chunk_id, generation)


def superseded_key(
    db_id: int, superseded_at: int, chunk_id: int, generation: int, *, is_delta: bool
) -> bytes:
    return _superseded.pack(db_id, superseded_at, chunk_id, generation, is_delta)


def superseded_chunk(raw: bytes) -> tuple[int, int]:
    """The generation in which the row ended, and its chunk."""
    _, superseded_at, chunk_id, _, _ = _superseded.unpack(raw)
    return superseded_at, chunk_id
