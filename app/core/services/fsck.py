"""fsck: walks manifest ↔ remote ↔ local files ↔ quota ↔ change log, and says what does not agree.

It changes nothing. Each finding names the invariant (I1…) it breaks. Run it against a service
(between its steps: it looks twice before it calls a moving thing wrong) or on a stopped one's data
directory.
"""

from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from app.core.base.errors import BopError, Corrupt, InvariantViolation
from app.core.base.tasks import BlockingPool, for_each
from app.core.checkpoint.generation_document import build_document, decode_document
from app.core.coordination.quota import StorageQuota
from app.core.services.fsck_collection import index_differences
from app.core.services.fsck_rows import (
    Finding,
    Notes,
    SeenDatabase,
    SeenManifest,
    check_rows_blocking,
)
from app.core.services.fsck_wal import WalCheck
from app.core.stores.local.scratch import ScratchStore
from app.core.stores.manifest.records import (
    ChangeRecord,
    ChunkDeltaRecord,
    ChunkRecord,
    DatabaseRecord,
    GenerationRecord,
    SnapshotRecord,
)
from app.core.stores.manifest.replay import Catalogue, replay
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.manifest.view import ManifestView
from app.core.stores.remote.protocol import BlobMissing, RemoteStore

HEADS_AT_ONCE = 8

Row = TypeVar("Row", ChunkRecord, ChunkDeltaRecord)


@dataclass(frozen=True, slots=True, kw_only=True)
class FsckReport:
    findings: tuple[Finding, ...]
    checked: dict[str, int]

    @property
    def clean(self) -> bool:
        return not self.findings


class Fsck:
    def __init__(
        self,
        *,
        manifest: ManifestStore,
        remote: Callable[[], RemoteStore],
        wal_root: Path,
        scratch: ScratchStore,
        quota: StorageQuota | None,
        pool: BlockingPool,
        find_drift: Callable[[], Awaitable[list[str]]] | None = None,
    ) -> None:
        """`find_drift` names files that the quota has wrong, or charges that have no file."""
        self._manifest = manifest
        self._remote = remote
        self._wal_root = wal_root
        self._scratch = scratch
        self._quota = quota
        self._find_drift = find_drift
        self._pool = pool

    async def run(self) -> FsckReport:
        """Raises RemoteUnavailable when the store cannot be asked: unknown is not clean."""
        notes = Notes()
        for where, detail in await self._manifest.read_in_thread(ManifestView.unreadable_rows):
            notes.add("I10", where, detail)
        if notes.findings:  # without those rows nothing else can be told
            return FsckReport(findings=tuple(notes.findings), checked=notes.checked)
        seen = await self._manifest.read_in_thread(_load)
        databases = await self._pool.run(check_rows_blocking, seen, notes)
        await self._check_blobs(seen, notes)
        await self._check_documents(seen, databases, notes)
        await self._check_snapshots(seen, notes)
        wal = WalCheck(self._manifest, self._wal_root, pool=self._pool)
        await wal.run(seen.segments, seen.databases, add=notes.add, count=notes.count)
        await self._check_scratch(seen, notes)
        await self._check_quota(notes)
        return FsckReport(findings=tuple(notes.findings), checked=notes.checked)

    async def _check_blobs(self, seen: SeenManifest, notes: Notes) -> None:
        remote = self._remote()

        async def check(row: ChunkRecord | ChunkDeltaRecord) -> None:
            assert row.blob is not None
            info = await remote.head_blob(row.blob.key)
            what = "delta of chunk" if isinstance(row, ChunkDeltaRecord) else "chunk"
            where = f"{row.db_id}/{what} {row.chunk_id}@{row.generation} {row.blob.key}"
            if info is None:
                if self._is_named(row.blob.key):  # it was not collected meanwhile
                    notes.add("I2", where, "the blob is not on the remote store")
            elif info.bytes != row.blob.bytes:
                notes.add("I2", where, f"{info.bytes} bytes stored, {row.blob.bytes} recorded")
            elif info.crc64 is not None and info.crc64 != row.blob.crc64:
                notes.add("I2", where, "the store's CRC-64 is not the recorded one")

        blobs = [row for row in seen.catalogue if row.blob is not None]
        await for_each(blobs, check, limit=HEADS_AT_ONCE)
        notes.count("blobs", len(blobs))

    def _is_named(self, key: str) -> bool:
        with self._manifest.read() as view:
            return bool(view.blob_references(key))

    async def _check_documents(
        self, seen: SeenManifest, databases: dict[int, SeenDatabase], notes: Notes
    ) -> None:
        remote = self._remote()
        records = {record.db_id: record for record in seen.databases}
        # Whoever has published still has to store its document, if not in this attempt.
        working = {
            job.db_id
            for job in seen.jobs
            if job.state == "in_flight" or job.published_generation is not None
        }

        async def check(generation: GenerationRecord) -> None:
            where, record = generation.document_key, records[generation.db_id]
            if not generation.document_stored:
                parent = record.forked_from
                first_of_fork = parent is not None and parent.generation == generation.generation
                if generation.db_id not in working and not first_of_fork:
                    notes.add("I3", where, "published, but its document was never stored")
                return
            try:
                data = await remote.get_blob(where)
            except BlobMissing:
                if self._is_retained(generation):
                    notes.add("I3", where, "the generation document is gone")
                return
            except Corrupt as error:
                notes.add("I3", where, str(error))
                return
            rows = databases[generation.db_id]
            difference = await self._pool.run(_difference_blocking, data, record, generation, rows)
            if difference is not None:
                notes.add("I3", where, difference)

        await for_each(seen.generations, check, limit=HEADS_AT_ONCE)
        notes.count("generation_documents", len(seen.generations))

    def _is_retained(self, generation: GenerationRecord) -> bool:
        with self._manifest.read() as view:
            return view.generation(generation.db_id, generation.generation) is not None

    async def _check_snapshots(self, seen: SeenManifest, notes: Notes) -> None:
        remote = self._remote()

        async def check(snapshot: SnapshotRecord) -> None:
            document = snapshot.document
            if document is None or not snapshot.document_stored:
                return  # it is stored within moments, or once the store answers again
            info = await remote.head_blob(document.key)
            if (info is None or info.bytes != document.bytes) and self._pins(snapshot):
                notes.add("I3", document.key, "the snapshot's document is not as it was stored")

        await for_each(seen.snapshots, check, limit=HEADS_AT_ONCE)
        notes.count("snapshots", len(seen.snapshots))

    def _pins(self, snapshot: SnapshotRecord) -> bool:
        with self._manifest.read() as view:
            return view.snapshot(snapshot.db_id, snapshot.name) == snapshot

    async def _check_scratch(self, seen: SeenManifest, notes: Notes) -> None:
        del seen
        with self._manifest.read() as view:
            live = {job.job_id for job in view.unfinished_jobs()}
        for directory in await self._scratch.list():
            if directory.job_id not in live:
                notes.add("I13", f"checkpoint_scratch/{directory.job_id}", "no live job owns it")

    async def _check_quota(self, notes: Notes) -> None:
        for drift in [] if self._find_drift is None else await self._find_drift():
            notes.add("I9", "quota", drift)
        if self._quota is None:
            return
        try:
            self._quota.check()
        except InvariantViolation as violation:
            notes.add("I9", "quota", str(violation))
        with self._manifest.read() as view:
            live = {job.job_id for job in view.unfinished_jobs()}
        for job in self._quota.snapshot().jobs:
            if job.job_id not in live:
                notes.add("I9", f"quota job {job.job_id}", "an ended job still holds room")


def _load(view: ManifestView) -> SeenManifest:
    databases = view.all_databases()
    trimmed_through = view.trimmed_through()
    changes: list[ChangeRecord] = []
    while batch := view.change_log(
        after_sequence=changes[-1].sequence if changes else trimmed_through, limit=1000
    ):
        changes.extend(batch)
    return SeenManifest(
        databases=databases,
        rows=[row for record in databases for row in view.chunk_rows(record.db_id)],
        deltas=[row for record in databases for row in view.delta_rows(record.db_id)],
        inherited=[
            row for record in databases for row in _inherited(view, record) if record.forked_from
        ],
        snapshots=view.all_snapshots(),
        forks=view.all_forks(),
        segments=view.all_segments(),
        generations=[
            row
            for record in databases
            for row in view.generations(record.db_id, after=None, limit=1_000_000)
        ],
        leases=view.leases(),
        jobs=view.unfinished_jobs(),
        retired=view.gc_rows(limit=1_000_000),
        changes=changes,
        differences=_replay_differences(
            changes, view.catalogue(), base=view.change_base(), trimmed_through=trimmed_through
        ),
        index_differences=index_differences(view),
    )


def _inherited(
    view: ManifestView, record: DatabaseRecord
) -> Iterator[ChunkRecord | ChunkDeltaRecord]:
    """They are the same at every generation of the fork: a chunk that changed is its own."""
    own = {row.chunk_id for row in view.chunk_rows(record.db_id)}
    chunks = view.chunk_states(record.db_id, record.generation)
    deltas = view.delta_view(record.db_id, record.generation)
    yield from (row for row in chunks if row.chunk_id not in own)
    yield from (row for row in deltas if row.chunk_id not in own)


def _by_chunk(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row.chunk_id, row.generation))


def _replay_differences(
    changes: list[ChangeRecord], found: Catalogue, *, base: Catalogue, trimmed_through: int
) -> list[str]:
    """Where replaying the change log over what was trimmed of it does not give the catalogue."""
    try:
        expected = replay(changes, base=base, behind=trimmed_through)
    except BopError as error:
        return [str(error)]
    return [
        f"{name}[{key.hex()}]: {found[name].get(key)!r}, by the log {rows.get(key)!r}"
        for name, rows in expected.items()
        for key in rows.keys() | found[name].keys()
        if rows.get(key) != found[name].get(key)
    ]


def _difference_blocking(
    data: bytes, record: DatabaseRecord, generation: GenerationRecord, found: SeenDatabase
) -> str | None:
    """What a stored document says otherwise than the rows."""
    try:
        stored = decode_document(data, key=generation.document_key)
    except BopError as error:
        return str(error)
    rows = found.rows_at(generation.generation)
    expected = build_document(
        record,
        generation,
        _by_chunk(row for row in rows if isinstance(row, ChunkRecord)),
        _by_chunk(row for row in rows if isinstance(row, ChunkDeltaRecord)),
    )
    if stored.has_the_chunks_of(expected):
        return None
    return "the document names other chunks than the catalogue"
