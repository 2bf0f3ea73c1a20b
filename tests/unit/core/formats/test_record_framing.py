"""Framing gives the same records however the body arrives."""

import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.base.errors import MalformedRecords, RecordTooLarge
from app.core.formats.damage import Damage
from app.core.formats.record_framing import (
    FramedEntry,
    LengthPrefixedFramer,
    LineFramer,
    RecordFramer,
    SingleRecordFramer,
    is_line_safe,
    pack_records,
    record_spans,
    slice_records,
    to_lines,
    unpack_records,
)

MAX = 64
Make = Callable[[], RecordFramer]


def lines(target: int = 40) -> LineFramer:
    return LineFramer(record_bytes_max=MAX, entry_target_bytes=target)


def prefixed(target: int = 40) -> LengthPrefixedFramer:
    return LengthPrefixedFramer(record_bytes_max=MAX, entry_target_bytes=target)


def single() -> SingleRecordFramer:
    return SingleRecordFramer(record_bytes_max=MAX)


def frame(framer: RecordFramer, pieces: Iterable[bytes]) -> list[FramedEntry]:
    entries = [entry for piece in pieces for entry in framer.feed(piece)]
    return [*entries, *framer.finish()]


def split(body: bytes, cuts: Iterable[int]) -> list[bytes]:
    places = sorted({0, len(body), *(cut % (len(body) + 1) for cut in cuts)})
    return [body[start:end] for start, end in pairwise(places)] or [body]


def records_of(entries: list[FramedEntry]) -> list[bytes]:
    found = []
    for entry in entries:
        records = unpack_records(entry.payload)
        assert len(records) == entry.count > 0
        assert entry.line_safe == (not any(b"\n" in record for record in records))
        found += records
    return found


records = st.lists(st.binary(max_size=MAX), min_size=1, max_size=30)
line_records = st.lists(
    st.binary(max_size=MAX).map(lambda record: record.replace(b"\n", b"\r")),
    min_size=1,
    max_size=30,
)
cuts = st.lists(st.integers(0, 3000), max_size=20)


@given(records=records, cuts=cuts)
def test_length_prefixed_bodies_in_any_pieces(records: list[bytes], cuts: list[int]) -> None:
    body = pack_records(records)
    entries = frame(prefixed(), split(body, cuts))
    assert records_of(entries) == records
    assert b"".join(entry.payload for entry in entries) == body


@given(records=line_records, cuts=cuts, newline=st.booleans())
def test_ndjson_bodies_in_any_pieces(records: list[bytes], cuts: list[int], newline: bool) -> None:
    body = b"\n".join(records) + (b"\n" if newline or not records[-1] else b"")
    assert records_of(frame(lines(), split(body, cuts))) == records


@given(record=st.binary(max_size=MAX), cuts=cuts)
def test_a_single_record_in_any_pieces(record: bytes, cuts: list[int]) -> None:
    assert records_of(frame(single(), split(record, cuts))) == [record]


def test_entries_are_of_about_the_target_size() -> None:
    body = pack_records([b"x" * 6] * 100)
    for make, data in ((prefixed, body), (lines, b"xxxxxx\n" * 100)):
        entries = frame(make(), split(data, range(0, len(data), 7)))
        assert all(40 <= len(entry.payload) <= 60 for entry in entries[:-1])
        assert sum(entry.count for entry in entries) == 100


def test_ndjson_edges() -> None:
    assert records_of(frame(lines(), [b"\n"])) == [b""]
    assert records_of(frame(lines(), [b"a\r\n\nb"])) == [b"a\r", b"", b"b"]
    assert records_of(frame(lines(), [b"a\n"])) == [b"a"]


@pytest.mark.parametrize("make", [lines, prefixed])
def test_a_body_without_records_is_malformed(make: Make) -> None:
    for pieces in ([], [b""]):
        with pytest.raises(MalformedRecords):
            frame(make(), pieces)


def test_an_empty_octet_stream_is_one_empty_record() -> None:
    assert records_of(frame(single(), [])) == [b""]


@given(records=records, cuts=cuts, lost=st.integers(1, 200))
def test_a_body_that_breaks_off_is_malformed(
    records: list[bytes], cuts: list[int], lost: int
) -> None:
    body = pack_records(records)
    ends = {end for _, end in record_spans(body)} | {0}
    kept = body[: max(len(body) - lost, 1)]
    if len(kept) in ends:
        kept = kept[:-1] if len(kept) - 1 not in ends else kept + b"\1"
    with pytest.raises(MalformedRecords):
        frame(prefixed(), split(kept, cuts))


@pytest.mark.parametrize(
    ("make", "body"),
    [
        (single, b"x" * (MAX + 1)),
        (lines, b"ok\n" + b"x" * (MAX + 1)),
        (lines, b"x" * (MAX + 1) + b"\nok\n"),
        (prefixed, pack_records([b"ok", b"x" * (MAX + 1)])),
        (prefixed, struct.pack("<I", MAX + 1)),  # at once, before the bytes have come
    ],
)
@pytest.mark.parametrize("step", [1, 1000])
def test_a_record_beyond_the_limit_is_refused(make: Make, body: bytes, step: int) -> None:
    with pytest.raises(RecordTooLarge) as refused:
        frame(make(), split(body, range(0, len(body), step)))
    assert refused.value.fields == {"max_record_bytes": MAX}


@pytest.mark.parametrize("make", [single, lines, prefixed])
def test_a_record_at_the_limit_is_taken(make: Make) -> None:
    record = b"x" * MAX
    body = pack_records([record]) if make is prefixed else record
    assert records_of(frame(make(), [body])) == [record]


def test_a_framer_holds_no_more_than_the_unfinished_record() -> None:
    framer = prefixed()
    for _ in range(1000):
        list(framer.feed(pack_records([b"x" * 60])))
        assert len(framer._pending) <= 64 + 40


@given(records=records)
def test_line_safety_is_about_contents_not_lengths(records: list[bytes]) -> None:
    assert is_line_safe(pack_records(records)) == (b"\n" not in b"".join(records))
    assert is_line_safe(pack_records([b"x" * 10]))  # its length is a newline's byte


@given(records=records, data=st.data())
def test_slices_are_the_framed_records(records: list[bytes], data: st.DataObject) -> None:
    skip = data.draw(st.integers(0, len(records)))
    take = data.draw(st.integers(0, len(records) - skip))
    payload = pack_records(records)
    wanted = pack_records(records[skip : skip + take])
    assert slice_records(payload, skip=skip, take=take) == wanted
    assert bytes(slice_records(memoryview(payload), skip=skip, take=take)) == wanted
    with pytest.raises(Damage):
        slice_records(payload, skip=skip, take=len(records) - skip + 1)


@given(records=line_records)
def test_lines_are_the_records_each_with_its_newline(records: list[bytes]) -> None:
    assert to_lines(pack_records(records)) == b"".join(record + b"\n" for record in records)
    assert to_lines(memoryview(pack_records(records))) == to_lines(pack_records(records))


@given(payload=st.binary(max_size=60))
def test_hostile_payloads_raise_damage_and_nothing_else(payload: bytes) -> None:
    for read in (
        unpack_records,
        to_lines,
        is_line_safe,
        lambda payload: slice_records(payload, skip=1, take=2),
        lambda payload: slice_records(payload, skip=0, take=1),
    ):
        with suppress(Damage):
            read(payload)
