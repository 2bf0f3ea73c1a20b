"""The headers of a SQLite write-ahead log and of its wal-index (`-shm`). Pure.

The wal-index says what is committed: a commit frame that stands in the log but not in the index
belongs to a commit that has not ended, or has failed, and may be overwritten.
Source: https://sqlite.org/walformat.html, and `WalIndexHdr`, `WalCkptInfo` in SQLite's wal.c.
"""

import struct
from dataclasses import dataclass

Salts = tuple[int, int]
Checksums = tuple[int, int]

LOG_HEADER_BYTES = 32
FRAME_HEADER_BYTES = 24
INDEX_BYTES = 136
"""Both copies of the header, and what checkpoints keep behind them."""

_INDEX_VERSION = 3007000
_LOG_VERSION = 3007000
_MAGIC_LITTLE, _MAGIC_BIG = 0x377F0682, 0x377F0683
_HEADER_BYTES = 48
_SUMMED_BYTES = 40
_header = struct.Struct("=IIIBBHIIII")
_salts = struct.Struct(">II")
_words = struct.Struct("=10I")
_log_header = struct.Struct(">8I")
_frame_header = struct.Struct(">6I")


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """The committed part of a log."""

    salts: Salts
    page_size: int
    frames: int
    page_count: int
    """Of the database as of the last of `frames`."""
    checksums: Checksums
    """Cumulative, as the last of `frames` bears them."""
    backfilled: int
    """Frames that sqlite_checkpoints have copied into the database file."""

    @property
    def frame_bytes(self) -> int:
        return FRAME_HEADER_BYTES + self.page_size

    @property
    def end(self) -> int:
        """The offset behind the last frame; 0 without one, for then the log has no header yet."""
        return LOG_HEADER_BYTES + self.frames * self.frame_bytes if self.frames else 0

    def grown_since(self, before: "Log") -> int:
        """Bytes; all of it where it was restarted."""
        return self.end - before.end if self.salts == before.salts else self.end


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    page_no: int
    page_count: int
    """0 unless it ends a transaction."""
    salts: Salts
    checksums: Checksums


def parse_index(data: bytes) -> Log | None:
    """None while the index is being changed or rebuilt: look again."""
    first, second = data[:_HEADER_BYTES], data[_HEADER_BYTES : 2 * _HEADER_BYTES]
    if len(data) < INDEX_BYTES or first != second:
        return None
    version, _, _, ready, _, size_code, frames, page_count, sum1, sum2 = _header.unpack_from(first)
    stored = struct.unpack_from("=II", first, _SUMMED_BYTES)
    if version != _INDEX_VERSION or not ready or stored != _summed(_words.unpack_from(first)):
        return None
    (backfilled,) = struct.unpack_from("=I", data, 2 * _HEADER_BYTES)
    return Log(
        salts=_salts.unpack_from(first, 32),
        # 65536 does not fit into its 16 bits: it stands there as 1
        page_size=(size_code & 0xFE00) + ((size_code & 0x0001) << 16),
        frames=frames,
        page_count=page_count,
        checksums=(sum1, sum2),
        backfilled=backfilled,
    )


def parse_frame(data: bytes) -> Frame | None:
    if len(data) < FRAME_HEADER_BYTES:
        return None
    page_no, page_count, salt1, salt2, sum1, sum2 = _frame_header.unpack_from(data)
    return Frame(
        page_no=page_no,
        page_count=page_count,
        salts=(salt1, salt2),
        checksums=(sum1, sum2),
    )


def parse_log_salts(data: bytes) -> Salts | None:
    """The salts of a log's header."""
    if len(data) < LOG_HEADER_BYTES:
        return None
    magic, _, _, _, salt1, salt2, _, _ = _log_header.unpack_from(data)
    return (salt1, salt2) if magic in {_MAGIC_LITTLE, _MAGIC_BIG} else None


def log_header(*, page_size: int, salts: Salts) -> bytes:
    """The header of a log without frames."""
    fields = (_MAGIC_BIG, _LOG_VERSION, page_size, 0, *salts)
    return _log_header.pack(*fields, *_summed(fields))


def _summed(words: tuple[int, ...]) -> Checksums:
    """SQLite's checksum of an even number of words."""
    sum1 = sum2 = 0
    for even, odd in zip(words[::2], words[1::2], strict=True):
        sum1 = (sum1 + even + sum2) & 0xFFFFFFFF
        sum2 = (sum2 + odd + sum1) & 0xFFFFFFFF
    return sum1, sum2
