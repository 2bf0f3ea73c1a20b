"""Layout and checksums of SQLite's WAL, against logs that SQLite wrote."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.formats.damage import Damage
from app.core.formats.sqlite_wal import (
    PAGE_SIZES,
    checksum,
    committed_prefix,
    frame_bytes,
    frames_before,
    is_frame_boundary,
    linked,
    lock_byte_page,
    parse_wal_header,
)
from tests.helpers.sqlite_logs import real_log, reencoded, slow_checksum, some_commits


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> bytes:
    return real_log(tmp_path_factory.mktemp("log") / "db", some_commits, page_size=512)


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("page_size", sorted(PAGE_SIZES))
def test_a_header_that_sqlite_wrote(tmp_path, page_size, order):
    log = real_log(tmp_path / "db", lambda c: c.execute("CREATE TABLE t (x)"), page_size=page_size)
    log = reencoded(log, order) if order == "big" else log
    position = parse_wal_header(log)
    assert (position.offset, position.page_size, position.order) == (32, page_size, order)
    assert position.salts == struct.unpack_from(">2I", log, 16)
    assert (position.checksum1, position.checksum2) == struct.unpack_from(">2I", log, 24)
    assert position.frames == 0


def test_a_header_cut_off_is_damage(log):
    for length in range(32):
        with pytest.raises(Damage, match="cut off"):
            parse_wal_header(log[:length])


def test_every_flipped_bit_of_a_header_is_damage(log):
    for bit in range(32 * 8):
        head = bytearray(log[:32])
        head[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Damage, match=r"checksum|magic"):
            parse_wal_header(head)


@pytest.mark.parametrize(
    ("version", "page_size", "says"),
    [(3_007_001, 4096, "version"), (3_007_000, 1000, "page size"), (3_007_000, 1, "page size"),
     (3_007_000, 256, "page size"), (3_007_000, 131_072, "page size"), (3_007_000, 0, "page size")],
)  # fmt: skip
def test_a_well_summed_header_with_impossible_fields_is_damage(version, page_size, says):
    head = struct.pack(">6I", 0x377F0682, version, page_size, 0, 1, 2)
    with pytest.raises(Damage, match=says):
        parse_wal_header(head + struct.pack(">2I", *slow_checksum(head, "little", (0, 0))))


@given(
    st.binary(max_size=200),
    st.sampled_from(["little", "big"]),
    st.tuples(*[st.integers(0, 2**32 - 1)] * 2),
)
def test_the_word_by_word_checksum(data, order, start):
    data = data[: len(data) // 8 * 8]
    assert checksum(data, order, start) == slow_checksum(data, order, start)


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("page_size", sorted(PAGE_SIZES))
def test_frames_link_as_the_loop_says(page_size, order):
    """Random frames from any start; the third was changed after it was summed."""
    random = np.random.default_rng(page_size)
    sums = start = tuple(int(word) for word in random.integers(0, 2**32, 2))
    frames = []
    for _ in range(5):
        head, page = random.bytes(8), random.bytes(page_size)
        sums = slow_checksum(head + page, order, sums)
        frames.append(bytearray(head + random.bytes(8) + struct.pack(">2I", *sums) + page))
    rows = np.frombuffer(b"".join(frames), dtype="<u4").reshape(5, -1)
    assert linked(rows, page_size=page_size, order=order, start=start).all()
    other = (start[0] ^ 1, start[1])
    assert (
        linked(rows, page_size=page_size, order=order, start=other).tolist() == [False] + [True] * 4
    )
    frames[2][24 + page_size - 1] ^= 0x80
    rows = np.frombuffer(b"".join(frames), dtype="<u4").reshape(5, -1)
    found = linked(rows, page_size=page_size, order=order, start=start).tolist()
    assert found == [True, True, False, True, True]
    frames[2][24 + page_size - 1] ^= 0x80
    frames[2][16] ^= 1  # its stored checksum: neither it nor what follows it links
    rows = np.frombuffer(b"".join(frames), dtype="<u4").reshape(5, -1)
    found = linked(rows, page_size=page_size, order=order, start=start).tolist()
    assert found == [True, True, False, False, True]


def test_frame_boundaries():
    assert frame_bytes(4096) == 4120
    assert frames_before(32 + 3 * 4120, page_size=4096) == 3
    boundaries = [n for n in range(4160) if is_frame_boundary(n, page_size=4096)]
    assert boundaries == [32, 4152]
    assert not is_frame_boundary(32 - 4120, page_size=4096)


def test_the_lock_byte_page_holds_the_byte_at_one_gib():
    for page_size in PAGE_SIZES:
        first_byte = (lock_byte_page(page_size) - 1) * page_size
        assert first_byte <= 0x40000000 < first_byte + page_size


def test_the_committed_prefix_ends_with_the_last_commit_frame():
    assert committed_prefix(np.array([], dtype=np.uint32)) == 0
    assert committed_prefix(np.array([0, 0], dtype=np.uint32)) == 0
    assert committed_prefix(np.array([0, 3, 0, 4, 0, 0], dtype=np.uint32)) == 4
