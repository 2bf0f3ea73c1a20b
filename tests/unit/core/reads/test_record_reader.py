import asyncio
import errno
import os
import random
import threading
import tracemalloc

import msgspec
import pytest

from app.core.base.errors import (
    CorruptBlob,
    CorruptWal,
    NotLineRecords,
    NotReady,
    RemoteUnavailable,
)
from app.core.formats.container import parse_container_directory
from app.core.formats.record_framing import pack_records, unpack_records
from app.core.reads import byte_source, record_reader
from app.core.reads.log_layout import LayoutCache, segment_layout
from app.core.reads.paged_plan import ChunkPage
from tests.helpers.logs import build_chunk, build_segment
from tests.unit.core.reads.conftest import MIB, open_files

CODECS = ["none", "zstd", "lz4"]


def lines_of(records):
    return b"".join(record + b"\n" for record in records)


def random_segment(source, path, *, first_lsn, segment_id, newlines=True, sealed=True):
    def record():
        size = source.choice([0, 3, 200, source.randint(0, 90_000)])
        data = source.randbytes(8).hex().encode() * (size // 16 + 1)
        if newlines and source.random() < 0.05:
            data = b"\n" + data
        return data[:size]

    entries = [
        [record() for _ in range(source.randint(1, 12))] for _ in range(source.randint(1, 25))
    ]
    return build_segment(path, entries, first_lsn=first_lsn, segment_id=segment_id, sealed=sealed)


@pytest.mark.parametrize("seed", range(12))
async def test_against_a_plain_list(house, tmp_path, seed):
    """Segments, gaps, chunks, codecs, copies and ranges at random."""
    source = random.Random(seed)
    lsn, truth, newlines = 1, {}, source.random() < 0.5
    for number in range(source.randint(1, 5)):
        lsn += source.choice([0, 0, 0, 7])
        where = source.choice(["remote", "cached", "wal", "both"])
        segment = random_segment(
            source, tmp_path / f"s{number}", first_lsn=lsn, segment_id=number,
            newlines=newlines, sealed=where != "wal" or source.random() < 0.5,
        )  # fmt: skip
        last = segment.durable_last_lsn
        visible = last
        if where != "wal":
            visible = source.choice([last, last, source.randint(lsn, last)])
            await house.publish(
                segment, cached=where == "cached", codec=source.choice(CODECS), visible_last=visible
            )
        if where in {"wal", "both"}:
            house.segments.append(segment)
        numbered = enumerate(segment.records, start=lsn)
        truth.update({at: record for at, record in numbered if at <= visible})
        lsn = last + 1
    for _ in range(25):
        from_lsn = source.randint(1, lsn + 2)
        to_lsn = source.choice([None, source.randint(from_lsn, lsn + 2)])
        limit = source.choice([None, source.randint(1, 40)])
        wanted: dict[int, bytes] = {}
        for at in range(from_lsn, lsn if to_lsn is None else min(lsn, to_lsn + 1)):
            if at in truth and len(wanted) != limit:
                wanted[at] = truth[at]
            elif wanted:
                break
        records = list(wanted.values())
        stream = await house.open(from_lsn, to_lsn, limit=limit, next_lsn=lsn)
        content = b"".join([piece async for piece in stream.content])
        await stream.aclose()
        assert content == pack_records(records)
        assert (stream.first_lsn, stream.last_lsn) == (
            (min(wanted), max(wanted)) if wanted else (None, None)
        )
        if any(b"\n" in record for record in records):
            with pytest.raises(NotLineRecords):
                await house.open(from_lsn, to_lsn, limit=limit, next_lsn=lsn, as_lines=True)
        else:
            read = await house.read_bytes(
                from_lsn, to_lsn, limit=limit, next_lsn=lsn, as_lines=True
            )
            assert read == lines_of(records)
    house.check_nothing_is_held()
    assert not house.events("read.damaged")


async def test_an_open_segment_is_read_as_far_as_it_was_durable(house, tmp_path):
    segment = build_segment(tmp_path / "s", [[b"a", b"b"], [b"c"]], sealed=False)
    with segment.path.open("ab") as file:
        file.write(b"half an entry that is being written")
    house.segments.append(segment)
    assert await house.read() == [b"a", b"b", b"c"]
    assert await house.read(2, 2) == [b"b"]


async def test_a_segment_may_grow_in_place_while_it_is_read(house, tmp_path):
    records = [os.urandom(300_000) for _ in range(20)]
    whole = build_segment(tmp_path / "s", [[one] for one in records], sealed=False)
    house.segments.append(whole)
    stream = await house.open()
    got = await anext(stream.content)
    with whole.path.open("ab") as file:
        file.write(os.urandom(100_000))
    got += b"".join([piece async for piece in stream.content])
    await stream.aclose()
    assert unpack_records(got) == records


async def test_empty_answers_hold_nothing(house, tmp_path):
    house.segments.append(build_segment(tmp_path / "s", [[b"a"]]))
    stream = await house.open(2)
    assert (stream.first_lsn, stream.last_lsn, stream.next_lsn) == (None, None, 2)
    assert [piece async for piece in stream.content] == []
    await stream.aclose()
    house.check_nothing_is_held()
    assert house.remote.reads == []


async def test_a_record_larger_than_a_piece(house, tmp_path):
    records = [b"small", os.urandom(5 * MIB + 3), b"", os.urandom(MIB)]
    segment = build_segment(tmp_path / "s", [[one] for one in records])
    await house.publish(segment, codec="zstd")
    assert await house.read() == records
    assert await house.read(2, 3) == records[1:3]


# --- lines


async def test_lines_are_refused_before_the_first_byte(house, tmp_path):
    entries = [[b"x" * 1000] * 60 for _ in range(60)]
    house.segments.append(build_segment(tmp_path / "s", [*entries, [b"fine", b"two\nlines"]]))
    with pytest.raises(NotLineRecords) as caught:
        await house.open(as_lines=True)
    assert caught.value.fields["lsn"] == 3602
    house.check_nothing_is_held()
    assert (
        await house.read_bytes(to_lsn=3601, as_lines=True)
        == b"x" * 1000 + (b"\n" + b"x" * 1000) * 3599 + b"\nfine\n"
    )


async def test_a_length_that_looks_like_a_newline_is_none(house, tmp_path):
    house.segments.append(build_segment(tmp_path / "s", [[b"0123456789"]]))
    assert await house.read_bytes(as_lines=True) == b"0123456789\n"


async def test_safe_spans_are_not_read_twice(house, tmp_path):
    segment = build_segment(tmp_path / "s", [[b"line"] * 100])
    await house.publish(segment)
    await house.read_bytes(as_lines=True)
    assert len(house.remote.reads) == 2  # directory, window


# --- tiers, caches, events


@pytest.mark.parametrize("codec", CODECS)
async def test_one_record_costs_one_small_range_once_the_directory_is_known(house, tmp_path, codec):
    entries = [[os.urandom(2000)] for _ in range(2000)]
    segment = build_segment(tmp_path / "s", entries)
    row = await house.publish(segment, codec=codec)
    assert await house.read(1000, 1000) == [segment.records[999]]
    assert await house.read(3, 3) == [segment.records[2]]
    directory, *windows = house.remote.reads
    assert directory == (row.blob.key, row.directory_offset, row.directory_bytes)
    assert len(windows) == 2
    assert all(length <= 260 * 1024 for _, _, length in windows)
    served = house.events("read.served")
    assert [one["tier"] for one in served] == ["remote"] * 3
    assert [one["bytes"] for one in served] == [length for _, _, length in house.remote.reads]
    assert all(one["seconds"] >= 0 for one in served)


async def test_the_nearest_copy_is_read(house, tmp_path):
    first = build_segment(tmp_path / "a", [[b"a"]], first_lsn=1)
    second = build_segment(tmp_path / "b", [[b"b"]], first_lsn=2)
    third = build_segment(tmp_path / "c", [[b"c"]], first_lsn=3)
    await house.publish(first)
    await house.publish(second, cached=True)
    await house.publish(third, cached=True)
    house.segments.append(third)
    assert await house.read() == [b"a", b"b", b"c"]
    tiers = [one["tier"] for one in house.events("read.served")]
    assert tiers == ["remote"] * 2 + ["local"] * 2 + ["wal"]
    assert {key for key, _, _ in house.remote.reads} == {house.chunks[0].blob.key}


async def test_the_remote_store_is_not_asked_for_what_is_here(house, tmp_path):
    house.remote.unavailable = True
    segment = build_segment(tmp_path / "a", [[b"a"]])
    await house.publish(segment, cached=True)
    house.segments.append(build_segment(tmp_path / "b", [[b"b"]], first_lsn=2))
    assert await house.read() == [b"a", b"b"]


async def test_an_unavailable_store_is_an_error_before_the_first_byte(house, tmp_path):
    await house.publish(build_segment(tmp_path / "a", [[b"a"]]))
    house.remote.unavailable = True
    with pytest.raises(RemoteUnavailable):
        await house.open()
    house.check_nothing_is_held()


async def test_one_window_is_read_ahead_and_no_more(house, tmp_path):
    segment = build_segment(tmp_path / "s", [[os.urandom(MIB - 200)] for _ in range(12)])
    await house.publish(segment)
    stream = await house.open()
    await anext(stream.content)
    await house.wait_served(3)
    for _ in range(200):
        await asyncio.sleep(0)
    assert len(house.remote.reads) == 3  # directory, the piece in hand, the one after it
    await stream.aclose()
    assert len(house.remote.reads) == 3


def test_the_layout_cache_forgets_the_least_used(rows_and_layout):
    rows, layout = rows_and_layout
    cache = LayoutCache(limit_bytes=3 * layout.memory_bytes)
    for row in rows[:3]:
        cache.put(row, layout)
    assert cache.get(rows[0]) is layout
    cache.put(rows[3], layout)
    assert [cache.get(row) is not None for row in rows] == [True, False, True, True]
    cache.put(rows[3], layout)
    assert cache.used_bytes == 3 * layout.memory_bytes
    small = LayoutCache(limit_bytes=1)
    small.put(rows[0], layout)
    assert (small.get(rows[0]), small.used_bytes) == (None, 0)


@pytest.fixture
def rows_and_layout(tmp_path):
    rows = []
    for number in range(4):
        segment = build_segment(tmp_path / f"s{number}", [[b"%d" % number]])
        rows.append(build_chunk(segment, tmp_path / "blob", chunk_id=number))
    layout = segment_layout(segment.index, first_lsn=1, last_lsn=1, entries_end=segment.entries_end)
    return rows, layout


# --- damage


def small_segment(path, **options):
    return build_segment(path, [[b"one", b""], [b"a line"], [b"x" * 90]], **options)


def never_fetched(row, blob):
    """What a reader of records has no use for: the header, and a segment's own index, packed."""
    if row.codec == "none":
        return list(range(64))
    own_index = parse_container_directory(blob[row.directory_offset :]).blocks[-1]
    start = int(own_index["stored_offset"])
    return [*range(64), *range(start, start + int(own_index["stored_bytes"]))]


@pytest.mark.parametrize("codec", CODECS)
async def test_every_byte_of_a_remote_blob(house, tmp_path, codec):
    """At rest: what is served is right, or it is a typed error with the blob's key."""
    segment = small_segment(tmp_path / "s")
    row = await house.publish(segment, codec=codec)
    good = house.remote.objects[row.blob.key]
    indifferent = never_fetched(row, good)
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= (0x01, 0x80, 0xFF)[place % 3]
        house.remote.objects[row.blob.key] = bytes(bad)
        house.reader._logs.layouts = LayoutCache(limit_bytes=MIB)
        if place in indifferent:
            assert await house.read() == list(segment.records)
            continue
        with pytest.raises(CorruptBlob) as caught:
            await house.open()
        assert caught.value.fields["key"] == row.blob.key
    house.check_nothing_is_held()


@pytest.mark.parametrize("codec", CODECS)
async def test_a_damaged_cache_file_is_dropped_and_fetched_again(house, tmp_path, codec):
    segment = small_segment(tmp_path / "s")
    row = await house.publish(segment, cached=True, codec=codec)
    good = house.remote.objects[row.blob.key]
    for place in sorted(set(range(64, len(good), 7)) - set(never_fetched(row, good))):
        path = house.cached_path(row)
        bad = bytearray(good)
        bad[place] ^= 0xFF
        path.write_bytes(bad)
        house.reader._logs.layouts = LayoutCache(limit_bytes=MIB)
        assert await house.read() == list(segment.records)
        assert row.blob.sha256.hex() not in house.hot_cache
        assert house.events("read.damaged")[-1]["tier"] == "local"
        (house.root / "again").write_bytes(good)
        assert await house.hot_cache.admit_link(
            house.root / "again", sha256=row.blob.sha256.hex(), size_bytes=len(good)
        )
        (house.root / "again").unlink()
    house.check_nothing_is_held()


async def test_a_cache_file_that_is_damaged_far_inside_is_left_in_mid_stream(house, tmp_path):
    records = [os.urandom(100_000) for _ in range(50)]
    segment = build_segment(tmp_path / "s", [[one] for one in records])
    row = await house.publish(segment, cached=True)
    path = house.cached_path(row)
    bad = bytearray(path.read_bytes())
    bad[3_300_000] ^= 1
    path.write_bytes(bad)
    assert await house.read() == records
    tiers = [one["tier"] for one in house.events("read.served")]
    assert tiers == sorted(tiers)  # local, then remote
    assert {"local", "remote"} == set(tiers)
    assert all(first > 2_000_000 for _, first, _ in house.remote.reads)


@pytest.mark.parametrize("codec", CODECS)
async def test_a_flip_on_the_way_is_fetched_again(house, tmp_path, codec):
    segment = small_segment(tmp_path / "s")
    await house.publish(segment, codec=codec)
    flips = iter([True, False, True, False])

    def flip(key, first, data):
        if not next(flips):
            return data
        return data[:-9] + bytes([data[-9] ^ 4]) + data[-8:]

    house.remote.on_read = flip
    assert await house.read() == list(segment.records)
    assert len(house.remote.reads) == 4  # directory and window, twice each
    assert [one["tier"] for one in house.events("read.damaged")] == ["remote"] * 2


async def test_a_short_answer_is_fetched_again(house, tmp_path):
    segment = small_segment(tmp_path / "s")
    await house.publish(segment)
    cuts = iter([1, 0, 5, 0])
    house.remote.on_read = lambda key, first, data: data[: len(data) - next(cuts)]
    assert await house.read() == list(segment.records)


async def test_what_stays_damaged_is_fetched_twice_and_no_more(house, tmp_path):
    await house.publish(small_segment(tmp_path / "s"))
    house.remote.on_read = lambda key, first, data: bytes(len(data))
    with pytest.raises(CorruptBlob):
        await house.open()
    assert len(house.remote.reads) == 2


async def test_a_blob_that_is_gone(house, tmp_path):
    row = await house.publish(small_segment(tmp_path / "s"))
    house.remote.objects.clear()
    with pytest.raises(CorruptBlob, match="gone") as caught:
        await house.open()
    assert caught.value.fields["key"] == row.blob.key
    assert house.events("read.damaged")


@pytest.mark.parametrize("codec", CODECS)
async def test_another_blob_in_its_place_is_noticed(house, tmp_path, codec):
    """Well-formed, of the same size and the same LSNs: another database's or chunk's."""
    mine = small_segment(tmp_path / "a")
    row = await house.publish(mine, codec=codec)
    other = small_segment(tmp_path / "b", db_id=8)
    foreign = await house.publish(other, codec=codec)
    moved = small_segment(tmp_path / "c", first_lsn=5)
    later = await house.publish(moved, codec=codec)
    good = house.remote.objects[row.blob.key]
    house.chunks = [row]
    for impostor in (foreign, later):
        house.remote.objects[row.blob.key] = house.remote.objects[impostor.blob.key]
        with pytest.raises(CorruptBlob):
            await house.open()
    house.remote.objects[row.blob.key] = good
    assert await house.read() == list(mine.records)


async def test_a_blob_of_a_later_generation_is_noticed(house, tmp_path):
    row = await house.publish(small_segment(tmp_path / "a"), codec="zstd", generation=5)
    house.chunks = [msgspec.structs.replace(row, generation=4)]
    with pytest.raises(CorruptBlob):
        await house.open()
    house.chunks = [msgspec.structs.replace(row, generation=6)]  # renewed, as by a truncation
    assert len(await house.read()) == 4
    # a fork's row keeps its own generations
    house.chunks = [msgspec.structs.replace(row, db_id=9, origin_db_id=7, generation=1)]
    assert len(await house.read()) == 4


async def test_every_byte_of_a_wal_segment(house, tmp_path):
    segment = small_segment(tmp_path / "s")
    house.segments.append(segment)
    good = segment.path.read_bytes()
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= (0x01, 0x80, 0xFF)[place % 3]
        segment.path.write_bytes(bad)
        read_at_all = 64 <= place < segment.entries_end  # the index is in the pin
        if read_at_all:
            with pytest.raises(CorruptWal) as caught:
                await house.open()
            assert caught.value.fields["segment_id"] == segment.segment_id
        else:
            assert await house.read() == list(segment.records)
    house.check_nothing_is_held()


async def test_a_process_without_descriptors_is_no_damage(house, tmp_path, monkeypatch):
    house.segments.append(build_segment(tmp_path / "s", [[b"a", b"b"]]))

    def refuse(*_):
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patched:
        patched.setattr("app.core.reads.byte_source.os.open", refuse)
        with pytest.raises(NotReady):
            await house.open()
    assert await house.read() == [b"a", b"b"]


async def test_a_segment_file_that_is_gone_or_cut(house, tmp_path):
    segment = small_segment(tmp_path / "s")
    house.segments.append(segment)
    segment.path.write_bytes(segment.path.read_bytes()[: segment.entries_end - 1])
    with pytest.raises(CorruptWal):
        await house.open()
    segment.path.unlink()
    with pytest.raises(CorruptWal, match="gone"):
        await house.open()
    house.check_nothing_is_held()


@pytest.mark.parametrize("gone", [True, False])
async def test_a_damaged_segment_that_is_published_is_read_from_there(house, tmp_path, gone):
    records = [os.urandom(100_000) for _ in range(40)]
    segment = build_segment(tmp_path / "s", [[one] for one in records])
    await house.publish(segment, codec="lz4")
    house.segments.append(segment)
    if gone:
        segment.path.unlink()
    else:
        bad = bytearray(segment.path.read_bytes())
        bad[2_500_000] ^= 1
        segment.path.write_bytes(bad)
    assert await house.read() == records
    assert [one["tier"] for one in house.events("read.damaged")] == ["wal"]
    house.check_nothing_is_held()


async def test_damage_in_mid_stream_is_an_error_after_what_was_right(house, tmp_path):
    records = [os.urandom(100_000) for _ in range(40)]
    segment = build_segment(tmp_path / "s", [[one] for one in records])
    house.segments.append(segment)
    bad = bytearray(segment.path.read_bytes())
    bad[2_500_000] ^= 1
    segment.path.write_bytes(bad)
    stream = await house.open()
    got = []

    async def read_on():
        async for piece in stream.content:
            got.append(piece)  # noqa: PERF401 - what came before the error counts

    with pytest.raises(CorruptWal):
        await read_on()
    await stream.aclose()
    whole = unpack_records(b"".join(got))
    assert 0 < len(whole) < 25
    assert whole == records[: len(whole)]
    house.check_nothing_is_held()


# --- letting go


async def stream_of_windows(house, tmp_path):
    segment = build_segment(tmp_path / "s", [[os.urandom(MIB // 2)] for _ in range(16)])
    await house.publish(segment, cached=True)
    return await house.open()


async def test_closing_lets_go_of_everything_however_far_it_was_read(house, tmp_path):
    for pieces in (0, 1, 3, 100):
        stream = await stream_of_windows(house, tmp_path)
        house.chunks.clear()
        for _ in range(pieces):
            await anext(stream.content, None)
        assert house.pins[-1].releases == 0
        await stream.aclose()
        await stream.aclose()
        house.check_nothing_is_held()


async def test_a_cancelled_reader_lets_go(house, tmp_path):
    """The client goes away while the next window is on its way."""
    segment = build_segment(tmp_path / "s", [[os.urandom(MIB // 2)] for _ in range(16)])
    await house.publish(segment)
    waiting, hold = asyncio.Event(), asyncio.Event()
    original = house.remote.get_blob

    async def slow(key, *, first=0, length=None):
        if len(house.remote.reads) == 3:
            waiting.set()
            await hold.wait()
        return await original(key, first=first, length=length)

    house.remote.get_blob = slow

    async def consume():
        stream = await house.open()
        try:
            async for _ in stream.content:
                pass
        finally:
            await stream.aclose()

    task = asyncio.get_running_loop().create_task(consume())
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    house.check_nothing_is_held()
    assert len(asyncio.all_tasks()) == 1


async def test_cancelled_while_it_opens(house, tmp_path):
    await house.publish(build_segment(tmp_path / "s", [[b"a"]]))
    waiting = asyncio.Event()

    async def never(key, *, first=0, length=None):
        waiting.set()
        await asyncio.Event().wait()

    house.remote.get_blob = never
    task = asyncio.get_running_loop().create_task(house.open())
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    house.check_nothing_is_held()
    assert len(asyncio.all_tasks()) == 1


async def test_closing_waits_for_a_read_in_the_pool_before_the_file_is_closed(
    house, tmp_path, monkeypatch
):
    stream = await stream_of_windows(house, tmp_path)
    started, go_on, outcomes = threading.Event(), threading.Event(), []
    original = byte_source.read_exactly_blocking

    def slow(descriptor, first, length):
        started.set()
        go_on.wait(10)
        data = original(descriptor, first, length)
        outcomes.append(len(data))
        return data

    await anext(stream.content)
    await anext(stream.content)  # the read-ahead of the first piece is done
    await house.wait_served(4)
    monkeypatch.setattr(byte_source, "read_exactly_blocking", slow)
    await anext(stream.content)
    await asyncio.get_running_loop().run_in_executor(None, started.wait, 10)
    closing = asyncio.get_running_loop().create_task(stream.aclose())
    for _ in range(50):
        await asyncio.sleep(0)
    assert house.hot_cache.stats().pinned == 1
    assert not closing.done()
    go_on.set()
    await closing
    assert len(outcomes) == 1
    house.check_nothing_is_held()


async def test_descriptors_do_not_leak(house, tmp_path):
    segment = build_segment(tmp_path / "s", [[b"a"]])
    house.segments.append(segment)
    await house.read()
    before = open_files()
    for _ in range(20):
        await house.read()
    assert open_files() == before


# --- bounds


@pytest.mark.parametrize(
    ("where", "as_lines"), [("wal", False), ("wal", True), ("none", False), ("zstd", True)]
)
async def test_memory_is_bounded_whatever_the_range(house, tmp_path, where, as_lines):
    record = b"0123456789abcdef" * 20
    segment = build_segment(tmp_path / "s", [[record] * 200] * 1024)
    assert segment.path.stat().st_size > 63 * MIB
    if where == "wal":
        house.segments.append(segment)
    else:
        await house.publish(segment, cached=True, codec=where)
    stream = await house.open(as_lines=as_lines)
    tracemalloc.start()
    total = 0
    async for piece in stream.content:
        total += len(piece)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    await stream.aclose()
    assert total == 1024 * 200 * (len(record) + (1 if as_lines else 4))
    assert peak < 8 * MIB
    assert record_reader.SENT_PIECE_BYTES == MIB


class Pages:
    """Rows by pages of one; they may go while a stream is read."""

    def __init__(self, rows) -> None:
        self.rows = list(rows)

    async def pages(self, lsn):
        while row := next((row for row in self.rows if row.last >= lsn), None):
            yield ChunkPage([row], is_last=False)
            lsn = row.last + 1
        yield ChunkPage([], is_last=True)


async def test_a_log_whose_rows_come_by_pages_reads_as_a_whole_one(house, tmp_path):
    records = [[os.urandom(40) for _ in range(3)] for _ in range(5)]
    for number, some in enumerate(records):
        await house.publish(
            build_segment(tmp_path / f"s{number}", [some], first_lsn=3 * number + 1)
        )
    house.segments.append(
        build_segment(tmp_path / "open", [[b"in the log"]], first_lsn=16, sealed=False)
    )
    pages = Pages(house.chunks)
    whole = [one for some in records for one in some] + [b"in the log"]
    assert await house.read(chunks=pages) == whole
    assert await house.read(5, 11, chunks=pages) == whole[4:11]
    assert await house.read(8, limit=4, chunks=pages) == whole[7:11]
    house.check_nothing_is_held()


async def test_lines_of_many_pages_are_all_looked_through_first(house, tmp_path):
    for number, record in enumerate((b"one", b"two", b"with\na break")):
        await house.publish(
            build_segment(tmp_path / f"s{number}", [[record]], first_lsn=number + 1)
        )
    pages = Pages(house.chunks)
    assert await house.read_bytes(1, 2, chunks=pages, as_lines=True) == b"one\ntwo\n"
    with pytest.raises(NotLineRecords):
        await house.open(chunks=pages, as_lines=True)
    house.check_nothing_is_held()


async def test_rows_that_go_under_a_reader_break_its_stream(house, tmp_path):
    """Those of a deleted database do, which waits for its readers only for a while."""
    for number in range(8):
        segment = build_segment(tmp_path / f"s{number}", [[b"%d" % number]], first_lsn=number + 1)
        await house.publish(segment)
    pages = Pages(house.chunks)
    stream = await house.open(chunks=pages)
    assert (stream.last_lsn, unpack_records(await anext(stream.content))) == (8, [b"0"])
    del pages.rows[4:]
    with pytest.raises(NotReady):
        [piece async for piece in stream.content]
    await stream.aclose()
    house.check_nothing_is_held()
