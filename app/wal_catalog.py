"""Joins the WAL store to the manifest: segment rows are written where segments are made."""

from collections.abc import Sequence

from app.core.stores.manifest.ops import ManifestBatch, RegisterSegment, SealSegment
from app.core.stores.manifest.records import WalSegmentRecord
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.wal.segments import NewSegment, SegmentInfo


class ManifestSegmentCatalog:
    """The WAL's SegmentCatalog over the manifest. Called on the WAL's writer threads."""

    def __init__(self, manifest: ManifestStore) -> None:
        self._manifest = manifest

    def register_blocking(self, *, db_id: int, segments: Sequence[NewSegment]) -> None:
        ops = tuple(
            RegisterSegment(
                row=WalSegmentRecord(
                    db_id=db_id,
                    segment_id=segment.segment_id,
                    first_lsn=segment.first_lsn,
                    ceiling_lsn=segment.ceiling_lsn,
                )
            )
            for segment in segments
        )
        self._manifest.commit_blocking(ManifestBatch(ops=ops, reason="wal.registered", db_id=db_id))

    def seal_blocking(self, info: SegmentInfo) -> None:
        self._manifest.commit_blocking(
            ManifestBatch(
                ops=(
                    SealSegment(
                        db_id=info.db_id,
                        segment_id=info.segment_id,
                        last_lsn=info.last_lsn,
                        bytes=info.file_bytes,
                    ),
                ),
                reason="wal.sealed",
                db_id=info.db_id,
            )
        )
