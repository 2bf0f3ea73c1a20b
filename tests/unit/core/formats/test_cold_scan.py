"""Frames of a cold scan: bytes that stay as they are, and a decoder that notices."""

import random
from pathlib import Path

import pytest

from app.core.formats.cold_scan import (
    FRAME_HEADER_BYTES,
    Frame,
    FrameDecoder,
    FrameType,
    ScanEnd,
    ScanStart,
    note_frame,
)
from app.core.formats.damage import Damage
from app.core.formats.record_framing import pack_records

GOLDEN = Path(__file__).parents[3] / "golden"
PAGE = 512


def pages(first, count, *, chunk_id=0, page_size=PAGE):
    payload = random.Random(first).randbytes(count * page_size)
    return Frame(type=FrameType.PAGES, chunk_id=chunk_id, first=first, count=count, payload=payload)


def records(first, *bodies, chunk_id=0):
    return Frame(
        type=FrameType.RECORDS, chunk_id=chunk_id, first=first, count=len(bodies),
        payload=pack_records(list(bodies)),
    )  # fmt: skip


def stream(*data, engine="libsql", **end) -> bytes:
    start = ScanStart(
        tenant="acme", database="db", engine=engine, generation=7,
        page_size=PAGE if engine == "libsql" else None, chunks=len({one.chunk_id for one in data}),
    )  # fmt: skip
    sent = {
        "frames": len(data),
        "bytes": sum(len(one.payload) for one in data),
        "chunks": len({one.chunk_id for one in data}),
        **end,
    }
    frames = [
        note_frame(FrameType.START, start), *data, note_frame(FrameType.END, ScanEnd(**sent))
    ]  # fmt: skip
    return b"".join(frame.header() + bytes(frame.payload) for frame in frames)


PAGED = stream(pages(1, 3), pages(4, 1), pages(5, 4, chunk_id=1))
LOGGED = stream(
    records(1, b"one", b"", b"three"), records(4, b"x"), records(9, b"y", chunk_id=3),
    engine="append_only",
)  # fmt: skip


def decoded(data: bytes, *, step: int | None = None) -> list[Frame]:
    decoder, frames = FrameDecoder(), []
    for at in range(0, len(data), step or len(data) or 1):
        frames += decoder.feed(data[at : at + (step or len(data))])
    decoder.finish()
    return frames


@pytest.mark.parametrize(
    ("name", "data"), [("cold-scan-v1-libsql.bin", PAGED), ("cold-scan-v1-records.bin", LOGGED)]
)
def test_the_bytes_are_those_ever_written(name, data):
    assert (GOLDEN / name).read_bytes() == data


@pytest.mark.parametrize("step", [1, 7, 36, 1000, None])
def test_frames_come_out_however_the_stream_is_cut(step):
    frames = decoded(PAGED, step=step)
    assert [frame.type for frame in frames] == [0, 1, 1, 1, 3]
    assert [(frame.first, frame.count, frame.chunk_id) for frame in frames[1:-1]] == [
        (1, 3, 0), (4, 1, 0), (5, 4, 1),
    ]  # fmt: skip
    assert frames[2].payload == pages(4, 1).payload
    assert frames[0].start().generation == 7
    assert frames[-1].end() == ScanEnd(frames=3, bytes=8 * PAGE, chunks=2)


def test_gaps_between_chunks_of_records_are_no_damage():
    assert [frame.first for frame in decoded(LOGGED)[1:-1]] == [1, 4, 9]


@pytest.mark.parametrize("data", [PAGED, LOGGED], ids=["pages", "records"])
def test_a_stream_cut_anywhere_is_broken(data):
    for length in range(len(data)):
        with pytest.raises(Damage):
            decoded(data[:length])


def test_a_flipped_bit_of_a_payload_magic_or_length_is_noticed():
    starts, at = [], 0
    while at < len(PAGED):
        starts.append(at)
        at += FRAME_HEADER_BYTES + int.from_bytes(PAGED[at + 24 : at + 28], "little")
    unseen = {start + offset for start in starts for offset in range(8, 24)}
    source = random.Random(4)
    places = source.sample(sorted(set(range(len(PAGED))) - unseen), 400)
    for place in places:
        damaged = bytearray(PAGED)
        damaged[place] ^= 1 << source.randrange(8)
        with pytest.raises(Damage):
            decoded(bytes(damaged))


@pytest.mark.parametrize(
    "data",
    [
        stream(pages(4, 1), pages(1, 3)),
        stream(pages(1, 3), pages(3, 1)),
        stream(pages(1, 3), pages(5, 1)),
        stream(pages(1, 3, chunk_id=1), pages(4, 1, chunk_id=0)),
        stream(pages(1, 3), frames=2),
        stream(pages(1, 3), bytes=PAGE),
        stream(pages(1, 3), chunks=0),
        stream(records(1, b"x")),
        stream(pages(1, 1), engine="append_only"),
        stream(records(1, b"x"), records(3, b"y"), engine="append_only"),
        stream(pages(1, 1, page_size=256)),
        PAGED + b"x",
        PAGED + PAGED,
        PAGED[FRAME_HEADER_BYTES:],
        stream()[: -(FRAME_HEADER_BYTES + len(b'{"frames":0,"bytes":0,"chunks":0}'))] * 2,
        b"",
    ],
    ids=[
        "backwards", "overlap", "hole", "chunks backwards", "frames", "bytes", "chunks",
        "records of pages", "pages of records", "hole in a chunk", "half pages", "more behind it",
        "twice", "no start", "two starts", "nothing",
    ],
)  # fmt: skip
def test_what_no_scan_sends_is_refused(data):
    with pytest.raises(Damage):
        decoded(data)


def test_an_error_frame_ends_a_stream():
    error = note_frame(FrameType.ERROR, {"code": "corrupt_blob", "status": 500})
    begun = PAGED[: -len(decoded(PAGED)[-1].header()) - len(decoded(PAGED)[-1].payload)]
    frames = decoded(begun + error.header() + bytes(error.payload))
    assert frames[-1].problem() == {"code": "corrupt_blob", "status": 500}


def test_a_frame_larger_than_agreed_is_refused_before_it_is_read():
    decoder = FrameDecoder(payload_bytes_max=1024)
    with pytest.raises(Damage, match="1536 bytes"):
        decoder.feed(PAGED[: PAGED.index(b"BOPF", 8) + FRAME_HEADER_BYTES])
