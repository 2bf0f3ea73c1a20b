"""Objects under the prefix that nobody knows: found by a listing, told, and deleted if asked.

They come from an upload that landed after its job had given up (a cancelled PUT may), or after its
key had been collected, or from a start-up probe that was cut short. Invariants: I8: nothing is
taken on the word of a listing that did not end, nor what is younger than the minimum age, nor a key
whose job has not ended; what is deleted goes the way of all blobs: doomed, proven again, deleted by
the collector. A key that this service could not have made is told, never touched.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from app.core.base.ids import job_of
from app.core.retention.collector import intended_keys
from app.core.stores.manifest.ops import DoomBlob, ManifestBatch, Op, RetireBlob
from app.core.stores.manifest.records import BlobRef
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.manifest.view import ManifestView
from app.core.stores.remote.keys import (
    CHECKPOINTS_PREFIX,
    DOCUMENTS_PREFIX,
    PROBE_PREFIX,
    SNAPSHOTS_PREFIX,
    ChunkKey,
    DeltaKey,
    GenerationDocumentKey,
    SnapshotMetaKey,
    parse_key,
)
from app.core.stores.remote.protocol import BlobInfo, RemoteStore
from app.core.stores.remote.streams import closing

PREFIXES = (CHECKPOINTS_PREFIX, DOCUMENTS_PREFIX, SNAPSHOTS_PREFIX, PROBE_PREFIX)
LOOKED_UP_AT_ONCE = 1000
ORPHANS_MAX = 100_000
"""Of one sweep; the next finds the rest."""
FOREIGN_MAX = 1000
"""Keys that are told, of a prefix that somebody else writes to as well (I11)."""


@dataclass(slots=True)
class OrphanReport:
    listed: int = 0
    orphans: list[BlobInfo] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    """The first of them."""
    queued: int = 0
    """For deletion."""

    @property
    def bytes(self) -> int:
        return sum(info.bytes for info in self.orphans)


class OrphanSweep:
    def __init__(self, manifest: ManifestStore, remote: Callable[[], RemoteStore]) -> None:
        self._manifest = manifest
        self._remote = remote

    async def run(
        self, *, modified_before_us: int, delete: bool, eligible_at_us: int
    ) -> OrphanReport:
        """Raises what listing raises, having changed nothing."""
        report = OrphanReport()
        waiting: list[BlobInfo] = []
        for prefix in PREFIXES:
            async with closing(self._remote().list_blobs(prefix)) as found:
                async for info in found:
                    report.listed += 1
                    if parse_key(info.key) is None:
                        if len(report.foreign) < FOREIGN_MAX:
                            report.foreign.append(info.key)
                    elif info.modified_at_us < modified_before_us:
                        waiting.append(info)
                    if len(waiting) == LOOKED_UP_AT_ONCE:
                        report.orphans += await self._unknown(waiting)
                        waiting = []
                    if len(report.orphans) >= ORPHANS_MAX:
                        break
        report.orphans += await self._unknown(waiting)
        # Once more now that the listing has ended: what was published meanwhile is known.
        report.orphans = await self._unknown(report.orphans)
        if delete:
            for start in range(0, len(report.orphans), LOOKED_UP_AT_ONCE):
                part = report.orphans[start : start + LOOKED_UP_AT_ONCE]
                report.queued += await self._queue(part, eligible_at_us)
        return report

    async def _unknown(self, found: Sequence[BlobInfo]) -> list[BlobInfo]:
        def look(view: ManifestView) -> list[BlobInfo]:
            known = Known(view)
            return [info for info in found if not known.holds(info.key)]

        return await self._manifest.read_in_thread(look) if found else []

    async def _queue(self, orphans: Sequence[BlobInfo], eligible_at_us: int) -> int:
        ops: list[Op] = []
        for info in orphans:
            blob = BlobRef(key=info.key, sha256=b"", crc64=0, bytes=info.bytes)
            ops.append(
                RetireBlob(blob=blob, db_id=0, eligible_at_us=eligible_at_us, reason="orphan")
            )
            ops.append(DoomBlob(key=info.key, eligible_at_us=eligible_at_us))
        receipt = await self._manifest.commit(
            ManifestBatch(ops=tuple(ops), reason="collection.orphans")
        )
        return sum(result is True for result in receipt.results)


class Known:
    """What the manifest knows of keys, at one moment."""

    def __init__(self, view: ManifestView) -> None:
        self._view = view
        self._intended = intended_keys(view)
        self._jobs = {job.job_id for job in view.unfinished_jobs()}
        self._snapshots = {
            row.document.key for row in view.all_snapshots() if row.document is not None
        }

    def holds(self, key: str) -> bool:
        view = self._view
        if view.gc_row(key) is not None or view.blob_references(key) or key in self._intended:
            return True
        match parse_key(key):
            case ChunkKey() | DeltaKey() as blob:
                return job_of(blob.checkpoint_id) in self._jobs
            case GenerationDocumentKey() as document:
                row = view.generation(document.db_id, document.generation)
                return row is not None and row.document_key == key
            case SnapshotMetaKey():
                return key in self._snapshots
            case _:
                return False
