"""SQLite's write-ahead log: layout, checksums, and what a run of frames means.

    header (32 bytes) · frames, each a 24-byte header and a page

All integers are big-endian (https://www.sqlite.org/fileformat2.html, "WAL file format"). A frame's
header is page number, database size after a commit (0 in other frames), the log's two salts, and
the checksum of the log up to and including this frame. The checksum reads its input as 32-bit words
of the byte order that the magic names, two at a time:

    s1 += x[i] + s2;  s2 += x[i+1] + s1          (modulo 2^32)

That is linear: over one frame, s' = M^n · s + c, where c is a dot product of the frame's words with
Fibonacci numbers. As each frame carries the checksum it ends with, frame i *links* to the stored
checksum of frame i-1 or does not, and all links are checked at once. A run of links that begins at
a known checksum is the very chain SQLite computes; a later run tells damage from a torn tail.
"""

import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from app.core.formats.damage import Damage

WAL_HEADER_BYTES = 32
FRAME_HEADER_BYTES = 24
WAL_VERSION = 3_007_000
PAGE_SIZES = frozenset(1 << shift for shift in range(9, 17))

_LOCK_BYTE = 0x40000000
_MAGIC: dict[int, "ChecksumOrder"] = {0x377F0682: "little", 0x377F0683: "big"}
_HEADER = struct.Struct(">8I")
_WORD_BITS = 0xFFFFFFFF

ChecksumOrder = Literal["little", "big"]
ORDERS: tuple[ChecksumOrder, ...] = ("little", "big")
Words = npt.NDArray[np.uint32]
Flags = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class WalPosition:
    """A frame boundary of one log, and all it takes to verify what follows."""

    offset: int
    salt1: int
    salt2: int
    checksum1: int
    checksum2: int
    page_size: int
    order: ChecksumOrder | None = None  # None where only salts and checksums were told

    @property
    def salts(self) -> tuple[int, int]:
        return self.salt1, self.salt2

    @property
    def frames(self) -> int:
        """Frames of the log up to here, which is also the number of the last of them."""
        return frames_before(self.offset, page_size=self.page_size)


def frame_bytes(page_size: int) -> int:
    return FRAME_HEADER_BYTES + page_size


def frames_before(offset: int, *, page_size: int) -> int:
    return (offset - WAL_HEADER_BYTES) // frame_bytes(page_size)


def is_frame_boundary(offset: int, *, page_size: int) -> bool:
    past = offset - WAL_HEADER_BYTES
    return past >= 0 and past % frame_bytes(page_size) == 0


def lock_byte_page(page_size: int) -> int:
    """The page that SQLite locks in and never writes; only databases above 1 GiB have it."""
    return _LOCK_BYTE // page_size + 1


# --- checksums --------------------------------------------------------------------------------


def checksum(data: bytes, order: ChecksumOrder, start: tuple[int, int] = (0, 0)) -> tuple[int, int]:
    """Word by word, as SQLite defines it: for headers, not for pages."""
    first, second = start
    for x, y in struct.iter_unpack("<2I" if order == "little" else ">2I", data):
        first = (first + x + second) & _WORD_BITS
        second = (second + y + first) & _WORD_BITS
    return first, second


@dataclass(frozen=True, slots=True)
class _FrameMap:
    """One frame's step of the checksum: s1' = a·s1 + b·s2 + words·first, s2' likewise."""

    first: Words  # a coefficient per 32-bit word of the frame, 0 for salts and checksum
    second: Words
    matrix: Words  # M^n, shape (2, 2)


@lru_cache(maxsize=len(PAGE_SIZES))
def _frame_map(page_size: int) -> _FrameMap:
    """Half a step adds a word and both sums, so words count as often as Fibonacci's rabbits."""
    count = (8 + page_size) // 4
    fibonacci = [0, 1]
    for _ in range(count):
        fibonacci.append((fibonacci[-1] + fibonacci[-2]) & _WORD_BITS)
    backwards = np.array(fibonacci[count::-1], dtype=np.uint32)  # F(count) … F(0)

    def over_frame(coefficients: Words) -> Words:
        spread = np.zeros(frame_bytes(page_size) // 4, dtype=np.uint32)
        spread[:2], spread[6:] = coefficients[:2], coefficients[2:]
        spread.setflags(write=False)
        return spread

    matrix = np.array(
        [[fibonacci[count - 1], fibonacci[count]], [fibonacci[count], fibonacci[count + 1]]],
        dtype=np.uint32,
    )
    return _FrameMap(over_frame(backwards[1:]), over_frame(backwards[:-1]), matrix)


def linked(rows: Words, *, page_size: int, order: ChecksumOrder, start: tuple[int, int]) -> Flags:
    """Whether each frame's checksum follows from the one stored in the frame before it.

    `rows` are whole frames as little-endian words, shape (frames, words); `start` stands for the
    frame before the first. The leading True ones are verified.
    """
    step = _frame_map(page_size)
    words = rows if order == "little" else rows.view(">u4").astype(np.uint32)
    stored = from_big_endian(rows[:, 4:6])
    before = np.empty_like(stored)
    before[0] = start
    before[1:] = stored[:-1]
    (a, b), (c, d) = step.matrix
    first = before[:, 0] * a + before[:, 1] * b + np.einsum("ij,j->i", words, step.first)
    second = before[:, 0] * c + before[:, 1] * d + np.einsum("ij,j->i", words, step.second)
    holds: Flags = (first == stored[:, 0]) & (second == stored[:, 1])
    return holds


def from_big_endian(words: Words) -> Words:
    """Header fields, read as little-endian words, as the numbers they are."""
    return words.view(">u4").astype(np.uint32)


# --- header -----------------------------------------------------------------------------------


def parse_wal_header(head: bytes | memoryview) -> WalPosition:
    """The position right after the header, where the first frame begins. Raises Damage."""
    if len(head) < WAL_HEADER_BYTES:
        raise Damage("the WAL header is cut off", offset=0)
    raw = bytes(head[:WAL_HEADER_BYTES])
    magic, version, page_size, _, salt1, salt2, checksum1, checksum2 = _HEADER.unpack(raw)
    if magic not in _MAGIC:
        raise Damage("not a SQLite WAL: the magic number is unknown", offset=0)
    order = _MAGIC[magic]
    if checksum(raw[:24], order) != (checksum1, checksum2):
        raise Damage("the WAL header fails its checksum", offset=0)
    if version != WAL_VERSION:
        raise Damage(f"the WAL has the unknown version {version}", offset=4)
    if page_size not in PAGE_SIZES:
        raise Damage(f"the WAL has the impossible page size {page_size}", offset=8)
    return WalPosition(
        offset=WAL_HEADER_BYTES, salt1=salt1, salt2=salt2, checksum1=checksum1,
        checksum2=checksum2, page_size=page_size, order=order,
    )  # fmt: skip


# --- runs of frames ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameRun:
    """Verified frames in a row, not yet known to be committed. `data` is theirs alone."""

    offset: int  # in the log, of the first frame
    page_size: int
    page_nos: Words
    commit_sizes: Words  # the database's pages after a commit, 0 in frames that commit nothing
    data: memoryview  # the frames as they are on disk

    def __len__(self) -> int:
        return len(self.page_nos)

    @property
    def committed(self) -> int:
        """How many of its frames come up to and with its last commit."""
        return committed_prefix(self.commit_sizes)

    def frames(self, start: int, stop: int) -> memoryview:
        size = frame_bytes(self.page_size)
        return self.data[start * size : stop * size]

    def page(self, index: int) -> memoryview:
        return self.frames(index, index + 1)[FRAME_HEADER_BYTES:]


def committed_prefix(commit_sizes: Words) -> int:
    """The number of frames up to and with the last commit frame."""
    commits = np.flatnonzero(commit_sizes)
    return int(commits[-1]) + 1 if len(commits) else 0
