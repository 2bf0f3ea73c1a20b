"""The segment's bytes: golden, round trips, and no damage unseen."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.formats.damage import Damage
from app.core.formats.record_framing import pack_records
from app.core.formats.segment import (
    ENTRY_HEADER_BYTES,
    INDEX_STRIDE_BYTES,
    SEGMENT_HEADER_BYTES,
    TRAILER_BYTES,
    EngineCode,
    EntryFlag,
    EntryHeader,
    EntryType,
    IndexBuilder,
    SegmentHeader,
    SegmentSummary,
    check_entry,
    iter_entries,
    pack_directory,
    pack_entry_header,
    pack_segment_header,
    parse_directory,
    parse_entry_header,
    parse_segment_header,
    parse_trailer,
)

GOLDEN = Path(__file__).resolve().parents[3] / "golden"

HEADER = SegmentHeader(
    engine=EngineCode.APPEND_ONLY, db_id=42, segment_id=1001, first_lsn=1001, chunk_bytes=67_108_864
)
FIRST = EntryHeader(
    type=EntryType.RECORDS,
    flags=EntryFlag.BEGINS | EntryFlag.KEYED | EntryFlag.LINE_SAFE,
    first_lsn=1001,
    count=2,
    payload_bytes=16,
    durable_lsn=1000,
    appended_at_us=1_760_000_000_000_000,
    key_hash=bytes(range(16)),
    body_hash=bytes(range(16, 32)),
)
FIRST_PAYLOAD = pack_records([b"alpha", b"be\xff"])
SECOND = replace(
    FIRST, flags=EntryFlag.ENDS | EntryFlag.KEYED, first_lsn=1003, count=1, payload_bytes=6
)
SECOND_PAYLOAD = pack_records([b"\n\0"])
SUMMARY = SegmentSummary(
    db_id=42, segment_id=1001, first_lsn=1001, last_lsn=1003, entries=2, entries_end=246,
    payload_bytes=22, index_points=1, line_safe=False, keyed=True,
)  # fmt: skip
INDEX = np.array([[1001, 64]], dtype="<u8")


def pack_entry(header: EntryHeader, payload: bytes) -> bytes:
    return pack_entry_header(header, (payload,)) + payload


def build_segment() -> bytes:
    return b"".join(
        (
            pack_segment_header(HEADER),
            pack_entry(FIRST, FIRST_PAYLOAD),
            pack_entry(SECOND, SECOND_PAYLOAD),
            pack_directory(SUMMARY, INDEX),
        )
    )


def test_released_bytes_are_written_the_same_for_ever() -> None:
    assert build_segment() == (GOLDEN / "segment_v1.bin").read_bytes()
    assert pack_entry(FIRST, FIRST_PAYLOAD) == (GOLDEN / "entry_v1.bin").read_bytes()


def test_released_bytes_are_read_for_ever() -> None:
    data = (GOLDEN / "segment_v1.bin").read_bytes()
    assert parse_segment_header(data) == HEADER
    summary, index = parse_directory(data)
    assert summary == SUMMARY
    assert index.tolist() == INDEX.tolist()
    entries = list(iter_entries(data[SEGMENT_HEADER_BYTES : summary.entries_end]))
    assert entries == [(0, FIRST), (96, SECOND)]
    assert summary.segment_bytes == len(data)
    assert check_entry((GOLDEN / "entry_v1.bin").read_bytes(), offset=0) == FIRST


def flips(data: bytes) -> list[bytes]:
    """One bit of each byte, and each byte all over."""
    return [
        data[:position] + bytes([changed]) + data[position + 1 :]
        for position, byte in enumerate(data)
        for changed in (byte ^ (1 << (position % 8)), byte ^ 0xFF)
    ]


def test_any_change_of_a_header_entry_or_directory_is_damage() -> None:
    header, entry = pack_segment_header(HEADER), pack_entry(FIRST, FIRST_PAYLOAD)
    directory = pack_directory(SUMMARY, INDEX)
    for data, parse in (
        (header, parse_segment_header),
        (entry, lambda data: check_entry(data, offset=0)),
        (directory, parse_directory),
    ):
        for changed in flips(data):
            with pytest.raises(Damage):
                parse(changed)


def test_anything_cut_off_is_damage() -> None:
    header, entry = pack_segment_header(HEADER), pack_entry(FIRST, FIRST_PAYLOAD)
    directory = pack_directory(SUMMARY, INDEX)
    for size in range(len(header)):
        with pytest.raises(Damage):
            parse_segment_header(header[:size])
    for size in range(len(entry)):
        with pytest.raises(Damage):
            check_entry(entry[:size], offset=0)
    for size in range(len(directory)):
        with pytest.raises(Damage):
            parse_directory(directory[len(directory) - size :])


@given(data=st.binary(max_size=300))
def test_hostile_bytes_raise_damage_and_nothing_else(data: bytes) -> None:
    magics = (b"BOPWSEG\x01\x01\x00", b"\xb0PE\x01\x01\x0f\x01\x00", b"BOPWEND\x01\x01\x00")
    for body in (data, *(magic + data for magic in magics)):
        for parse in (
            parse_segment_header,
            parse_directory,
            parse_trailer,
            lambda body: check_entry(body, offset=0),
            lambda body: parse_entry_header(body, offset=0),
            lambda body: list(iter_entries(body)),
        ):
            with suppress(Damage):
                parse(body)


def test_an_unknown_engine_is_damage() -> None:
    data = pack_segment_header(replace(HEADER, engine=9))  # type: ignore[arg-type]
    with pytest.raises(Damage):
        parse_segment_header(data)


@given(
    first_lsn=st.integers(0, 2**64 - 1),
    count=st.integers(1, 2**32 - 1),
    flags=st.integers(0, 15),
    payload=st.binary(max_size=50),
    hashes=st.tuples(st.binary(min_size=16, max_size=16), st.binary(min_size=16, max_size=16)),
    pieces=st.integers(1, 5),
)
def test_entries_survive_the_round_trip(
    first_lsn: int, count: int, flags: int, payload: bytes, hashes: tuple[bytes, bytes], pieces: int
) -> None:
    header = EntryHeader(
        type=EntryType.FRAMES, flags=EntryFlag(flags), first_lsn=first_lsn, count=count,
        payload_bytes=len(payload), durable_lsn=first_lsn, appended_at_us=1,
        key_hash=hashes[0], body_hash=hashes[1],
    )  # fmt: skip
    parts = [payload[at::pieces] for at in range(pieces)]
    joined = b"".join(parts)
    packed = pack_entry_header(header, parts)
    assert len(packed) == ENTRY_HEADER_BYTES
    assert check_entry(b"??" + packed + joined, offset=2) == header
    assert check_entry(memoryview(packed + joined), offset=0) == header


sizes = st.lists(st.integers(81, 200_000), min_size=1, max_size=60)


def build_index(sizes: list[int]) -> tuple[IndexBuilder, list[tuple[int, int, int]], int]:
    """The builder, (first LSN, offset, count) of each entry, and where entries end."""
    builder, entries, offset, lsn = IndexBuilder(), [], SEGMENT_HEADER_BYTES, 1
    for size in sizes:
        builder.add(first_lsn=lsn, offset=offset)
        entries.append((lsn, offset, 1 + size % 3))
        lsn += 1 + size % 3
        offset += size
    return builder, entries, offset


@given(sizes=sizes)
def test_index_points_are_a_stride_apart(sizes: list[int]) -> None:
    builder, _, _ = build_index(sizes)
    index = builder.array()
    assert index.dtype == np.dtype("<u8")
    assert index.shape == (len(builder), 2)
    assert index[0].tolist() == [1, SEGMENT_HEADER_BYTES]
    assert (np.diff(index[:, 1].astype(np.int64)) >= INDEX_STRIDE_BYTES).all()


@given(sizes=sizes, keep=st.integers(0, 60))
def test_an_index_cut_back_is_as_if_it_had_never_gone_on(sizes: list[int], keep: int) -> None:
    keep = min(keep, len(sizes))
    builder, entries, _ = build_index(sizes)
    before, _, end = build_index(sizes[:keep])
    assert builder.array(end=end).tolist() == before.array().tolist()
    builder.truncate(offset=end)
    assert builder.array().tolist() == before.array().tolist()
    for lsn, offset, _ in entries[keep:]:
        builder.add(first_lsn=lsn, offset=offset)
    assert builder.array().tolist() == build_index(sizes)[0].array().tolist()


def test_without_entries_there_are_no_points() -> None:
    empty = IndexBuilder().array()
    assert empty.shape == (0, 2)


def test_the_trailer_tells_how_much_to_read() -> None:
    summary = parse_trailer(build_segment()[-TRAILER_BYTES:])
    assert summary.directory_bytes == 16 + TRAILER_BYTES
    with pytest.raises(Damage):
        parse_directory(build_segment()[-TRAILER_BYTES:])
