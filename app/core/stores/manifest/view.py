"""The manifest at one moment: typed reads within one short read transaction.

Everything given out is copied; nothing refers to the map. A view belongs to one step of the event
loop, or to one function on a worker thread, and is never kept across an `await`.
"""

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any, TypeVar

from app.core.stores.manifest.admin_records import ApprovalRecord, AuditRecord
from app.core.stores.manifest.lineage import (
    ChunkRows,
    chunk_rows,
    chunks_at,
    deltas_at,
    depth_of,
    inheritors,
)
from app.core.stores.manifest.log_chunks import chunk_page, log_range, newest_chunks
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
    JobState,
    LeaseRecord,
    RememberedAppend,
    SnapshotRecord,
    TenantRecord,
    VerificationRecord,
    WalSegmentRecord,
)
from app.core.stores.manifest.rows import CommittedRows
from app.core.stores.manifest.tables import (
    APPROVALS,
    AUDIT_LOG,
    BLOB_REFERENCES,
    CATALOGUE_TABLES,
    CHANGE_BASE,
    CHANGE_BASE_SEQUENCE,
    CHANGE_CURSORS,
    CHANGE_LOG,
    CHANGE_SEQUENCE,
    CHUNKS,
    DATABASE_NAMES,
    DATABASES,
    DELTAS,
    DERIVED_INDEXES,
    FORKS,
    GC_KEYS,
    GC_QUEUE,
    GENERATIONS,
    IDEMPOTENCY,
    JOBS,
    JOBS_PENDING,
    JOBS_UNFINISHED,
    LEASES,
    REMEMBERED,
    SCHEMA,
    SEGMENTS,
    SNAPSHOTS,
    SUPERSEDED,
    TABLES,
    TENANTS,
    VERIFICATION,
    BlobReference,
    Table,
    base_prefix,
    blob_key,
    blob_reference_of,
    blob_reference_prefix,
    chunk_prefix,
    cursor_key,
    cursor_prefix,
    generation_key,
    meta_key,
    name_key,
    number_key,
    number_of,
    pending_prefix,
    snapshot_key,
    superseded_chunk,
)

V = TypeVar("V")


class ManifestView:
    def __init__(self, access: AbstractContextManager[CommittedRows]) -> None:
        self._access = access

    # --- the manifest itself, tenants

    def meta(self, name: str) -> bytes | None:
        return self._get(SCHEMA, meta_key(name))

    def tenant(self, tenant: str) -> TenantRecord | None:
        return self._get(TENANTS, tenant.encode())

    def tenants(self) -> list[TenantRecord]:
        return self._all(TENANTS)

    def counts(self) -> dict[str, int]:
        """Rows per table."""
        with self._access as rows:
            return {table.name: rows.entries(table) for table in TABLES}

    def version(self) -> int:
        """Grows with every commit; equal ones show the same rows (`ManifestStore.version`)."""
        with self._access as rows:
            return rows.transaction_id()

    def pages(self) -> int:
        """LMDB pages that hold the tables."""
        with self._access as rows:
            return sum(rows.pages(table) for table in TABLES)

    # --- databases

    def database(self, db_id: int) -> DatabaseRecord | None:
        """Tombstoned ones too."""
        return self._get(DATABASES, number_key(db_id))

    def database_id(self, tenant: str, name: str) -> int | None:
        raw = self._get(DATABASE_NAMES, name_key(tenant, name))
        return None if raw is None else number_of(raw)

    def databases(
        self, tenant: str | None = None, after_name: str | None = None, *, limit: int = 1000
    ) -> list[DatabaseRecord]:
        """Named ones, in the order of tenant and name. `after_name` is a name, or `tenant/name`
        where all tenants are listed.
        """
        prefix = b"" if tenant is None else name_key(tenant, "")
        start = prefix
        if after_name is not None:
            start = prefix + after_name.encode() + b"\0"
        found = []
        with self._access as rows:
            for _, raw in islice(rows.scan(DATABASE_NAMES, prefix, start=start), limit):
                if (database := rows.get(DATABASES, raw)) is not None:
                    found.append(database)
        return found

    def all_databases(self) -> list[DatabaseRecord]:
        """By db_id; tombstoned ones too."""
        return self._all(DATABASES)

    # --- catalogues

    def segments(self, db_id: int) -> list[WalSegmentRecord]:
        return self._all(SEGMENTS, number_key(db_id))

    def all_segments(self) -> list[WalSegmentRecord]:
        return self._all(SEGMENTS)

    def chunk_rows(self, db_id: int) -> list[ChunkRecord]:
        """Every row of its own, whatever its validity, by chunk and generation."""
        return self._all(CHUNKS, number_key(db_id))

    def chunk_rows_of(self, db_id: int, chunk_id: int) -> list[ChunkRecord]:
        return self._all(CHUNKS, chunk_prefix(db_id, chunk_id))

    def chunk_view(self, db_id: int, generation: int) -> list[ChunkRecord]:
        """The bases valid at the generation, by chunk; a fork's fall through to its parent."""
        return [row for row in self.chunk_states(db_id, generation) if row.blob is not None]

    def chunk_states(self, db_id: int, generation: int) -> list[ChunkRecord]:
        """`chunk_view`, drops included."""
        with self._access as rows:
            return chunks_at(rows, db_id, generation)

    def newest_chunks(
        self, db_id: int, generation: int, lsn: int, *, looks_max: int
    ) -> list[ChunkRecord] | None:
        """append_only: of `chunk_view`, the chunks that hold the LSN or later ones; None where
        that takes more than so many rows from the end of the log.
        """
        with self._access as rows:
            return newest_chunks(rows, db_id, generation, lsn, looks_max=looks_max)

    def chunk_page(self, db_id: int, generation: int, lsn: int, *, limit: int) -> list[ChunkRecord]:
        """append_only: the first of those."""
        with self._access as rows:
            return chunk_page(rows, db_id, generation, lsn, limit=limit)

    def log_range(self, db_id: int, generation: int) -> tuple[int, int] | None:
        """append_only: the first LSN of the lowest chunk at the generation, the last of the
        highest; None without chunks.
        """
        with self._access as rows:
            return log_range(rows, db_id, generation)

    def chunk_history(self, db_id: int, chunk_id: int) -> ChunkRows:
        """Every row of a chunk, own or inherited, whatever its validity."""
        with self._access as rows:
            return chunk_rows(rows, db_id, chunk_id)

    def delta_rows(self, db_id: int) -> list[ChunkDeltaRecord]:
        return self._all(DELTAS, number_key(db_id))

    def delta_rows_of(self, db_id: int, chunk_id: int) -> list[ChunkDeltaRecord]:
        return self._all(DELTAS, chunk_prefix(db_id, chunk_id))

    def delta_view(self, db_id: int, generation: int) -> list[ChunkDeltaRecord]:
        """The deltas valid at the generation, by chunk, oldest first; a fork's fall through."""
        with self._access as rows:
            return deltas_at(rows, db_id, generation)

    def generation(self, db_id: int, generation: int) -> GenerationRecord | None:
        return self._get(GENERATIONS, generation_key(db_id, generation))

    def latest_generation(self, db_id: int) -> GenerationRecord | None:
        with self._access as rows:
            newest = next(rows.scan_back(GENERATIONS, number_key(db_id)), None)
        return None if newest is None else newest[1]

    def generations(
        self, db_id: int, after: int | None = None, *, limit: int = 1000
    ) -> list[GenerationRecord]:
        """Ascending, those above `after`."""
        start = b"" if after is None else generation_key(db_id, after + 1)
        return self._some(GENERATIONS, number_key(db_id), start=start, limit=limit)

    def generation_numbers(self, db_id: int) -> list[int]:
        """Ascending."""
        prefix = number_key(db_id)
        with self._access as rows:
            return [number_of(key[len(prefix) :]) for key in rows.scan_keys(GENERATIONS, prefix)]

    def chunk_ids(self, db_id: int, *, after: int, limit: int) -> list[int]:
        """Of the chunks with rows of their own, ascending, those above `after`."""
        found: dict[int, None] = {}
        with self._access as rows:
            for table in (CHUNKS, DELTAS):
                start = chunk_prefix(db_id, after + 1)
                mine: dict[int, None] = {}
                for key in rows.scan_keys(table, number_key(db_id), start=start):
                    if len(mine) == limit:
                        break
                    mine[number_of(key[8:16])] = None
                found.update(mine)
        return sorted(found)[:limit]

    def holds_anything_of(self, db_id: int) -> bool:
        """Rows, generations, segments or forks: a deleted database stays while there are any."""
        with self._access as rows:
            return any(
                next(rows.scan_keys(table, number_key(db_id)), None) is not None
                for table in (CHUNKS, DELTAS, GENERATIONS, SEGMENTS, FORKS)
            )

    # --- snapshots, forks

    def snapshots(self, db_id: int) -> list[SnapshotRecord]:
        """By name."""
        return self._all(SNAPSHOTS, number_key(db_id))

    def all_snapshots(self) -> list[SnapshotRecord]:
        return self._all(SNAPSHOTS)

    def snapshot(self, db_id: int, name: str) -> SnapshotRecord | None:
        return self._get(SNAPSHOTS, snapshot_key(db_id, name))

    def forks_of(self, parent_db_id: int) -> list[ForkRecord]:
        """Databases made from this one, deleted ones too as long as rows of theirs are left."""
        return self._all(FORKS, number_key(parent_db_id))

    def all_forks(self) -> list[ForkRecord]:
        return self._all(FORKS)

    def fork_depth(self, db_id: int) -> int:
        """Levels that a chunk of the database may fall through."""
        with self._access as rows:
            return depth_of(rows, db_id)

    def inheriting_forks(self, row: ChunkRecord | ChunkDeltaRecord) -> list[ForkRecord]:
        """The forks that read the row by fall-through: it must stay for them (I8)."""
        with self._access as rows:
            return list(inheritors(rows, row))

    def remembered_appends(self, db_id: int) -> dict[int, tuple[RememberedAppend, ...]]:
        """By segment."""
        prefix = number_key(db_id)
        with self._access as rows:
            return {
                number_of(key[len(prefix) :]): appends
                for key, appends in rows.scan(REMEMBERED, prefix)
            }

    # --- leases, jobs, idempotency

    def lease(self, db_id: int, chunk_id: int) -> LeaseRecord | None:
        return self._get(LEASES, chunk_prefix(db_id, chunk_id))

    def leases(self) -> list[LeaseRecord]:
        return self._all(LEASES)

    def has_leases(self) -> bool:
        with self._access as rows:
            return rows.entries(LEASES) > 0

    def database_leases(self, db_id: int) -> list[LeaseRecord]:
        """By chunk; expired ones too, until they are reaped."""
        return self._all(LEASES, number_key(db_id))

    def job(self, job_id: str) -> JobRecord | None:
        return self._get(JOBS, job_id.encode())

    def jobs(
        self,
        *,
        kinds: Collection[JobKind] | None = None,
        tenant: str | None = None,
        database: str | None = None,
        states: Collection[JobState] | None = None,
        tenants: Collection[str] | None = None,
        after: str | None = None,
        limit: int = 1000,
    ) -> list[JobRecord]:
        """Newest first; those older than the job `after`."""

        def wanted(job: JobRecord) -> bool:
            return (
                (kinds is None or job.kind in kinds)
                and (tenant is None or job.tenant == tenant)
                and (tenants is None or job.tenant in tenants)
                and (database is None or job.database == database)
                and (states is None or job.state in states)
            )

        before = None if after is None else after.encode()
        with self._access as rows:
            found = (job for _, job in rows.scan_back(JOBS, before=before) if wanted(job))
            return list(islice(found, limit))

    def unfinished_jobs(self) -> list[JobRecord]:
        """Pending and in flight, oldest first."""
        with self._access as rows:
            keys = list(rows.scan_keys(JOBS_UNFINISHED))
            return [job for key in keys if (job := rows.get(JOBS, key)) is not None]

    def pending_jobs(self, db_id: int, kind: JobKind) -> list[JobRecord]:
        """Oldest first."""
        prefix = pending_prefix(db_id, kind)
        with self._access as rows:
            keys = [key[len(prefix) :] for key in rows.scan_keys(JOBS_PENDING, prefix)]
            return [job for key in keys if (job := rows.get(JOBS, key)) is not None]

    def idempotency(self, scope_hash: bytes) -> IdempotencyRecord | None:
        return self._get(IDEMPOTENCY, scope_hash)

    def idempotency_rows(self) -> list[IdempotencyRecord]:
        return self._all(IDEMPOTENCY)

    # --- operators' acts

    def approval(self, approval_id: str) -> ApprovalRecord | None:
        return self._get(APPROVALS, approval_id.encode())

    def approvals(self, *, after: str | None = None, limit: int = 1000) -> list[ApprovalRecord]:
        """Newest first; those older than the approval `after`."""
        before = None if after is None else after.encode()
        with self._access as rows:
            return [row for _, row in islice(rows.scan_back(APPROVALS, before=before), limit)]

    def audit_log(self, *, after: int | None = None, limit: int = 1000) -> list[AuditRecord]:
        """Newest first; those older than the entry `after`."""
        before = None if after is None else number_key(after)
        with self._access as rows:
            return [row for _, row in islice(rows.scan_back(AUDIT_LOG, before=before), limit)]

    def oldest_approvals(self, limit: int) -> list[ApprovalRecord]:
        return self._some(APPROVALS, limit=limit)

    def oldest_audit(self, limit: int) -> list[AuditRecord]:
        return self._some(AUDIT_LOG, limit=limit)

    # --- collection, change log

    def gc_rows(self, limit: int = 1000) -> list[GcRecord]:
        """In the order in which they become eligible."""
        return self._some(GC_QUEUE, limit=limit)

    def gc_count(self) -> int:
        with self._access as rows:
            return rows.entries(GC_QUEUE)

    def gc_row(self, key: str) -> GcRecord | None:
        with self._access as rows:
            position = rows.get(GC_KEYS, blob_key(key))
            return None if position is None else rows.get(GC_QUEUE, position)

    def verification(self, key: str) -> VerificationRecord | None:
        """What the last look at a blob's whole content found."""
        return self._get(VERIFICATION, blob_key(key))

    def is_doomed(self, key: str) -> bool:
        row = self.gc_row(key)
        return row is not None and row.doomed

    def blob_references(self, key: str) -> list[BlobReference]:
        """The rows that name the blob."""
        with self._access as rows:
            found = rows.scan_keys(BLOB_REFERENCES, blob_reference_prefix(key))
            return [blob_reference_of(raw) for raw in found]

    def superseded_chunks(self, db_id: int, *, behind: int, through: int | None) -> list[int]:
        """The chunks with a row that ended in a generation in (`behind`, `through`]."""
        start = generation_key(db_id, behind + 1)
        chunks: dict[int, None] = {}
        with self._access as rows:
            for raw, _ in rows.scan(SUPERSEDED, number_key(db_id), start=start):
                superseded_at, chunk_id = superseded_chunk(raw)
                if through is not None and superseded_at > through:
                    break
                chunks[chunk_id] = None
        return list(chunks)

    def derived_indexes(self) -> dict[str, set[bytes]]:
        """By table: for fsck."""
        with self._access as rows:
            return {table.name: set(rows.scan_keys(table)) for table in DERIVED_INDEXES}

    def change_log(self, after_sequence: int = 0, *, limit: int = 1000) -> list[ChangeRecord]:
        return self._some(CHANGE_LOG, start=number_key(after_sequence + 1), limit=limit)

    def last_sequence(self) -> int:
        raw = self._get(SCHEMA, CHANGE_SEQUENCE)
        return 0 if raw is None else number_of(raw)

    def trimmed_through(self) -> int:
        """The last change that was trimmed; 0: none ever was."""
        raw = self._get(SCHEMA, CHANGE_BASE_SEQUENCE)
        return 0 if raw is None else number_of(raw)

    def change_base(self) -> dict[str, dict[bytes, Any]]:
        """The catalogue behind the last trimmed change, from which the rest is replayed."""
        with self._access as rows:
            return {
                table.name: {
                    key[len(prefix) :]: table.codec.decode(raw)
                    for key, raw in rows.scan(CHANGE_BASE, prefix)
                }
                for table in CATALOGUE_TABLES
                for prefix in (base_prefix(table),)
            }

    def cursor(self, principal: str, name: str) -> CursorRecord | None:
        return self._get(CHANGE_CURSORS, cursor_key(principal, name))

    def cursors(self, principal: str) -> list[CursorRecord]:
        """By name."""
        return self._all(CHANGE_CURSORS, cursor_prefix(principal))

    def unreadable_rows(self, *, limit: int = 100) -> list[tuple[str, str]]:
        """Rows that cannot be decoded (table and key), and why: for fsck."""
        with self._access as rows:
            found = (error for table in TABLES for error in rows.unreadable(table))
            return [
                (f"manifest/{error.fields['table']}/{error.fields['key']}", error.detail)
                for error in islice(found, limit)
            ]

    def catalogue(self) -> dict[str, dict[bytes, Any]]:
        """All of the catalogue's tables, as `replay` gives them: for fsck."""
        with self._access as rows:
            return {table.name: dict(rows.scan(table)) for table in CATALOGUE_TABLES}

    # ---

    def _get(self, table: Table[V], key: bytes) -> V | None:
        with self._access as rows:
            return rows.get(table, key)

    def _all(self, table: Table[V], prefix: bytes = b"") -> list[V]:
        with self._access as rows:
            return [row for _, row in rows.scan(table, prefix)]

    def _some(
        self, table: Table[V], prefix: bytes = b"", *, start: bytes = b"", limit: int
    ) -> list[V]:
        with self._access as rows:
            found: Iterator[tuple[bytes, V]] = rows.scan(table, prefix, start=start)
            return [row for _, row in islice(found, limit)]
