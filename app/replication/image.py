"""A database's pages as of one commit, from its file and its log. Everything here blocks.

What keeps file and log as they are meanwhile is `source`'s matter.
"""

import errno
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from app.replication.wal_index import FRAME_HEADER_BYTES, LOG_HEADER_BYTES, Log

PIECE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """The database as of the end of `log`, readable while the lock is held."""

    log: Log
    page_count: int
    frames_of_pages: Mapping[int, int]
    """Pages whose content stands in the log: page number to frame number, from 0."""

    @property
    def content_bytes(self) -> int:
        return self.page_count * self.log.page_size


def find_frames_blocking(log_fd: int, log: Log) -> dict[int, int]:
    """The last frame of each page. Raises OSError."""
    found: dict[int, int] = {}
    per_read = max(1, 4 * PIECE_BYTES // log.frame_bytes)
    numbers = struct.Struct(f">I{log.frame_bytes - 4}x")
    for first in range(0, log.frames, per_read):
        count = min(per_read, log.frames - first)
        data = _read_frames(
            log_fd, count * log.frame_bytes, LOG_HEADER_BYTES + first * log.frame_bytes
        )
        pages = (page_no for (page_no,) in numbers.iter_unpack(data))
        found.update(zip(pages, range(first, first + count), strict=True))
    return found


def read_piece_blocking(database_fd: int, log_fd: int, image: Image, offset: int) -> bytes:
    """At most a piece of it; nothing at its end. Raises OSError."""
    count = min(PIECE_BYTES, image.content_bytes - offset)
    data = read_whole_blocking(database_fd, count, offset)
    # a page behind the end of the file reads as zeros, as it does in SQLite
    data += bytes(count - len(data))
    return _with_frames(log_fd, data, image, offset) if image.frames_of_pages else data


def read_whole_blocking(descriptor: int, count: int, offset: int) -> bytes:
    """Less than `count` only at the end of the file."""
    pieces: list[bytes] = []
    while count > 0:
        piece = os.pread(descriptor, count, offset)
        if not piece:
            break
        pieces.append(piece)
        count -= len(piece)
        offset += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _with_frames(log_fd: int, data: bytes, image: Image, offset: int) -> bytes:
    """Pages that have one stand in the log."""
    page_size = image.log.page_size
    newest = bytearray(data)
    first = offset // page_size + 1
    for page_no in range(first, first + len(data) // page_size):
        frame = image.frames_of_pages.get(page_no)
        if frame is not None:
            at = LOG_HEADER_BYTES + frame * image.log.frame_bytes + FRAME_HEADER_BYTES
            start = (page_no - first) * page_size
            newest[start : start + page_size] = _read_frames(log_fd, page_size, at)
    return bytes(newest)


def _read_frames(log_fd: int, count: int, offset: int) -> bytes:
    data = read_whole_blocking(log_fd, count, offset)
    if len(data) < count:
        raise OSError(errno.EIO, "its -wal was cut: it is shorter than its -shm says")
    return data
