"""fsck: walks manifest ↔ remote ↔ local files ↔ quota ↔ change log, and says what does not agree.

It changes nothing. Each finding names the invariant (I1…) it breaks. Run it against a service
(between its steps: it looks twice before it calls a moving thing wrong) or on a stopped one's data
directory.
"""

from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from app.core.base.errors import BopError, InvariantViolation
from app.core.base.tasks import BlockingPool, for_each
from app.core.checkpoint.generation_document import build_document, decode_document
from app.core.coordination.quota import StorageQuota
from app.core.services.fsck_collection import check_retired, index_differences
from app.core.services.fsck_wal import WalCheck
from app.core.stores.local.scratch import ScratchStore
from app.core.stores.manifest.lineage import is_valid_at
from app.core.stores.manifest.records import (
    ENDED_STATES,
    ChangeRecord,
    ChunkDeltaRecord,
    ChunkRecord,
    DatabaseRecord,
    ForkRecord,
    GcRecord,
    GenerationRecord,
    JobRecord,
    LeaseRecord,
    SnapshotRecord,
    WalSegmentRecord,
)
from app.core.stores.manifest.replay import Catalogue, replay
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.manifest.view import ManifestView
from app.core.stores.remote.protocol import BlobMissing, RemoteStore

HEADS_AT_ONCE = 8

Row = TypeVar("Row", ChunkRecord, ChunkDeltaRecord)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    invariant: str
    where: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FsckReport:
    findings: tuple[Finding, ...]
    checked: dict[str, int]

    @property
    def clean(self) -> bool:
        return not self.findings


@dataclass(frozen=True, slots=True, kw_only=True)
class _Manifest:
    """Everything fsck needs, copied out of one read transaction."""

    databases: list[DatabaseRecord]
    rows: list[ChunkRecord]
    deltas: list[ChunkDeltaRecord]
    inherited: list[ChunkRecord | ChunkDeltaRecord]
    """What forks read of their parents, as their own rows."""
    snapshots: list[SnapshotRecord]
    forks: list[ForkRecord]
    segments: list[WalSegmentRecord]
    generations: list[GenerationRecord]
    leases: list[LeaseRecord]
    jobs: list[JobRecord]
    retired: list[GcRecord]
    changes: list[ChangeRecord]
    differences: list[str]
    index_differences: list[str]

    @property
    def catalogue(self) -> list[ChunkRecord | ChunkDeltaRecord]:
        return [*self.rows, *self.deltas]


@dataclass(slots=True)
class _Notes:
    findings: list[Finding] = field(default_factory=list)
    checked: dict[str, int] = field(default_factory=dict)

    def add(self, invariant: str, where: str, detail: str) -> None:
        self.findings.append(Finding(invariant=invariant, where=where, detail=detail))

    def count(self, what: str, number: int = 1) -> None:
        self.checked[what] = self.checked.get(what, 0) + number


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
        notes = _Notes()
        for where, detail in await self._manifest.read_in_thread(ManifestView.unreadable_rows):
            notes.add("I10", where, detail)
        if notes.findings:  # without those rows nothing else can be told
            return FsckReport(findings=tuple(notes.findings), checked=notes.checked)
        seen = await self._manifest.read_in_thread(_load)
        _check_catalogue(seen, notes)
        _check_jobs(seen, notes)
        _check_changes(seen, notes)
        await self._check_blobs(seen, notes)
        await self._check_documents(seen, notes)
        await self._check_snapshots(seen, notes)
        wal = WalCheck(self._manifest, self._wal_root, pool=self._pool)
        await wal.run(seen.segments, seen.databases, add=notes.add, count=notes.count)
        await self._check_scratch(seen, notes)
        await self._check_quota(notes)
        return FsckReport(findings=tuple(notes.findings), checked=notes.checked)

    async def _check_blobs(self, seen: _Manifest, notes: _Notes) -> None:
        remote = self._remote()

        async def check(row: ChunkRecord | ChunkDeltaRecord) -> None:
            assert row.blob is not None
            info = await remote.head_blob(row.blob.key)
            what = "delta of chunk" if isinstance(row, ChunkDeltaRecord) else "chunk"
            where = f"{row.db_id}/{what} {row.chunk_id}@{row.generation} {row.blob.key}"
            if info is None:
                notes.add("I2", where, "the blob is not on the remote store")
            elif info.bytes != row.blob.bytes:
                notes.add("I2", where, f"{info.bytes} bytes stored, {row.blob.bytes} recorded")
            elif info.crc64 is not None and info.crc64 != row.blob.crc64:
                notes.add("I2", where, "the store's CRC-64 is not the recorded one")

        blobs = [row for row in seen.catalogue if row.blob is not None]
        await for_each(blobs, check, limit=HEADS_AT_ONCE)
        notes.count("blobs", len(blobs))

    async def _check_documents(self, seen: _Manifest, notes: _Notes) -> None:
        remote = self._remote()
        databases = {record.db_id: record for record in seen.databases}
        working = {job.db_id for job in seen.jobs if job.state == "in_flight"}

        async def check(generation: GenerationRecord) -> None:
            where = generation.document_key
            if not generation.document_stored:
                parent = databases[generation.db_id].forked_from
                first_of_fork = parent is not None and parent.generation == generation.generation
                if generation.db_id not in working and not first_of_fork:
                    notes.add("I3", where, "published, but its document was never stored")
                return
            try:
                stored = decode_document(await remote.get_blob(where), key=where)
            except BlobMissing:
                notes.add("I3", where, "the generation document is gone")
                return
            except BopError as error:
                if error.code == "remote_unavailable":
                    raise
                notes.add("I3", where, str(error))
                return
            database = databases[generation.db_id]
            rows = [row for row in (*seen.catalogue, *seen.inherited) if _is_of(row, generation)]
            expected = build_document(
                database,
                generation,
                _by_chunk(row for row in rows if isinstance(row, ChunkRecord)),
                _by_chunk(row for row in rows if isinstance(row, ChunkDeltaRecord)),
            )
            if not stored.has_the_chunks_of(expected):
                notes.add("I3", where, "the document names other chunks than the catalogue")

        await for_each(seen.generations, check, limit=HEADS_AT_ONCE)
        notes.count("generation_documents", len(seen.generations))

    async def _check_snapshots(self, seen: _Manifest, notes: _Notes) -> None:
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

    async def _check_scratch(self, seen: _Manifest, notes: _Notes) -> None:
        del seen
        with self._manifest.read() as view:
            live = {job.job_id for job in view.unfinished_jobs()}
        for directory in await self._scratch.list():
            if directory.job_id not in live:
                notes.add("I13", f"checkpoint_scratch/{directory.job_id}", "no live job owns it")

    async def _check_quota(self, notes: _Notes) -> None:
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


def _load(view: ManifestView) -> _Manifest:
    databases = view.all_databases()
    trimmed_through = view.trimmed_through()
    changes: list[ChangeRecord] = []
    while batch := view.change_log(
        after_sequence=changes[-1].sequence if changes else trimmed_through, limit=1000
    ):
        changes.extend(batch)
    return _Manifest(
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


def _check_catalogue(seen: _Manifest, notes: _Notes) -> None:
    for record in seen.databases:
        generations = [row for row in seen.generations if row.db_id == record.db_id]
        where = f"{record.tenant}/{record.name}"
        notes.count("databases")
        if record.state == "tombstoned":  # what forks need is left of it, and no generation
            continue
        newest = generations[-1] if generations else None
        if newest is not None and newest.generation != record.generation:
            notes.add("I14", where, "the newest generation is not the database's")
        stored = [row.last_lsn for row in generations if row.document_stored]
        if record.checkpointed_lsn > max(stored, default=0):
            notes.add("I3", where, "checkpointed_lsn says more than the bucket holds")
        rows = [row for row in seen.rows if row.db_id == record.db_id and row.blob is not None]
        _check_chunks(record, rows, notes)
        _check_coverage(record, rows, seen, notes)
        _check_cuts(record, rows, seen.segments, notes)
        _check_deltas(record, seen, notes)
    _check_pins(seen, notes)
    check_retired(seen.retired, seen.catalogue, notes.add)


def _check_pins(seen: _Manifest, notes: _Notes) -> None:
    """What a snapshot or fork needs is there, and every fork is known to its parent (I8)."""
    retained = {(row.db_id, row.generation) for row in seen.generations}
    for snapshot in seen.snapshots:
        if (snapshot.db_id, snapshot.generation) not in retained:
            notes.add("I8", f"{snapshot.db_id}/snapshot {snapshot.name}", "its generation is gone")
    databases = {record.db_id for record in seen.databases}
    registered = {(fork.db_id, fork.child_db_id) for fork in seen.forks}
    for record in seen.databases:
        parent = record.forked_from
        if parent is None:
            continue
        notes.count("forks")
        where = f"{record.tenant}/{record.name}"
        if not parent.inherits:
            continue
        if (parent.db_id, record.db_id) not in registered:
            notes.add("I8", where, "its parent does not know of the fork")
        if parent.db_id not in databases:
            notes.add("I8", where, "the parent that its chunks fall through to is gone")
    for fork in seen.forks:
        if fork.child_db_id not in databases:
            notes.add("I8", f"fork {fork.db_id}/{fork.child_db_id}", "there is no such database")


def _check_chunks(record: DatabaseRecord, rows: Iterable[ChunkRecord], notes: _Notes) -> None:
    if record.engine != "append_only":
        return
    last = 0
    current = sorted(
        (row for row in rows if row.superseded_at is None), key=lambda row: row.chunk_id
    )
    for row in current:
        notes.count("chunks")
        if row.first <= last:
            notes.add("I14", f"{record.db_id}/chunk {row.chunk_id}", "LSN ranges overlap")
        last = row.last


def _check_deltas(record: DatabaseRecord, seen: _Manifest, notes: _Notes) -> None:
    """A delta lies over a base, and the blob that it is encoded against is still named."""
    bases = [row for row in seen.rows if row.db_id == record.db_id and row.blob is not None]
    keys = {row.blob.key for row in bases if row.blob is not None}
    current = {row.chunk_id for row in bases if row.superseded_at is None}
    for delta in seen.deltas:
        if delta.db_id != record.db_id:
            continue
        notes.count("deltas")
        where = f"{record.db_id}/delta of chunk {delta.chunk_id}@{delta.generation}"
        if delta.base_key and delta.base_key not in keys:
            notes.add("I8", where, "the base that it is encoded against is not in the catalogue")
        if delta.superseded_at is None and delta.chunk_id not in current:
            notes.add("I2", where, "it lies over no base")


def _is_of(row: ChunkRecord | ChunkDeltaRecord, generation: GenerationRecord) -> bool:
    """Whether the row is valid at the generation."""
    return row.db_id == generation.db_id and is_valid_at(row, generation.generation)


def _check_coverage(
    record: DatabaseRecord,
    rows: Iterable[ChunkRecord],
    seen: _Manifest,
    notes: _Notes,
) -> None:
    """Every covered segment's LSNs are in a chunk: WAL never goes before its data (I4). The chunk
    may be collected with its generation while a reader still holds the segment.
    """
    if record.engine != "append_only":
        return
    covered = [(row.first, row.last) for row in rows]
    retained = {row.generation for row in seen.generations if row.db_id == record.db_id}
    for segment in seen.segments:
        if segment.db_id != record.db_id or segment.state != "checkpointed":
            continue
        if segment.covering_generation not in retained:
            continue
        if (segment.first_lsn, segment.last_lsn) not in covered:
            notes.add(
                "I4", f"wal/{segment.db_id}/{segment.segment_id}", "checkpointed, but in no chunk"
            )


def _check_cuts(
    record: DatabaseRecord,
    rows: Iterable[ChunkRecord],
    segments: Iterable[WalSegmentRecord],
    notes: _Notes,
) -> None:
    """What a truncation took shows in neither copy, and its LSNs are not given out again."""
    visible = {(row.first, row.last): row.visible_last for row in rows if row.superseded_at is None}
    for segment in segments:
        if segment.db_id != record.db_id or segment.state not in {"checkpointed", "dropped"}:
            continue
        where = f"wal/{segment.db_id}/{segment.segment_id}"
        if segment.state == "dropped":
            if segment.last_lsn >= record.floor_lsn:
                notes.add("I14", where, "dropped LSNs could be given out again")
            continue
        left = segment.last_lsn if segment.visible_last is None else segment.visible_last
        if record.engine == "append_only" and left != visible.get(
            (segment.first_lsn, segment.last_lsn), left
        ):
            notes.add("I14", where, "the WAL shows other records than its chunk")


def _check_jobs(seen: _Manifest, notes: _Notes) -> None:
    live = {job.job_id for job in seen.jobs if job.state not in ENDED_STATES}
    notes.count("jobs", len(seen.jobs))
    for lease in seen.leases:
        notes.count("leases")
        if lease.job_id not in live:
            notes.add("I6", f"lease {lease.db_id}/{lease.chunk_id}", "held by an ended job")


def _check_changes(seen: _Manifest, notes: _Notes) -> None:
    notes.count("changes", len(seen.changes))
    if seen.changes:
        first = seen.changes[0].sequence
        for position, change in enumerate(seen.changes):
            if change.sequence != first + position:
                notes.add("I14", f"change {change.sequence}", "the change log has a hole")
                break
    for difference in seen.differences:
        notes.add("I14", "change log", difference)
    for difference in seen.index_differences:
        notes.add("I8", "index", difference)
