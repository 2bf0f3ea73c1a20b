"""The part of fsck that takes nothing but the manifest's rows. Pure; it belongs in a thread."""

from dataclasses import dataclass, field

from app.core.services.fsck_collection import check_retired
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    invariant: str
    where: str
    detail: str


@dataclass(slots=True)
class Notes:
    findings: list[Finding] = field(default_factory=list)
    checked: dict[str, int] = field(default_factory=dict)

    def add(self, invariant: str, where: str, detail: str) -> None:
        self.findings.append(Finding(invariant=invariant, where=where, detail=detail))

    def count(self, what: str, number: int = 1) -> None:
        self.checked[what] = self.checked.get(what, 0) + number


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenManifest:
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
class SeenDatabase:
    """What is there of one database."""

    rows: list[ChunkRecord] = field(default_factory=list)
    deltas: list[ChunkDeltaRecord] = field(default_factory=list)
    inherited: list[ChunkRecord | ChunkDeltaRecord] = field(default_factory=list)
    segments: list[WalSegmentRecord] = field(default_factory=list)
    generations: list[GenerationRecord] = field(default_factory=list)

    @property
    def bases(self) -> list[ChunkRecord]:
        return [row for row in self.rows if row.blob is not None]

    def rows_at(self, generation: int) -> list[ChunkRecord | ChunkDeltaRecord]:
        every = (*self.rows, *self.deltas, *self.inherited)
        return [row for row in every if is_valid_at(row, generation)]


def _by_database(seen: SeenManifest) -> dict[int, SeenDatabase]:
    found = {record.db_id: SeenDatabase() for record in seen.databases}
    for row in seen.rows:
        found[row.db_id].rows.append(row)
    for delta in seen.deltas:
        found[delta.db_id].deltas.append(delta)
    for inherited in seen.inherited:
        found[inherited.db_id].inherited.append(inherited)
    for segment in seen.segments:
        if segment.db_id in found:
            found[segment.db_id].segments.append(segment)
    for generation in seen.generations:
        found[generation.db_id].generations.append(generation)
    return found


def check_rows_blocking(seen: SeenManifest, notes: Notes) -> dict[int, SeenDatabase]:
    """All that takes nothing but the rows; gives them by database."""
    databases = _by_database(seen)
    for record in seen.databases:
        notes.count("databases")
        if record.state != "tombstoned":  # what forks need is left of those, and no generation
            _check_database(record, databases[record.db_id], notes)
    _check_pins(seen, notes)
    check_retired(seen.retired, seen.catalogue, notes.add)
    _check_jobs(seen, notes)
    _check_changes(seen, notes)
    return databases


def _check_database(record: DatabaseRecord, found: SeenDatabase, notes: Notes) -> None:
    where = f"{record.tenant}/{record.name}"
    newest = found.generations[-1] if found.generations else None
    if newest is not None and newest.generation != record.generation:
        notes.add("I14", where, "the newest generation is not the database's")
    stored = [row.last_lsn for row in found.generations if row.document_stored]
    if record.checkpointed_lsn > max(stored, default=0):
        notes.add("I3", where, "checkpointed_lsn says more than the bucket holds")
    _check_chunks(record, found, notes)
    _check_coverage(record, found, notes)
    _check_cuts(record, found, notes)
    _check_deltas(record, found, notes)


def _check_pins(seen: SeenManifest, notes: Notes) -> None:
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


def _check_chunks(record: DatabaseRecord, found: SeenDatabase, notes: Notes) -> None:
    if record.engine != "append_only":
        return
    last = 0
    current = sorted(
        (row for row in found.bases if row.superseded_at is None), key=lambda row: row.chunk_id
    )
    for row in current:
        notes.count("chunks")
        if row.first <= last:
            notes.add("I14", f"{record.db_id}/chunk {row.chunk_id}", "LSN ranges overlap")
        last = row.last


def _check_deltas(record: DatabaseRecord, found: SeenDatabase, notes: Notes) -> None:
    """A delta lies over a base, and the blob that it is encoded against is still named."""
    keys = {row.blob.key for row in found.rows if row.blob is not None}
    current = {row.chunk_id for row in found.bases if row.superseded_at is None}
    for delta in found.deltas:
        notes.count("deltas")
        where = f"{record.db_id}/delta of chunk {delta.chunk_id}@{delta.generation}"
        if delta.base_key and delta.base_key not in keys:
            notes.add("I8", where, "the base that it is encoded against is not in the catalogue")
        if delta.superseded_at is None and delta.chunk_id not in current:
            notes.add("I2", where, "it lies over no base")


def _check_coverage(record: DatabaseRecord, found: SeenDatabase, notes: Notes) -> None:
    """Every covered segment's LSNs are in a chunk: WAL never goes before its data (I4). The chunk
    may be collected with its generation while a reader still holds the segment.
    """
    if record.engine != "append_only":
        return
    covered = {(row.first, row.last) for row in found.bases}
    retained = {row.generation for row in found.generations}
    for segment in found.segments:
        if segment.state != "checkpointed" or segment.covering_generation not in retained:
            continue
        if (segment.first_lsn, segment.last_lsn) not in covered:
            notes.add(
                "I4", f"wal/{segment.db_id}/{segment.segment_id}", "checkpointed, but in no chunk"
            )


def _check_cuts(record: DatabaseRecord, found: SeenDatabase, notes: Notes) -> None:
    """What a truncation took shows in neither copy, and its LSNs are not given out again."""
    visible = {
        (row.first, row.last): row.visible_last for row in found.bases if row.superseded_at is None
    }
    for segment in found.segments:
        if segment.state not in {"checkpointed", "dropped"}:
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


def _check_jobs(seen: SeenManifest, notes: Notes) -> None:
    live = {job.job_id for job in seen.jobs if job.state not in ENDED_STATES}
    notes.count("jobs", len(seen.jobs))
    for lease in seen.leases:
        notes.count("leases")
        if lease.job_id not in live:
            notes.add("I6", f"lease {lease.db_id}/{lease.chunk_id}", "held by an ended job")


def _check_changes(seen: SeenManifest, notes: Notes) -> None:
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
