"""What a FRAMES entry of the WAL holds: SQLite frames as they came, and at the end of a request
where it left the database. All of the footer is little-endian.

    frame (24-byte header, page) · … · [footer (64 bytes), in the entry that ENDS a request]

A frame takes at least 536 bytes, so that the payload's length tells whether there is a footer.
Frames that an image was turned into have salts and checksums of zero.

The footer has the database's page count, the position in the application's log (none after an
image that stated none), and where the log before that one was left: bytes of either that are sent
again are recognised, after a restart as well.
"""

import struct
from dataclasses import dataclass

import numpy as np

from app.core.formats.damage import Damage
from app.core.formats.sqlite_wal import (
    FRAME_HEADER_BYTES,
    ChecksumOrder,
    Indices,
    WalPosition,
    Words,
    frame_bytes,
    from_big_endian,
    lock_byte_page,
)

FOOTER_MAGIC = b"BOPFEND\x01"
_FOOTER = struct.Struct("<QIIIIBB2xIQII8s8x")
FOOTER_BYTES = _FOOTER.size
_FRAME_HEAD = struct.Struct(">II16x")
_ORDERS: tuple[ChecksumOrder | None, ...] = (None, "little", "big")
_HAS_POSITION, _HAS_REPLACED = 1, 2

assert FOOTER_BYTES == 64


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameFooter:
    """The state that a request left the database in."""

    page_count: int
    position: WalPosition | None = None
    replaced: WalPosition | None = None
    """Where the log before was left; its checksums and order are no longer known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFrames:
    """An entry's frames. `data` is a view of theirs, `footer` None but at a request's end."""

    page_size: int
    page_nos: Words
    commit_sizes: Words
    data: memoryview
    footer: FrameFooter | None

    def __len__(self) -> int:
        return len(self.page_nos)

    def page(self, index: int) -> memoryview:
        start = index * frame_bytes(self.page_size) + FRAME_HEADER_BYTES
        return self.data[start : start + self.page_size]


def pack_frame_header(page_no: int, *, commit_size: int = 0) -> bytes:
    """Of a frame that comes from no log."""
    return _FRAME_HEAD.pack(page_no, commit_size)


def pack_footer(footer: FrameFooter) -> bytes:
    at, before = footer.position, footer.replaced
    flags = (_HAS_POSITION if at else 0) | (_HAS_REPLACED if before else 0)
    position = (at.offset, at.salt1, at.salt2, at.checksum1, at.checksum2) if at else (0,) * 5
    replaced = (before.offset, before.salt1, before.salt2) if before else (0,) * 3
    order = _ORDERS.index(at.order) if at else 0
    return _FOOTER.pack(*position, order, flags, footer.page_count, *replaced, FOOTER_MAGIC)


def parse_footer(data: bytes | memoryview, *, page_size: int) -> FrameFooter:
    """The footer in the last bytes of `data`. Raises Damage."""
    if len(data) < FOOTER_BYTES:
        raise Damage("the footer of a run of frames is cut off", offset=0)
    fields = _FOOTER.unpack_from(data, len(data) - FOOTER_BYTES)
    offset, salt1, salt2, checksum1, checksum2, order, flags, page_count = fields[:8]
    before_offset, before_salt1, before_salt2, magic = fields[8:]
    if magic != FOOTER_MAGIC or flags > 3 or order >= len(_ORDERS):
        raise Damage("no footer of a run of frames of a known version")
    position = replaced = None
    if flags & _HAS_POSITION:
        position = WalPosition(
            offset=offset, salt1=salt1, salt2=salt2, checksum1=checksum1, checksum2=checksum2,
            page_size=page_size, order=_ORDERS[order],
        )  # fmt: skip
    if flags & _HAS_REPLACED:
        replaced = WalPosition(
            offset=before_offset, salt1=before_salt1, salt2=before_salt2, checksum1=0,
            checksum2=0, page_size=page_size,
        )  # fmt: skip
    return FrameFooter(page_count=page_count, position=position, replaced=replaced)


def frame_count(payload_bytes: int, *, page_size: int) -> int:
    """How many frames a payload of that length has. Raises Damage where none does."""
    count, rest = divmod(payload_bytes, frame_bytes(page_size))
    if count == 0 or rest not in (0, FOOTER_BYTES):
        raise Damage(f"{payload_bytes} bytes are no run of {page_size}-byte pages' frames")
    return count


def frames_of(payload: bytes | memoryview, *, page_size: int) -> StoredFrames:
    """Reads an entry's payload. Raises Damage."""
    view = memoryview(payload)
    count = frame_count(len(view), page_size=page_size)
    end = count * frame_bytes(page_size)
    heads = np.frombuffer(view[:end], dtype=np.uint8).reshape(count, -1)[:, :8].copy().view("<u4")
    footer = parse_footer(view[end:], page_size=page_size) if len(view) > end else None
    return StoredFrames(
        page_size=page_size, page_nos=from_big_endian(heads[:, 0]),
        commit_sizes=from_big_endian(heads[:, 1]), data=view[:end], footer=footer,
    )  # fmt: skip


def kept_frames(page_nos: Words, commit_sizes: Words, *, page_size: int) -> Indices:
    """Indices of the frames that are stored, of whole transactions: those whose page lies within
    the database that their own transaction's commit leaves, without the lock-byte page. A commit
    frame stays whatever its page, since it says how large the database is.
    """
    commits = np.flatnonzero(commit_sizes)
    assert len(commits), "not one whole transaction"
    assert commits[-1] == len(page_nos) - 1, "a transaction without its commit"
    lengths = np.diff(commits, prepend=-1)
    limits = np.repeat(commit_sizes[commits], lengths)
    kept = (page_nos <= limits) & (page_nos != lock_byte_page(page_size))
    kept[commits] = True
    return np.flatnonzero(kept)
