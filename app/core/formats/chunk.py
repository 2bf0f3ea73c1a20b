"""Chunk files of append_only: hashing them, and packing sealed segments into containers.

With the codec `none` a chunk is the sealed WAL segment itself; with zstd or lz4 it is a container
of kind LOG (`formats/container.py`) that holds the segment. All functions are streaming: memory
is bounded by the largest entry. Crash: a half-written file is replaced by the next attempt.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from app.core.base import failpoints
from app.core.formats.codecs import CodecName, codec_code, compress
from app.core.formats.container import (
    BLOCK_ROW,
    BLOCK_ROW_BYTES,
    CONTAINER_HEADER_BYTES,
    CONTAINER_TRAILER_BYTES,
    ContainerDirectory,
    ContainerHeader,
    ContainerKind,
    LogIdentity,
    directory_offset_of,
    pack_container_directory,
    pack_container_header,
    parse_container_directory,
    parse_container_header,
    stored_range,
    unpack_blocks,
)
from app.core.formats.crc64 import crc64
from app.core.formats.damage import Damage
from app.core.formats.entry_scan import scan_record_entries
from app.core.formats.hashed_output import FileDigest, HashedOutput
from app.core.formats.segment import (
    SEGMENT_HEADER_BYTES,
    TRAILER_BYTES,
    IndexArray,
    SegmentSummary,
    parse_directory,
    parse_segment_header,
    parse_trailer,
)

__all__ = [
    "ContainerSummary",
    "FileDigest",
    "LogIdentity",
    "hash_file_blocking",
    "iter_entry_blocks_blocking",
    "iter_log_blocking",
    "log_container_bytes_max",
    "plan_log_blocks",
    "write_log_blocking",
]

LOG_BLOCK_BYTES = 256 * 1024
"""Raw. Twice as large gains 1 % of compression and doubles what reading one record costs."""
HASH_PIECE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerSummary:
    """A written container: what its catalogue row needs to know."""

    sha256: bytes
    crc64: int
    bytes: int
    directory_offset: int
    directory_bytes: int
    raw_bytes: int
    block_count: int


def log_container_bytes_max(segment_bytes: int) -> int:
    """No container of a segment of that size is larger."""
    blocks = segment_bytes // (LOG_BLOCK_BYTES // 2) + 3
    return (
        segment_bytes + CONTAINER_HEADER_BYTES + blocks * BLOCK_ROW_BYTES + CONTAINER_TRAILER_BYTES
    )


def hash_file_blocking(path: Path) -> FileDigest:
    """SHA-256 and CRC-64 of a file's bytes, in one pass and bounded memory."""
    sha256, checksum, total = hashlib.sha256(), 0, 0
    piece = bytearray(HASH_PIECE_BYTES)
    view = memoryview(piece)
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(view):
            sha256.update(view[:length])
            checksum = crc64(view[:length], checksum)
            total += length
    return FileDigest(sha256=sha256.digest(), crc64=checksum, bytes=total)


def write_log_blocking(
    source: Path, target: Path, *, codec: CodecName, identity: LogIdentity
) -> ContainerSummary:
    """Packs the sealed segment `source` into the container `target`, replaced if it is there.
    Equal segments, codecs and identities give equal bytes. Memory is bounded by the largest entry.

    Every entry is checked on the way: damage must not be sealed under fresh checksums. Raises
    Damage, and OSError; `target` is then rubbish.
    """
    target.unlink(missing_ok=True)  # never through a link into a segment
    with source.open("rb", buffering=0) as segment, target.open("xb") as file:
        fd, size = segment.fileno(), os.fstat(segment.fileno()).st_size
        summary, index = _read_tail_blocking(fd, size)
        header = ContainerHeader(
            kind=ContainerKind.LOG, codec=codec_code(codec), identity=identity, part_id=0,
            raw_bytes=size,
        )  # fmt: skip
        output = HashedOutput(file)
        output.write(pack_container_header(header))
        cuts = plan_log_blocks(summary, index)
        blocks = np.zeros(len(cuts), dtype=BLOCK_ROW)
        ends = [offset for _, offset in cuts[1:]] + [size]
        for number, ((first_lsn, start), end) in enumerate(zip(cuts, ends, strict=True)):
            raw = _read_blocking(fd, start, end - start)
            next_lsn = cuts[number + 1][0] if number + 1 < len(cuts) else None
            _check_log_block(raw, summary, start=start, first_lsn=first_lsn, next_lsn=next_lsn)
            packed: bytes | memoryview = compress(header.codec, raw)
            if len(packed) >= len(raw):
                packed = raw
            blocks[number] = (
                start, output.bytes, len(raw), len(packed), first_lsn, crc64(packed),
            )  # fmt: skip
            output.write(packed)
            failpoints.fp("stage.mid_write")
        directory = ContainerDirectory(
            header=header, first_key=summary.first_lsn, last_key=summary.last_lsn,
            directory_offset=output.bytes, blocks=blocks, places=b"",
        )  # fmt: skip
        output.write(pack_container_directory(directory))
    digest = output.digest()
    return ContainerSummary(
        sha256=digest.sha256, crc64=digest.crc64, bytes=digest.bytes,
        directory_offset=directory.directory_offset, directory_bytes=directory.directory_bytes,
        raw_bytes=size, block_count=len(blocks),
    )  # fmt: skip


def plan_log_blocks(summary: SegmentSummary, index: IndexArray) -> list[tuple[int, int]]:
    """First LSN and segment offset of each block: runs of index points of LOG_BLOCK_BYTES, or of
    one point where that is longer, and then the segment's own directory.
    """
    cuts: list[tuple[int, int]] = [(summary.first_lsn, 0)]
    points: list[list[int]] = index.tolist()
    ends = [offset for _, offset in points[1:]] + [summary.entries_end]
    for (first_lsn, start), end in zip(points[1:], ends[1:], strict=True):
        if end - cuts[-1][1] > LOG_BLOCK_BYTES:
            cuts.append((first_lsn, start))
    cuts.append((summary.last_lsn + 1, summary.entries_end))
    return cuts


def iter_log_blocking(path: Path) -> Iterator[bytes | memoryview]:
    """The segment that a container of kind LOG holds, in pieces, all of it checked. Raises Damage;
    what came before it was right.
    """
    with path.open("rb", buffering=0) as file:
        yield from _iter_log_blocking(file.fileno())


def _iter_log_blocking(fd: int) -> Iterator[bytes | memoryview]:
    size = os.fstat(fd).st_size
    header = parse_container_header(_read_blocking(fd, 0, min(size, CONTAINER_HEADER_BYTES)))
    directory = _find_directory_blocking(fd, size)
    if directory.header != header or header.kind is not ContainerKind.LOG:
        raise Damage("header and directory are not of one log container")
    for number in range(len(directory.blocks)):
        stored = _read_blocking(fd, *stored_range(directory, number, number + 1))
        yield from unpack_blocks(directory, number, number + 1, stored)


def iter_entry_blocks_blocking(fd: int, *, codec: CodecName) -> Iterator[memoryview]:
    """The entries of an open chunk file, in blocks of whole entries; header and directory are left
    out. The entries themselves are not checked here. Raises Damage.
    """
    pieces = _iter_segment_blocking(fd) if codec == "none" else _iter_log_blocking(fd)
    before: memoryview | None = None
    for piece in pieces:
        if before is None:
            before = memoryview(piece)[SEGMENT_HEADER_BYTES:]
        else:
            yield before
            before = memoryview(piece)
    # The last piece is the directory.


def _iter_segment_blocking(fd: int) -> Iterator[bytes]:
    """A sealed segment in the blocks that a container of it would have."""
    size = os.fstat(fd).st_size
    cuts = plan_log_blocks(*_read_tail_blocking(fd, size))
    ends = [offset for _, offset in cuts[1:]] + [size]
    for (_, start), end in zip(cuts, ends, strict=True):
        yield _read_blocking(fd, start, end - start)


def _find_directory_blocking(fd: int, size: int) -> ContainerDirectory:
    """The directory of a file of which nothing is known."""
    trailer_at = size - CONTAINER_TRAILER_BYTES
    if trailer_at < CONTAINER_HEADER_BYTES:
        raise Damage("container is cut off")
    offset = directory_offset_of(_read_blocking(fd, trailer_at, CONTAINER_TRAILER_BYTES))
    if not CONTAINER_HEADER_BYTES <= offset <= trailer_at:
        raise Damage("container directory is not where it says")
    directory = parse_container_directory(_read_blocking(fd, offset, size - offset))
    if directory.container_bytes != size:
        raise Damage("container is not as long as it says")
    return directory


def _read_tail_blocking(fd: int, size: int) -> tuple[SegmentSummary, IndexArray]:
    trailer = _read_blocking(fd, max(size - TRAILER_BYTES, 0), min(size, TRAILER_BYTES))
    tail_bytes = parse_trailer(trailer).directory_bytes
    if tail_bytes > size - SEGMENT_HEADER_BYTES:
        raise Damage("index is cut off")
    summary, index = parse_directory(_read_blocking(fd, size - tail_bytes, tail_bytes))
    header = parse_segment_header(_read_blocking(fd, 0, SEGMENT_HEADER_BYTES))
    if summary.segment_bytes != size or (header.db_id, header.segment_id, header.first_lsn) != (
        summary.db_id, summary.segment_id, summary.first_lsn,
    ):  # fmt: skip
        raise Damage("segment header and trailer disagree")
    return summary, index


def _check_log_block(
    raw: bytes, summary: SegmentSummary, *, start: int, first_lsn: int, next_lsn: int | None
) -> None:
    if next_lsn is None:
        return  # the segment's directory, parsed before
    entries = memoryview(raw)[SEGMENT_HEADER_BYTES if start == 0 else 0 :]
    places = scan_record_entries(entries, first_lsn=first_lsn)
    reached = places[-1].first_lsn + places[-1].records if places else first_lsn
    if reached != next_lsn:
        raise Damage(f"segment {summary.segment_id} misses LSN {reached}", offset=start)


def _read_blocking(fd: int, offset: int, length: int) -> bytes:
    data = os.pread(fd, length, offset)
    while len(data) < length:
        more = os.pread(fd, length - len(data), offset + len(data))
        if not more:
            raise Damage("file is cut off", offset=offset + len(data))
        data += more
    return data
