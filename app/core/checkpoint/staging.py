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
from app.core.engines.base import CheckpointPlan, MergeChunks, SealAsBase
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
            packed = packed_as_it_is_blocking(target, summary)
        else:
            packed = pack_blocking(plan, action.chunk_id, source.path, target)
    return chunk_row(plan, action, packed, summary, scope=scope, visible_last=action.visible_last)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedChunk:
    """A chunk file as it will be uploaded."""

    sha256: bytes
    crc64: int
    bytes: int
    directory_offset: int
    directory_bytes: int


def packed_as_it_is_blocking(path: Path, summary: SegmentSummary) -> PackedChunk:
    """With the codec `none` the sealed segment is the chunk."""
    hashed = hash_file_blocking(path)
    return PackedChunk(
        sha256=hashed.sha256, crc64=hashed.crc64, bytes=hashed.bytes,
        directory_offset=summary.entries_end, directory_bytes=summary.directory_bytes,
    )  # fmt: skip


def pack_blocking(plan: CheckpointPlan, chunk_id: int, segment: Path, target: Path) -> PackedChunk:
    """Compresses a sealed segment into `target`. Raises Damage, and OSError."""
    written = write_log_blocking(
        segment,
        target,
        codec=plan.codec,
        identity=LogIdentity(
            db_id=plan.db_id, chunk_id=chunk_id, generation=plan.target_generation
        ),
    )
    return PackedChunk(
        sha256=written.sha256, crc64=written.crc64, bytes=written.bytes,
        directory_offset=written.directory_offset, directory_bytes=written.directory_bytes,
    )  # fmt: skip


def chunk_row(
    plan: CheckpointPlan,
    action: SealAsBase | MergeChunks,
    packed: PackedChunk,
    summary: SegmentSummary,
    *,
    scope: KeyScope,
    visible_last: int | None = None,
) -> ChunkRecord:
    """The row to publish."""
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
                sha256_hex=packed.sha256.hex(),
            ),
            sha256=packed.sha256,
            crc64=packed.crc64,
            bytes=packed.bytes,
        ),
        first=action.first_lsn,
        last=action.last_lsn,
        visible_last=action.last_lsn if visible_last is None else visible_last,
        codec=plan.codec,
        directory_offset=packed.directory_offset,
        directory_bytes=packed.directory_bytes,
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
