"""Turns one planned action into the exact file that will be uploaded.

Invariants: the file's SHA-256 and CRC-64 are computed over the bytes that are uploaded (I2); the
same action gives the same bytes (I7). A sealed segment is linked, not copied, when nothing is
compressed; its inode is never written again.
Concurrency: blocking functions, one file each. Crash: a half-written file is written over.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.core.base.errors import CorruptWal, StalePlan
from app.core.engines.base import CheckpointPlan, SealAsBase
from app.core.formats.chunk import hash_file_blocking, write_log_blocking
from app.core.formats.container import LogIdentity
from app.core.formats.damage import Damage
from app.core.formats.segment import SegmentSummary
from app.core.stores.local.disk import disk_errors
from app.core.stores.manifest.records import BlobRef, ChunkRecord
from app.core.stores.remote.keys import chunk_key
from app.core.stores.wal.verification import verify_segment_blocking


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentSource:
    """A sealed segment's file and what its trailer says."""

    path: Path
    summary: SegmentSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyScope:
    """The part of a blob key that all blobs of a job share."""

    tenant: str
    database: str


def stage_segment_blocking(
    plan: CheckpointPlan,
    action: SealAsBase,
    source: SegmentSource,
    target: Path,
    *,
    scope: KeyScope,
) -> ChunkRecord:
    """Writes `target` and returns the row to publish. Raises DiskFull, StalePlan where the
    segment is not what was planned, CorruptWal where it is damaged.
    """
    summary = source.summary
    if (summary.first_lsn, summary.last_lsn) != (action.first_lsn, action.last_lsn):
        raise StalePlan("A WAL segment is not what was planned.", segment_id=action.segment_id)
    with disk_errors(target.parent), _told_as_corrupt_wal(action):
        if plan.codec == "none":
            verify_segment_blocking(source.path)  # damage must not get a fresh checksum (I10)
            _link_or_copy(source.path, target)
            hashed = hash_file_blocking(target)
            sha256, crc64, blob_bytes = hashed.sha256, hashed.crc64, hashed.bytes
            directory_offset, directory_bytes = summary.entries_end, summary.directory_bytes
        else:
            written = write_log_blocking(
                source.path,
                target,
                codec=plan.codec,
                identity=LogIdentity(
                    db_id=plan.db_id, chunk_id=action.chunk_id, generation=plan.target_generation
                ),
            )
            sha256, crc64, blob_bytes = written.sha256, written.crc64, written.bytes
            directory_offset, directory_bytes = written.directory_offset, written.directory_bytes
    return ChunkRecord(
        db_id=plan.db_id,
        chunk_id=action.chunk_id,
        generation=plan.target_generation,
        blob=BlobRef(
            key=chunk_key(
                tenant=scope.tenant,
                database=scope.database,
                checkpoint_id=plan.checkpoint_id,
                chunk_id=action.chunk_id,
                generation=plan.target_generation,
                sha256_hex=sha256.hex(),
            ),
            sha256=sha256,
            crc64=crc64,
            bytes=blob_bytes,
        ),
        first=action.first_lsn,
        last=action.last_lsn,
        visible_last=action.last_lsn if action.visible_last is None else action.visible_last,
        codec=plan.codec,
        directory_offset=directory_offset,
        directory_bytes=directory_bytes,
        logical_bytes=summary.segment_bytes,
        count=action.last_lsn - action.first_lsn + 1,
        line_safe=action.line_safe,
        origin_db_id=plan.db_id,
    )


@contextmanager
def _told_as_corrupt_wal(action: SealAsBase) -> Iterator[None]:
    try:
        yield
    except Damage as damage:
        raise CorruptWal(
            f"A sealed WAL segment is damaged: {damage}", segment_id=action.segment_id
        ) from damage


def _link_or_copy(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
            raise
        shutil.copyfile(source, target)
