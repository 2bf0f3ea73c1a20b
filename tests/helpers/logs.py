"""Segments and published chunks on disk, made of plain records."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from app.core.formats.chunk import LogIdentity, hash_file_blocking, write_log_blocking
from app.core.formats.codecs import CodecName
from app.core.formats.record_framing import is_line_safe, pack_records
from app.core.formats.segment import (
    SEGMENT_HEADER_BYTES,
    EngineCode,
    EntryFlag,
    EntryHeader,
    EntryType,
    IndexArray,
    IndexBuilder,
    SegmentHeader,
    SegmentSummary,
    pack_directory,
    pack_entry_header,
    pack_segment_header,
)
from app.core.stores.manifest.records import BlobRef, ChunkRecord

DB_ID = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentFile:
    """A segment as a pin shows it, and what is in it."""

    segment_id: int
    path: Path
    first_lsn: int
    durable_last_lsn: int
    entries_end: int
    index: IndexArray
    sealed: bool
    line_safe: bool
    records: tuple[bytes, ...]


def build_segment(
    path: Path,
    entries: Sequence[Sequence[bytes]],
    *,
    first_lsn: int = 1,
    segment_id: int = 1,
    db_id: int = DB_ID,
    sealed: bool = True,
) -> SegmentFile:
    """Writes a segment with one entry per list of records."""
    index, line_safe, payload_bytes = IndexBuilder(), True, 0
    header = SegmentHeader(
        engine=EngineCode.APPEND_ONLY, db_id=db_id, segment_id=segment_id,
        first_lsn=first_lsn, chunk_bytes=1 << 26,
    )  # fmt: skip
    parts, offset, lsn = [pack_segment_header(header)], SEGMENT_HEADER_BYTES, first_lsn
    for records in entries:
        payload = pack_records(list(records))
        safe = is_line_safe(payload)
        flags = EntryFlag.BEGINS | EntryFlag.ENDS | (EntryFlag.LINE_SAFE if safe else 0)
        entry = EntryHeader(
            type=EntryType.RECORDS, flags=EntryFlag(flags), first_lsn=lsn, count=len(records),
            payload_bytes=len(payload), durable_lsn=lsn - 1, appended_at_us=1_700_000_000_000_000,
        )  # fmt: skip
        index.add(first_lsn=lsn, offset=offset)
        parts += [pack_entry_header(entry, [payload]), payload]
        offset += entry.entry_bytes
        lsn += len(records)
        line_safe &= safe
        payload_bytes += len(payload)
    if sealed:
        summary = SegmentSummary(
            db_id=db_id, segment_id=segment_id, first_lsn=first_lsn, last_lsn=lsn - 1,
            entries=len(entries), entries_end=offset, payload_bytes=payload_bytes,
            index_points=len(index), line_safe=line_safe,
        )  # fmt: skip
        parts.append(pack_directory(summary, index.array()))
    path.write_bytes(b"".join(parts))
    return SegmentFile(
        segment_id=segment_id, path=path, first_lsn=first_lsn, durable_last_lsn=lsn - 1,
        entries_end=offset, index=index.array(), sealed=sealed, line_safe=line_safe,
        records=tuple(record for records in entries for record in records),
    )  # fmt: skip


def build_chunk(
    segment: SegmentFile,
    path: Path,
    *,
    codec: CodecName = "none",
    chunk_id: int = 0,
    generation: int = 1,
    visible_last: int | None = None,
) -> ChunkRecord:
    """Writes the blob that a checkpoint makes of a sealed segment to `path`; its row."""
    assert segment.sealed
    if codec == "none":
        path.write_bytes(segment.path.read_bytes())
        digest = hash_file_blocking(path)
        offset, sha256, crc64, size = segment.entries_end, digest.sha256, digest.crc64, digest.bytes
        directory_bytes = size - offset
    else:
        identity = LogIdentity(db_id=DB_ID, chunk_id=chunk_id, generation=generation)
        written = write_log_blocking(segment.path, path, codec=codec, identity=identity)
        offset, sha256, crc64, size = (
            written.directory_offset, written.sha256, written.crc64, written.bytes,
        )  # fmt: skip
        directory_bytes = written.directory_bytes
    key = f"chunk-{chunk_id}-{sha256.hex()}"
    assert hashlib.sha256(path.read_bytes()).digest() == sha256
    return ChunkRecord(
        db_id=DB_ID, chunk_id=chunk_id, generation=generation,
        blob=BlobRef(key=key, sha256=sha256, crc64=crc64, bytes=size),
        first=segment.first_lsn, last=segment.durable_last_lsn,
        visible_last=segment.durable_last_lsn if visible_last is None else visible_last,
        codec=codec, directory_offset=offset, directory_bytes=directory_bytes,
        logical_bytes=segment.path.stat().st_size, count=len(segment.records),
        line_safe=segment.line_safe, origin_db_id=DB_ID,
    )  # fmt: skip


@dataclass(slots=True)
class FakePin:
    """Counts what would keep segments from being removed."""

    segments: Sequence[SegmentFile]
    releases: int = field(default=0)

    def release(self) -> None:
        self.releases += 1
