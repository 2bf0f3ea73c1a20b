"""Every decoder of bytes that come from outside, with samples to begin from, and a way to mend the
checksums of what was mutated, so that a mutation gets past them.
"""

import base64
import os
import random
import struct
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import zstandard

from app.core.base.errors import (
    CorruptBlob,
    FormatFromFuture,
    InvariantViolation,
    MalformedRecords,
    RecordTooLarge,
)
from app.core.checkpoint.generation_document import decode_document, encode_document
from app.core.engines.base import CheckpointPlan, RewriteBase, decode_plan, encode_plan
from app.core.formats.chunk import iter_log_blocking
from app.core.formats.cold_scan import FrameDecoder
from app.core.formats.container import CONTAINER_HEADER_BYTES, CONTAINER_TRAILER_BYTES
from app.core.formats.crc64 import crc64
from app.core.formats.damage import Damage
from app.core.formats.entry_scan import scan_record_entries
from app.core.formats.frame_run import frames_of
from app.core.formats.record_framing import (
    LengthPrefixedFramer,
    LineFramer,
    SingleRecordFramer,
    slice_records,
    to_lines,
    unpack_records,
)
from app.core.formats.segment import (
    ENTRY_HEADER_BYTES,
    SEGMENT_HEADER_BYTES,
    TRAILER_BYTES,
    entry_crc,
    iter_entries,
    parse_directory,
    parse_entry_header,
    parse_segment_header,
)
from app.core.formats.sqlite_image import image_page_count, parse_image_header
from app.core.formats.sqlite_wal import WalPosition, parse_wal_header
from app.core.formats.sqlite_wal_ingestion import (
    AcceptFrom,
    IngestionState,
    WalRequest,
    decide_ingestion,
)
from app.core.formats.sqlite_wal_scanner import WalScanner
from app.core.retention.snapshot_document import decode_snapshot
from app.core.stores.manifest.errors import CorruptRow, FormatTooOld
from app.core.stores.manifest.tables import CHUNKS, DATABASES, JOBS
from app.core.stores.wal.verification import verify_segment_blocking
from tests.helpers.page_blob_file import PageBlobFile
from tests.helpers.sqlite_logs import real_log, reencoded, some_commits
from tests.helpers.torture import sqlite_image
from tests.unit.core.checkpoint import test_generation_document as documents

GOLDEN = Path(__file__).parents[1] / "golden"
MIB = 1024 * 1024
_CRC = struct.Struct("<Q")
Mend = Callable[[bytearray], None]


@dataclass(frozen=True, kw_only=True)
class Target:
    """`decode` either returns or raises one of `errors`, and never holds more than `bytes_max` and
    some times what it was given.
    """

    samples: Sequence[bytes]
    decode: Callable[[bytes], object]
    errors: tuple[type[Exception], ...] = (Damage,)
    mend: Mend | None = None
    bytes_max: int = 4 * MIB


# --- SQLite


def _log() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        return real_log(Path(directory) / "db", some_commits, page_size=512)


LOG = _log()
BIG_ENDIAN_LOG = reencoded(LOG, "big")


def _ingest(data: bytes) -> object:
    """As a body from the start, as one that goes on, and as one that overlaps."""
    held = parse_wal_header(LOG)
    states: list[tuple[WalPosition | None, int]] = [(None, 0), (held, held.offset), (held, 0)]
    for position, offset in states:
        state = IngestionState(page_size=512, last_lsn=7, position=position)
        request = WalRequest(offset=offset, head=data[:4096], body_bytes=len(data))
        try:
            decision = decide_ingestion(state, request)
        except Damage:
            continue
        if isinstance(decision, AcceptFrom):
            scanner = WalScanner(
                decision.position, skip_bytes=decision.skip_bytes,
                must_continue=decision.must_continue, block_bytes=2048,
            )  # fmt: skip
            for at in range(0, len(data), 700):
                scanner.feed(data[at : at + 700])
            scanner.finish()
    return None


def _image(data: bytes) -> object:
    return image_page_count(parse_image_header(data[:100]), image_bytes=len(data))


# --- WAL entries and segments


def mend_entries(data: bytearray, start: int = 0) -> None:
    at = start
    while len(data) - at >= ENTRY_HEADER_BYTES:
        try:
            header, _ = parse_entry_header(bytes(data), offset=at)
        except Damage:
            return
        if at + header.entry_bytes > len(data):
            return
        crc = entry_crc(bytes(data), offset=at, entry_bytes=header.entry_bytes)
        _CRC.pack_into(data, at + ENTRY_HEADER_BYTES - 8, crc)
        at += header.entry_bytes


def mend_segment(data: bytearray) -> None:
    if len(data) < SEGMENT_HEADER_BYTES + TRAILER_BYTES:
        return
    _CRC.pack_into(data, SEGMENT_HEADER_BYTES - 8, crc64(bytes(data[: SEGMENT_HEADER_BYTES - 8])))
    mend_entries(data, SEGMENT_HEADER_BYTES)
    points = struct.unpack_from("<I", data, len(data) - TRAILER_BYTES + 12)[0]
    start = len(data) - TRAILER_BYTES - 16 * points
    if start >= SEGMENT_HEADER_BYTES:
        _CRC.pack_into(data, len(data) - 8, crc64(bytes(data[start : len(data) - 8])))


def _on_disk(read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """In a file that has a path and no place, so that nothing is left behind."""
    fd = os.memfd_create("fuzz")

    def decode(data: bytes) -> object:
        os.ftruncate(fd, 0)
        os.pwrite(fd, data, 0)
        return read(Path(f"/proc/self/fd/{fd}"))

    return decode


def _segment(data: bytes) -> object:
    parse_segment_header(data)
    return parse_directory(data)


# --- blobs


def mend_container(data: bytearray) -> None:
    if len(data) < CONTAINER_HEADER_BYTES + CONTAINER_TRAILER_BYTES:
        return
    head = CONTAINER_HEADER_BYTES - 8
    _CRC.pack_into(data, head, crc64(bytes(data[:head])))
    trailer = len(data) - CONTAINER_TRAILER_BYTES
    offset = struct.unpack_from("<Q", data, trailer + 72)[0]
    if CONTAINER_HEADER_BYTES <= offset <= trailer:
        _CRC.pack_into(data, len(data) - 8, crc64(bytes(data[offset : len(data) - 8])))


def _log_blob(path: Path) -> object:
    return sum(len(piece) for piece in iter_log_blocking(path))


def _pages(path: Path) -> object:
    with PageBlobFile.open_blocking(path, sha256=bytes(32)) as blob:
        return sum(len(batch.data) for batch in blob.iter_blocking())


def _delta(path: Path) -> object:
    base = GOLDEN / "pages-v1-zstd.blob"
    with (
        PageBlobFile.open_blocking(base, sha256=_sha256_of_base()) as held,
        PageBlobFile.open_blocking(path, sha256=bytes(32)) as blob,
    ):
        return sum(len(batch.data) for batch in blob.iter_blocking(base=held))


def _sha256_of_base() -> bytes:
    with PageBlobFile.open_blocking(GOLDEN / "delta-v1-zstd.blob", sha256=bytes(32)) as blob:
        return blob.directory.base_sha256 or bytes(32)


# --- what clients send, and what they are sent


def _framings(data: bytes) -> object:
    framers: list[Any] = [
        SingleRecordFramer(record_bytes_max=900),
        LineFramer(record_bytes_max=900),
        LengthPrefixedFramer(record_bytes_max=900),
    ]
    for framer in framers:
        try:
            for at in range(0, len(data), 97):
                list(framer.feed(data[at : at + 97]))
            list(framer.finish())
        except (MalformedRecords, RecordTooLarge):
            continue
    return None


def _stored_records(data: bytes) -> object:
    for read in (
        unpack_records, to_lines, lambda payload: slice_records(payload, skip=1, take=2),
    ):  # fmt: skip
        try:
            read(data)
        except Damage:
            continue
    return None


def _cold_scan(data: bytes) -> object:
    decoder = FrameDecoder(payload_bytes_max=MIB)
    for at in range(0, len(data), 333):
        for frame in decoder.feed(data[at : at + 333]):
            for look in (frame.start, frame.end, frame.problem):
                try:
                    look()
                except Damage:
                    continue
    return decoder.finish()


# --- documents and rows


def _zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def _document() -> bytes:
    rows = [documents.row(0, 1, 11, 30), documents.row(5, 3, 31, 40)]
    document = documents.build_document(documents.DATABASE, documents.generation(3), rows)
    return zstandard.ZstdDecompressor().decompress(encode_document(document))


def _plan() -> bytes:
    return encode_plan(
        CheckpointPlan(
            engine="libsql", db_id=7, checkpoint_id="c", epoch=3, expected_generation=5,
            first_lsn=41, last_lsn=90, page_count=250, next_chunk_id=9, codec="zstd",
            actions=(
                RewriteBase(
                    chunk_id=0, first_page=1, last_page=128, supersedes_base=1,
                    supersedes_deltas=(2, 3), staged_bytes_max=65536,
                ),
            ),
        )
    )  # fmt: skip


HOSTILE_DOCUMENTS = (
    b"[]", b"null", b"1", b'{"format":"bop-generation","version":"x"}', b"[" * 100_000,
    b'{"format":"bop-snapshot","version":[]}', b'{"a":' * 100_000,
)  # fmt: skip
BOMB = bytes.fromhex("28b52ffd") + b"\xe0" + struct.pack("<Q", 1 << 45) + b"\x01\x00\x00"
"""A zstd frame that promises 32 TiB."""
REAL_BOMB = _zstd(bytes(4 * MIB))


def _golden(*names: str) -> list[bytes]:
    return [(GOLDEN / name).read_bytes() for name in names]


_FIRST_LSN = parse_entry_header((GOLDEN / "entry_v1.bin").read_bytes(), offset=0)[0].first_lsn
CODECS = ("none", "zstd", "lz4")

TARGETS: dict[str, Target] = {
    "sqlite_wal": Target(samples=[LOG, BIG_ENDIAN_LOG, LOG[:2000]], decode=_ingest),
    "sqlite_image": Target(samples=[sqlite_image(random.Random(1), None)], decode=_image),
    "entries": Target(
        samples=_golden("entry_v1.bin"), mend=mend_entries,
        decode=lambda data: list(iter_entries(data)),
    ),
    "record_entries": Target(
        samples=_golden("entry_v1.bin"), mend=mend_entries,
        decode=lambda data: scan_record_entries(data, first_lsn=_FIRST_LSN),
    ),
    "segment": Target(
        samples=_golden("segment_v1.bin", "segment-v1-of-chunk.bin"), mend=mend_segment,
        decode=_segment,
    ),
    "segment_file": Target(
        samples=_golden("segment_v1.bin", "segment-v1-of-chunk.bin"), mend=mend_segment,
        decode=_on_disk(verify_segment_blocking), bytes_max=8 * MIB,
    ),
    "frames": Target(
        samples=[LOG[32 : 32 + 536 * 3] + bytes(64), LOG[32:]],
        decode=lambda data: frames_of(data, page_size=512),
    ),
    "log_blob": Target(
        samples=_golden(*(f"chunk-log-v1-{codec}.blob" for codec in CODECS)),
        mend=mend_container, decode=_on_disk(_log_blob), bytes_max=8 * MIB,
    ),
    "page_blob": Target(
        samples=_golden(*(f"pages-v1-{codec}.blob" for codec in CODECS)),
        mend=mend_container, decode=_on_disk(_pages), bytes_max=8 * MIB,
    ),
    "delta_blob": Target(
        samples=_golden("delta-v1-zstd.blob"),
        mend=mend_container, decode=_on_disk(_delta), bytes_max=8 * MIB,
    ),
    "record_framings": Target(
        samples=[b'{"n":1}\n{"n":2}\n', b"\x03\0\0\0abc\0\0\0\0\x01\0\0\0x", b"x" * 2000],
        decode=_framings,
    ),
    "stored_records": Target(samples=[b"\x03\0\0\0abc\0\0\0\0\x01\0\0\0x"], decode=_stored_records),
    "cold_scan": Target(
        samples=_golden("cold-scan-v1-libsql.bin", "cold-scan-v1-records.bin"), decode=_cold_scan
    ),
    "generation_document": Target(
        samples=[_zstd(_document()), BOMB, REAL_BOMB, *map(_zstd, HOSTILE_DOCUMENTS)],
        decode=lambda data: decode_document(data, key="k"), errors=(CorruptBlob, FormatFromFuture),
        bytes_max=12 * MIB,
    ),
    "generation_document_text": Target(
        samples=[_document(), *HOSTILE_DOCUMENTS[:4]],
        decode=lambda data: decode_document(_zstd(data), key="k"),
        errors=(CorruptBlob, FormatFromFuture),
    ),
    "snapshot_document": Target(
        samples=[*_golden("snapshot-v1.json"), *HOSTILE_DOCUMENTS],
        decode=lambda data: decode_snapshot(
            data, key=f"snapshots/acme/orders/nightly/meta-{sha256(data).hexdigest()}.json"
        ),
        errors=(CorruptBlob, FormatFromFuture),
    ),
    "plan": Target(samples=[_plan()], decode=decode_plan, errors=(InvariantViolation,)),
    "manifest_rows": Target(
        samples=[
            DATABASES.codec.encode(documents.DATABASE),
            CHUNKS.codec.encode(documents.row(0, 1, 11, 30)),
            base64.b64decode("kgE="),
        ],
        decode=lambda data: [
            _tolerant(table.codec.decode, data) for table in (DATABASES, CHUNKS, JOBS)
        ],
    ),
}  # fmt: skip


def _tolerant(decode: Callable[[bytes], object], data: bytes) -> object:
    try:
        return decode(data)
    except (CorruptRow, FormatFromFuture, FormatTooOld):
        return None
