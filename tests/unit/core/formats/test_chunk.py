import hashlib
import itertools
import os
import random
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.base import failpoints
from app.core.formats.chunk import (
    LOG_BLOCK_BYTES,
    LogIdentity,
    hash_file_blocking,
    iter_log_blocking,
    log_container_bytes_max,
    write_log_blocking,
)
from app.core.formats.codecs import CodecCode
from app.core.formats.container import (
    BLOCK_ROW,
    CONTAINER_HEADER_BYTES,
    ContainerDirectory,
    ContainerHeader,
    ContainerKind,
    pack_container_directory,
    parse_container_directory,
    parse_container_header,
    stored_range,
    unpack_blocks,
)
from app.core.formats.crc64 import crc64
from app.core.formats.damage import Damage
from app.core.formats.entry_scan import scan_record_entries
from app.core.formats.segment import SEGMENT_HEADER_BYTES, iter_entries
from tests.helpers.logs import build_segment

GOLDEN = Path(__file__).parents[3] / "golden"
WHO = LogIdentity(db_id=7, chunk_id=3, generation=12)
CODECS = ["none", "zstd", "lz4"]


def random_records(seed, total_bytes, *, record_bytes=400):
    source = random.Random(seed)
    words = [source.randbytes(source.randint(2, 12)).hex().encode() for _ in range(300)]
    records, size = [], 0
    while size < total_bytes:
        record = b" ".join(source.choices(words, k=source.randint(0, record_bytes // 14)))
        records.append(record)
        size += len(record) + 4
    return records


def in_entries(records, count):
    return [records[at : at + count] for at in range(0, len(records), count)]


@pytest.fixture
def segment(tmp_path):
    """About 1.2 MiB in entries of about 10 KiB."""
    records = random_records(1, 1_200_000)
    return build_segment(tmp_path / "segment", in_entries(records, 60), first_lsn=1000)


def read_container(data):
    """What a reader does who knows only where the directory is."""
    directory = parse_container_directory(data[data_offset(data) :])
    offset, length = stored_range(directory, 0, len(directory.blocks))
    return b"".join(
        unpack_blocks(directory, 0, len(directory.blocks), data[offset : offset + length])
    )


def data_offset(data):
    return int.from_bytes(data[-24:-16], "little")


@pytest.mark.parametrize("codec", CODECS)
def test_a_container_holds_the_segment_byte_for_byte(tmp_path, segment, codec):
    target = tmp_path / "blob"
    summary = write_log_blocking(segment.path, target, codec=codec, identity=WHO)
    data, raw = target.read_bytes(), segment.path.read_bytes()
    assert b"".join(iter_log_blocking(target)) == raw
    assert read_container(data) == raw
    assert summary.sha256 == hashlib.sha256(data).digest()
    assert (summary.crc64, summary.bytes, summary.raw_bytes) == (crc64(data), len(data), len(raw))
    assert summary.directory_offset + summary.directory_bytes == len(data)
    assert data_offset(data) == summary.directory_offset
    if codec != "none":
        assert len(data) < len(raw) * 0.8


def test_the_directory_says_whose_it_is_and_what_is_in_it(tmp_path, segment):
    write_log_blocking(segment.path, tmp_path / "blob", codec="zstd", identity=WHO)
    data = (tmp_path / "blob").read_bytes()
    directory = parse_container_directory(data[data_offset(data) :])
    assert directory.header == parse_container_header(data)
    assert directory.header == ContainerHeader(
        kind=ContainerKind.LOG, codec=CodecCode.ZSTD, identity=WHO, part_id=0,
        raw_bytes=segment.path.stat().st_size,
    )  # fmt: skip
    assert directory.first_key == segment.first_lsn
    assert directory.last_key == segment.durable_last_lsn
    assert directory.container_bytes == len(data)
    assert directory.places == b""


def test_blocks_hold_whole_entries_begin_with_their_key_and_have_a_fair_size(tmp_path, segment):
    write_log_blocking(segment.path, tmp_path / "blob", codec="zstd", identity=WHO)
    data, raw = (tmp_path / "blob").read_bytes(), segment.path.read_bytes()
    blocks = parse_container_directory(data[data_offset(data) :]).blocks
    assert len(blocks) == 7  # 1.2 MiB in blocks of at most 256 KiB, and the segment's directory
    assert blocks["raw_bytes"][:-1].max() <= LOG_BLOCK_BYTES
    assert blocks["raw_bytes"][:-2].min() > LOG_BLOCK_BYTES // 2
    for row in blocks[:-1]:
        start = max(int(row["raw_offset"]), SEGMENT_HEADER_BYTES)
        entries = list(iter_entries(raw[start : int(row["raw_offset"]) + int(row["raw_bytes"])]))
        assert entries[0][1].first_lsn == row["first_key"]
    assert blocks[-1]["first_key"] == segment.durable_last_lsn + 1
    assert blocks[-1]["raw_offset"] == segment.entries_end


def test_an_entry_larger_than_a_block_is_a_block(tmp_path):
    big = os.urandom(3 * LOG_BLOCK_BYTES)
    segment = build_segment(tmp_path / "s", [[b"a"], [big], [b"b"], [big], [big]])
    for codec in CODECS:
        write_log_blocking(segment.path, tmp_path / "blob", codec=codec, identity=WHO)
        assert b"".join(iter_log_blocking(tmp_path / "blob")) == segment.path.read_bytes()


@pytest.mark.parametrize("codec", CODECS)
def test_equal_segments_make_equal_bytes(tmp_path, segment, codec):
    for name in "ab":
        write_log_blocking(segment.path, tmp_path / name, codec=codec, identity=WHO)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    other = replace(WHO, generation=13)
    write_log_blocking(segment.path, tmp_path / "c", codec=codec, identity=other)
    assert (tmp_path / "c").read_bytes() != (tmp_path / "a").read_bytes()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("record_bytes", [0, 1, 70_000, 140_000, 300_000])
def test_what_does_not_compress_costs_no_more_than_promised(tmp_path, codec, record_bytes):
    entries = [[os.urandom(record_bytes)] for _ in range(12)]
    segment = build_segment(tmp_path / "s", entries)
    summary = write_log_blocking(segment.path, tmp_path / "blob", codec=codec, identity=WHO)
    size = segment.path.stat().st_size
    assert summary.bytes <= log_container_bytes_max(size) < size + 1000 + size // 1000
    assert b"".join(iter_log_blocking(tmp_path / "blob")) == segment.path.read_bytes()


def test_an_empty_segment(tmp_path):
    segment = build_segment(tmp_path / "s", [], first_lsn=5)
    write_log_blocking(segment.path, tmp_path / "blob", codec="zstd", identity=WHO)
    assert b"".join(iter_log_blocking(tmp_path / "blob")) == segment.path.read_bytes()


def test_a_link_to_the_segment_is_replaced_and_never_written_through(tmp_path, segment):
    before = segment.path.read_bytes()
    target = tmp_path / "blob"
    target.hardlink_to(segment.path)
    write_log_blocking(segment.path, target, codec="lz4", identity=WHO)
    assert segment.path.read_bytes() == before
    assert b"".join(iter_log_blocking(target)) == before


def test_hash_file(tmp_path):
    for size in (0, 1, (1 << 20) - 1, 1 << 20, (1 << 21) + 5):
        data = os.urandom(size)
        (tmp_path / "f").write_bytes(data)
        digest = hash_file_blocking(tmp_path / "f")
        assert digest.sha256 == hashlib.sha256(data).digest()
        assert (digest.crc64, digest.bytes) == (crc64(data), size)


def test_memory_is_bounded_while_writing_and_hashing(tmp_path):
    records = random_records(2, 64_000)
    segment = build_segment(tmp_path / "s", [records] * 400)
    assert segment.path.stat().st_size > 24 << 20
    tracemalloc.start()
    write_log_blocking(segment.path, tmp_path / "blob", codec="zstd", identity=WHO)
    hash_file_blocking(tmp_path / "blob")
    for _ in iter_log_blocking(tmp_path / "blob"):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 << 20


def test_a_stop_in_the_middle_leaves_nothing_that_passes_for_a_container(
    tmp_path, segment, monkeypatch
):
    class Stop(Exception):
        pass

    calls = itertools.count()

    def stop(name):
        if name == "stage.mid_write" and next(calls) == 3:
            raise Stop

    monkeypatch.setattr(failpoints, "fp", stop)
    with pytest.raises(Stop):
        write_log_blocking(segment.path, tmp_path / "blob", codec="zstd", identity=WHO)
    monkeypatch.undo()
    with pytest.raises(Damage):
        list(iter_log_blocking(tmp_path / "blob"))
    write_log_blocking(segment.path, tmp_path / "blob", codec="zstd", identity=WHO)
    assert b"".join(iter_log_blocking(tmp_path / "blob")) == segment.path.read_bytes()


def small_segment(path):
    return build_segment(path, [[b"one", b""], [b"a line\nand another"], [b"x" * 90]], first_lsn=41)


@pytest.mark.parametrize("codec", CODECS)
def test_every_flipped_byte_is_noticed(tmp_path, codec):
    segment = small_segment(tmp_path / "s")
    target = tmp_path / "blob"
    write_log_blocking(segment.path, target, codec=codec, identity=WHO)
    good, raw = target.read_bytes(), segment.path.read_bytes()
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= (0x01, 0x80, 0xFF)[place % 3]
        target.write_bytes(bad)
        with pytest.raises(Damage):
            list(iter_log_blocking(target))
        try:  # a reader of ranges does not fetch the header
            assert read_container(bytes(bad)) == raw
            assert place < CONTAINER_HEADER_BYTES
        except Damage:
            assert place >= CONTAINER_HEADER_BYTES


def test_a_container_cut_anywhere_is_noticed(tmp_path):
    target = tmp_path / "blob"
    write_log_blocking(small_segment(tmp_path / "s").path, target, codec="zstd", identity=WHO)
    good = target.read_bytes()
    for bad in [good[:end] for end in range(len(good))] + [good + b"x", b"x" + good]:
        target.write_bytes(bad)
        with pytest.raises(Damage):
            list(iter_log_blocking(target))


def test_a_damaged_segment_is_not_sealed_under_fresh_checksums(tmp_path):
    segment = small_segment(tmp_path / "s")
    good = segment.path.read_bytes()
    for place in range(0, len(good), 3):
        bad = bytearray(good)
        bad[place] ^= 0x40
        segment.path.write_bytes(bad)
        with pytest.raises(Damage):
            write_log_blocking(segment.path, tmp_path / "blob", codec="zstd", identity=WHO)


def test_an_open_segment_is_refused(tmp_path):
    segment = build_segment(tmp_path / "s", [[b"x" * 500]], sealed=False)
    with pytest.raises(Damage):
        write_log_blocking(segment.path, tmp_path / "blob", codec="zstd", identity=WHO)


@given(data=st.binary(max_size=400))
def test_hostile_bytes_are_damage(data):
    with pytest.raises(Damage):
        parse_container_directory(data)
    with pytest.raises(Damage):
        parse_container_header(data)


def rows(*values):
    table = np.zeros(len(values), dtype=BLOCK_ROW)
    for number, value in enumerate(values):
        table[number] = value
    return table


GOOD_ROWS = ((0, 64, 100, 50, 1, 0), (100, 114, 200, 200, 9, 0))


@pytest.mark.parametrize(
    "table",
    [
        (),
        ((0, 64, 300, 251, 1, 0),),  # ends beyond the directory's offset
        ((0, 63, 100, 50, 1, 0), GOOD_ROWS[1]),
        ((1, 64, 100, 50, 1, 0), GOOD_ROWS[1]),
        (GOOD_ROWS[0], (101, 114, 200, 200, 9, 0)),
        (GOOD_ROWS[0], (100, 115, 200, 200, 9, 0)),
        (GOOD_ROWS[0], (100, 114, 199, 199, 9, 0)),
        ((0, 64, 100, 50, 10, 0), GOOD_ROWS[1]),  # keys go down
        ((0, 64, 40, 50, 1, 0), (40, 114, 260, 200, 9, 0)),  # stored longer than raw
        ((0, 64, 0, 0, 1, 0), (0, 64, 300, 250, 9, 0)),
    ],
)
def test_a_directory_that_contradicts_itself_is_damage(table):
    def pack(table):
        return pack_container_directory(
            ContainerDirectory(
                header=ContainerHeader(
                    kind=ContainerKind.LOG, codec=CodecCode.ZSTD, identity=WHO, part_id=0,
                    raw_bytes=300,
                ),
                first_key=1, last_key=10, directory_offset=314, blocks=rows(*table), places=b"",
            )
        )  # fmt: skip

    assert len(parse_container_directory(pack(GOOD_ROWS)).blocks) == 2
    with pytest.raises(Damage, match="contradicts itself"):
        parse_container_directory(pack(table))


def test_pages_and_deltas_fit_the_directory():
    header = ContainerHeader(
        kind=ContainerKind.DELTA, codec=CodecCode.LZ4, identity=WHO, part_id=5, raw_bytes=300
    )
    directory = ContainerDirectory(
        header=header, first_key=1, last_key=64, directory_offset=314, blocks=rows(*GOOD_ROWS),
        places=b"where each page lies",
    )  # fmt: skip
    parsed = parse_container_directory(pack_container_directory(directory))
    assert (parsed.header, parsed.places) == (header, directory.places)
    assert parsed.directory_bytes == len(pack_container_directory(directory))


class TestEntryScan:
    def test_it_sees_what_the_format_module_sees(self, segment):
        data = segment.path.read_bytes()[SEGMENT_HEADER_BYTES : segment.entries_end]
        places = scan_record_entries(data, first_lsn=segment.first_lsn)
        expected = [
            (one.first_lsn, one.count, int(one.flags), offset + 80, offset + one.entry_bytes)
            for offset, one in iter_entries(data)
        ]  # fmt: skip
        assert places == expected

    def test_every_flipped_byte_is_noticed(self, tmp_path):
        segment = small_segment(tmp_path / "s")
        good = segment.path.read_bytes()[SEGMENT_HEADER_BYTES : segment.entries_end]
        for place, flip in itertools.product(range(len(good)), (0x01, 0x80, 0xFF)):
            bad = bytearray(good)
            bad[place] ^= flip
            with pytest.raises(Damage):
                scan_record_entries(bad, first_lsn=41)
        ends = [place.end for place in scan_record_entries(good, first_lsn=41)]
        for end in set(range(1, len(good))) - set(ends):
            with pytest.raises(Damage):
                scan_record_entries(good[:end], first_lsn=41)

    def test_a_missing_entry_is_noticed(self, tmp_path):
        segment = small_segment(tmp_path / "s")
        data = segment.path.read_bytes()[SEGMENT_HEADER_BYTES : segment.entries_end]
        first, second, _ = scan_record_entries(data, first_lsn=41)
        with pytest.raises(Damage, match="instead of"):
            scan_record_entries(data[: first.end] + data[second.end :], first_lsn=41)
        with pytest.raises(Damage, match="instead of"):
            scan_record_entries(data, first_lsn=40)


@pytest.mark.parametrize("codec", CODECS)
def test_released_containers_stay_readable(codec):
    """Bytes of version 1, as they were written on the day of its release."""
    path = GOLDEN / f"chunk-log-v1-{codec}.blob"
    raw = (GOLDEN / "segment-v1-of-chunk.bin").read_bytes()
    assert b"".join(iter_log_blocking(path)) == raw
    directory = parse_container_directory(path.read_bytes()[data_offset(path.read_bytes()) :])
    assert directory.header.identity == WHO
    assert directory.blocks["first_key"].tolist() == [41, 45]


def test_the_layout_is_what_it_was(tmp_path):
    """Not of zstd and lz4: another version of a library may compress otherwise."""
    write_log_blocking(
        GOLDEN / "segment-v1-of-chunk.bin", tmp_path / "blob", codec="none", identity=WHO
    )
    assert (tmp_path / "blob").read_bytes() == (GOLDEN / "chunk-log-v1-none.blob").read_bytes()


def test_a_target_that_is_linked_elsewhere_is_replaced_not_written_through(tmp_path, segment):
    """A resumed job may find its target linked into the hot cache, or to a segment itself."""
    target, linked = tmp_path / "target", tmp_path / "linked"
    linked.write_bytes(b"somebody else's bytes")
    os.link(linked, target)
    write_log_blocking(segment.path, target, codec="zstd", identity=WHO)
    assert linked.read_bytes() == b"somebody else's bytes"
    assert target.stat().st_nlink == 1
