"""The headers against what SQLite itself writes."""

import sqlite3
import struct
from contextlib import closing
from pathlib import Path

import pytest

from app.replication.wal_index import (
    FRAME_HEADER_BYTES,
    INDEX_BYTES,
    log_header,
    parse_frame,
    parse_index,
    parse_log_salts,
)


@pytest.fixture(params=[512, 4096, 65536])
def live(request, tmp_path):
    path = tmp_path / "a.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA page_size={request.param}")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE t (a)")
        connection.execute("INSERT INTO t VALUES (zeroblob(200000))")
        index = Path(f"{path}-shm").read_bytes()[:INDEX_BYTES]
        log = Path(f"{path}-wal").read_bytes()
        yield request.param, index, log


def test_the_index_agrees_with_the_log(live):
    page_size, index, log = live
    found = parse_index(index)
    assert found is not None
    assert (found.page_size, found.end, found.backfilled) == (page_size, len(log), 0)
    assert found.salts == parse_log_salts(log)
    last = parse_frame(log[found.end - page_size - FRAME_HEADER_BYTES :])
    assert last is not None
    assert (last.salts, last.checksums) == (found.salts, found.checksums)
    assert last.page_count == found.page_count


def test_an_index_that_is_being_changed_is_none(live):
    _, index, _ = live
    for at in (0, 16, 24, 47, 48, 95):
        torn = bytearray(index)
        torn[at] ^= 0xFF
        assert parse_index(bytes(torn)) is None, at
    both = bytearray(index)
    both[16] ^= 1
    both[48 + 16] ^= 1
    assert parse_index(bytes(both)) is None, "its checksum is wrong"
    assert parse_index(index[:100]) is None


def test_a_header_of_ours_checks_out():
    header = log_header(page_size=4096, salts=(1, 2))
    assert parse_log_salts(header) == (1, 2)
    assert struct.unpack_from(">I", header, 8) == (4096,)
    sum1 = sum2 = 0
    words = struct.unpack(">8I", header)
    for even, odd in ((0, 1), (2, 3), (4, 5)):
        sum1 = (sum1 + words[even] + sum2) % 2**32
        sum2 = (sum2 + words[odd] + sum1) % 2**32
    assert words[6:] == (sum1, sum2)
