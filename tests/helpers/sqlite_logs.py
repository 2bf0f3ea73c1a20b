"""Real SQLite logs, and a slow reading of them that follows the format's text word by word."""

import sqlite3
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from app.core.formats.sqlite_wal import lock_byte_page
from app.core.formats.sqlite_wal_scanner import ScanEnd

Steps = Callable[[sqlite3.Connection], None]


@contextmanager
def wal_database(path: Path, *, page_size: int = 4096, auto_vacuum: int = 0) -> Iterator:
    """A connection in WAL mode that checkpoints only when told."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute(f"PRAGMA page_size = {page_size}")
        connection.execute(f"PRAGMA auto_vacuum = {auto_vacuum}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA cache_size = 10")  # spills uncommitted pages into the log
        yield connection
    finally:
        connection.close()


def log_of(path: Path) -> bytes:
    return path.with_name(path.name + "-wal").read_bytes()


def real_log(path: Path, steps: Steps, *, page_size: int = 4096, auto_vacuum: int = 0) -> bytes:
    with wal_database(path, page_size=page_size, auto_vacuum=auto_vacuum) as connection:
        steps(connection)
        return log_of(path)


def some_commits(connection: sqlite3.Connection) -> None:
    """Eight frames or more in four transactions, the second and the last of several frames."""
    page_size = connection.execute("PRAGMA page_size").fetchone()[0]
    connection.execute("CREATE TABLE t (x)")
    connection.execute("INSERT INTO t VALUES (randomblob(?))", (3 * page_size,))
    connection.execute("INSERT INTO t VALUES (1)")
    connection.execute("INSERT INTO t VALUES (randomblob(?))", (2 * page_size,))


def slow_checksum(data: bytes, order: str, start: tuple[int, int]) -> tuple[int, int]:
    s1, s2 = start
    words = struct.unpack(f"{'<' if order == 'little' else '>'}{len(data) // 4}I", data)
    for i in range(0, len(words), 2):
        s1 = (s1 + words[i] + s2) % 2**32
        s2 = (s2 + words[i + 1] + s1) % 2**32
    return s1, s2


def page_size_of(log: bytes) -> int:
    return struct.unpack_from(">I", log, 8)[0]


def frame_offsets(log: bytes) -> range:
    size = 24 + page_size_of(log)
    return range(32, len(log) - size + 1, size)


def commit_sizes(log: bytes) -> list[int]:
    return [struct.unpack_from(">I", log, at + 4)[0] for at in frame_offsets(log)]


def reencoded(log: bytes, order: str) -> bytes:
    """The same log as a machine of the other byte order writes it."""
    magic = 0x377F0682 if order == "little" else 0x377F0683
    head = struct.pack(">I", magic) + log[4:24]
    sums = slow_checksum(head, order, (0, 0))
    written = bytearray(head + struct.pack(">2I", *sums))
    size = 24 + page_size_of(log)
    for at in frame_offsets(log):
        frame = log[at : at + size]
        sums = slow_checksum(frame[:8] + frame[24:], order, sums)
        written += frame[:16] + struct.pack(">2I", *sums) + frame[24:]
    return bytes(written)


def slow_scan(log: bytes, *, start: int = 32, must_continue: bool = False) -> tuple:
    """(end, verified frames, frames up to the last commit): the rules, one frame at a time."""
    order = "little" if log[3] == 0x82 else "big"
    size = 24 + page_size_of(log)
    sums = struct.unpack_from(">2I", log, 24 if start == 32 else start - size + 16)
    verified = committed = 0
    broken = False
    for at in range(start, len(log) - size + 1, size):
        frame = log[at : at + size]
        if frame[8:16] != log[16:24]:
            if must_continue and at == start:
                return ScanEnd.GAP, 0, 0
            return (ScanEnd.TORN if broken else ScanEnd.LOG_ENDED), verified, committed
        page_no, commit_size = struct.unpack_from(">2I", frame)
        stored = struct.unpack_from(">2I", frame, 16)
        links = page_no != 0 and slow_checksum(frame[:8] + frame[24:], order, sums) == stored
        if not links:
            if must_continue and at == start:
                return ScanEnd.GAP, 0, 0
            broken = True
        elif broken and commit_size:
            return ScanEnd.INVALID, verified, committed
        elif not broken:
            verified += 1
            committed = verified if commit_size else committed
        sums = stored
    cut_off = (len(log) - start) % size != 0
    return (ScanEnd.TORN if broken or cut_off else ScanEnd.WHOLE), verified, committed


def newest_pages(
    page_nos: npt.NDArray[np.uint32], *, page_count: int, page_size: int
) -> npt.NDArray[np.intp]:
    """Index of the newest frame of each page, by page number, as of a commit that ends the frames.

    Left out are pages above `page_count`, which VACUUM and auto_vacuum leave behind, and the
    lock-byte page, which never holds data.
    """
    pages, from_end = np.unique(page_nos[::-1], return_index=True)
    kept = (pages <= page_count) & (pages != lock_byte_page(page_size)) & (pages != 0)
    return len(page_nos) - 1 - from_end[kept]
