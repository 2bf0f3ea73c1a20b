"""How fast the frames of a SQLite WAL are verified, as a body in pieces, by one core."""

import sqlite3
import tempfile
import time
from pathlib import Path

from app.core.formats.sqlite_wal import WAL_HEADER_BYTES, parse_wal_header
from app.core.formats.sqlite_wal_scanner import ScanEnd, WalScanner
from benchmarks.report import Result, at_least, show

WAL_BYTES = 256 << 20
PIECE_BYTES = 256 << 10  # what a server hands over at a time
MB = 1e6


def verification(*, wal_bytes: int = WAL_BYTES, rounds: int = 5) -> Result:
    with tempfile.TemporaryDirectory(prefix="bop-bench-") as directory:
        log = memoryview(_real_wal(Path(directory) / "db", wal_bytes))
    seconds = min(_scan_seconds(log) for _ in range(rounds))
    rate = len(log) / MB / seconds
    return at_least(
        "verify a 256 MiB WAL of 4 KiB pages ÷ 1 GB/s",
        measured=rate, ceiling=1000, unit="MB/s", target=1.0,
    )  # fmt: skip


def _real_wal(path: Path, wal_bytes: int) -> bytes:
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA page_size = 4096")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute("CREATE TABLE t (x)")
        wal = path.with_name(path.name + "-wal")
        while wal.stat().st_size < wal_bytes:
            connection.execute("INSERT INTO t VALUES (randomblob(4000000))")
        return wal.read_bytes()
    finally:
        connection.close()


def _scan_seconds(log: memoryview) -> float:
    started = time.perf_counter()
    scanner = WalScanner(parse_wal_header(log), skip_bytes=WAL_HEADER_BYTES)
    for start in range(0, len(log), PIECE_BYTES):
        scanner.feed(log[start : start + PIECE_BYTES])
    _, result = scanner.finish()
    seconds = time.perf_counter() - started
    if result.end is not ScanEnd.WHOLE or result.position.offset != len(log):
        raise RuntimeError(f"a sound log was not accepted whole: {result}")
    return seconds


if __name__ == "__main__":
    show([verification()], as_json=False)
