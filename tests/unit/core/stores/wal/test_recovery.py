"""What reopening finds: torn tails are cut, damage is told, losses are told, LSNs never fall."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from app.core.base import failpoints
from app.core.base.errors import CorruptWal, WalLost
from app.core.formats.segment import (
    ENTRY_MAGIC,
    EngineCode,
    EntryFlag,
    EntryHeader,
    EntryType,
    SegmentHeader,
    pack_entry_header,
    pack_segment_header,
)
from app.core.stores.wal.log import CatalogSegment
from tests.unit.core.stores.wal.builders import (
    DB,
    Catalog,
    Place,
    append,
    append_together,
    payload,
    read_all,
    request,
    settled,
)

HEADER = 64
OPEN_ROW = CatalogSegment(segment_id=1, first_lsn=1, ceiling_lsn=1026, state="open", last_lsn=0)


def entry(
    first_lsn: int,
    *records: bytes,
    durable_lsn: int,
    flags: int = EntryFlag.BEGINS | EntryFlag.ENDS,
) -> bytes:
    body = payload(*records)
    header = EntryHeader(
        type=EntryType.RECORDS, flags=EntryFlag(flags), first_lsn=first_lsn, count=body.count,
        payload_bytes=body.payload_bytes, durable_lsn=durable_lsn, appended_at_us=1,
    )  # fmt: skip
    return pack_entry_header(header, (body.payload,)) + body.payload


def segment_header(first_lsn: int) -> bytes:
    return pack_segment_header(
        SegmentHeader(
            engine=EngineCode.APPEND_ONLY, db_id=DB, segment_id=first_lsn, first_lsn=first_lsn,
            chunk_bytes=4096,
        )
    )  # fmt: skip


def put_segment(place: Place, first_lsn: int, *entries: bytes) -> Path:
    """A hand-made open segment, with its row."""
    directory = place.root / str(DB)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{first_lsn:016d}.wal"
    path.write_bytes(segment_header(first_lsn) + b"".join(entries))
    place.catalog.rows.setdefault(DB, {})[first_lsn] = replace(
        OPEN_ROW, segment_id=first_lsn, first_lsn=first_lsn, ceiling_lsn=first_lsn + 1025
    )
    return path


def restore(place: Place, files: dict[Path, bytes], catalog: Catalog) -> None:
    shutil.rmtree(place.root, ignore_errors=True)
    for path, data in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    place.catalog = catalog.copy()


def contents(place: Place) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in place.files()}


@pytest.fixture
async def written(place: Place) -> tuple[Place, dict[Path, bytes], Catalog]:
    """Three appends, each in a flush of its own; the second is of two entries."""
    async with place.log() as log:
        await append(log, b"one")
        await append(log, b"two", b"three", per_entry=1)
        await append(log, b"four")
    return place, contents(place), place.catalog.copy()


Written = tuple[Place, dict[Path, bytes], Catalog]


async def test_a_log_torn_at_any_byte_keeps_its_whole_requests(written: Written) -> None:
    place, files, catalog = written
    ((path, data),) = files.items()
    ends = [HEADER, HEADER + 87, HEADER + 87 + 87 + 89, len(data)]
    kept = [[], [b"one"], [b"one", b"two", b"three"], [b"one", b"two", b"three", b"four"]]
    for size in range(HEADER, len(data) + 1):
        whole = sum(end <= size for end in ends) - 1
        restore(place, {path: data[:size]}, catalog)
        async with place.log() as log:
            assert log.health == "ok"
            assert list(read_all(log).values()) == kept[whole]
            assert log.next_lsn == len(kept[whole]) + 1
            assert path.stat().st_size == ends[whole]
            if size % 10:
                continue
            assert (await append(log, b"more")).first_lsn == len(kept[whole]) + 1
        async with place.log() as log:
            assert list(read_all(log).values()) == [*kept[whole], b"more"]
    assert place.fatal == []


async def test_a_log_torn_inside_its_header_is_damaged(written: Written) -> None:
    """The header was durable before the row was: a crash cannot tear it."""
    place, files, catalog = written
    ((path, data),) = files.items()
    for size in range(HEADER):
        restore(place, {path: data[:size]}, catalog)
        async with place.log() as log:
            assert log.health == "corrupt_wal"
        assert path.stat().st_size == size


@pytest.mark.parametrize("junk", [bytes(300), b"\xff" * 300, ENTRY_MAGIC * 75])
async def test_junk_after_the_end_is_cut(written: Written, junk: bytes) -> None:
    place, files, _ = written
    ((path, data),) = files.items()
    path.write_bytes(data + junk)
    async with place.log() as log:
        assert (log.health, log.next_lsn) == ("ok", 5)
    assert path.read_bytes() == data
    (cut,) = place.log_of_events.fields("wal.tail_cut")
    assert (cut["lsn"], cut["offset"]) == (5, len(data))


async def test_any_bit_flipped_before_the_last_append_is_damage(written: Written) -> None:
    """A later entry says that it was durable: refuse, show what lies before, change nothing."""
    place, files, catalog = written
    ((path, data),) = files.items()
    last = len(data) - 88
    for position in range(last):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        restore(place, {path: bytes(flipped)}, catalog)
        async with place.log() as log:
            assert log.health == "corrupt_wal", position
            before = {} if position < HEADER + 87 else {1: b"one"}
            assert read_all(log) == before
            with pytest.raises(CorruptWal):
                await append(log, b"more")
        assert contents(place) == {path: bytes(flipped)}
    assert "wal.corrupt" in place.log_of_events.names()


async def test_a_torn_group_is_cut_although_later_entries_of_it_are_whole(place: Place) -> None:
    async with place.log() as log:
        await append(log, b"one")
        await append_together(log, request(b"two"), request(b"three"), request(b"four"))
    ((path, data),) = contents(place).items()
    torn = bytearray(data)
    torn[HEADER + 87 + 85] ^= 1
    path.write_bytes(torn)
    async with place.log() as log:
        assert log.health == "ok"
        assert read_all(log) == {1: b"one"}
        assert log.next_lsn == 2
    assert path.stat().st_size == HEADER + 87


async def test_an_incomplete_request_is_cut_from_its_beginning(place: Place) -> None:
    path = put_segment(
        place, 1,
        entry(1, b"a", durable_lsn=0),
        entry(2, b"b", durable_lsn=1, flags=EntryFlag.BEGINS),
        entry(3, b"c", durable_lsn=1, flags=0),
    )  # fmt: skip
    async with place.log() as log:
        assert read_all(log) == {1: b"a"}
        assert log.next_lsn == 2
    assert path.stat().st_size == HEADER + 85


@pytest.mark.parametrize(
    "second",
    [
        entry(3, b"b", durable_lsn=0),  # a hole
        entry(1, b"b", durable_lsn=0),  # again
        entry(2, b"b", durable_lsn=0, flags=EntryFlag.ENDS),  # continues nothing
    ],
)
async def test_an_intact_entry_out_of_place_ends_the_log(place: Place, second: bytes) -> None:
    path = put_segment(place, 1, entry(1, b"a", durable_lsn=0), second)
    async with place.log() as log:
        assert read_all(log) == {1: b"a"}
        assert log.health == "ok"
    assert path.stat().st_size == HEADER + 85


async def test_an_entry_out_of_place_that_was_durable_is_damage(place: Place) -> None:
    put_segment(place, 1, entry(1, b"a", durable_lsn=0), entry(3, b"c", durable_lsn=2))
    async with place.log() as log:
        assert log.health == "corrupt_wal"
        assert read_all(log) == {1: b"a"}


async def test_a_later_registered_segment_proves_the_one_before(place: Place) -> None:
    """Its row was written after both were synced, so even a torn last entry is damage."""
    async with place.log(chunk_bytes=10) as log:
        await append_together(log, request(b"one"), request(b"two"))
        await settled(log)
        place.catalog.rows[DB] = {
            segment_id: replace(row, state="open", last_lsn=0)
            for segment_id, row in place.catalog.rows[DB].items()
        }
    first = place.files()[0]
    first.write_bytes(first.read_bytes()[: HEADER + 86])
    before = contents(place)
    async with place.log(chunk_bytes=10) as log:
        assert log.health == "corrupt_wal"
        assert read_all(log) == {}
    assert contents(place) == before


async def test_a_request_that_a_sealed_segment_begins_cannot_be_torn(place: Place) -> None:
    async with place.log(chunk_bytes=10) as log:
        await append(log, b"one", b"two", per_entry=1)
        await settled(log)
    last = place.files()[-1]
    last.write_bytes(last.read_bytes()[:-1])
    before = contents(place)
    async with place.log(chunk_bytes=10) as log:
        assert log.health == "corrupt_wal"
    assert contents(place) == before


async def test_any_change_of_a_sealed_segments_directory_is_damage(place: Place) -> None:
    async with place.log() as log:
        await append(log, b"one", b"two")
        await log.seal()
        await append(log, b"three")
    sealed = place.files()[0]
    data = sealed.read_bytes()
    directory = [*range(HEADER), *range(len(data) - 112, len(data))]
    for position in directory:
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        sealed.write_bytes(flipped)
        async with place.log() as log:
            assert log.health == "corrupt_wal", position
            assert read_all(log) == {}
            assert log.next_lsn == 3  # the row says that two were given out
        assert sealed.read_bytes() == flipped


async def test_a_sealed_segment_without_its_file_is_lost(place: Place) -> None:
    async with place.log() as log:
        await append(log, b"one", b"two")
        await log.seal()
        await append(log, b"three")
    place.files()[0].unlink()
    async with place.log() as log:
        assert (log.health, log.lost_from_lsn, log.lost_segment_ids) == ("wal_lost", 1, (1,))
        assert read_all(log) == {3: b"three"}
        with pytest.raises(WalLost):
            await append(log, b"more")
        await log.acknowledge_loss()
        assert (log.health, log.lost_from_lsn, log.lost_segment_ids) == ("ok", None, ())
        assert (await append(log, b"more")).first_lsn == OPEN_ROW.ceiling_lsn
    assert "wal.lost" in place.log_of_events.names()


async def test_a_lost_open_segment_may_have_given_out_all_below_its_ceiling(place: Place) -> None:
    async with place.log() as log:
        await append(log, b"one")
        await log.seal()
        await append(log, b"two")
    shutil.rmtree(place.root)
    async with place.log(floor_lsn=5) as log:
        assert (log.health, log.lost_from_lsn) == ("wal_lost", 1)
        assert log.next_lsn == place.catalog.of()[-1].ceiling_lsn == 2 + 1025


async def test_a_checkpointed_segment_may_be_gone_or_damaged(place: Place) -> None:
    async with place.log() as log:
        for record in (b"one", b"two", b"three"):
            await append(log, record)
            await log.seal()
    place.catalog.checkpoint(1)
    place.catalog.checkpoint(2)
    first, second, _ = place.files()
    first.unlink()
    second.write_bytes(b"rot")
    async with place.log() as log:
        assert (log.health, log.next_lsn) == ("ok", 4)
        assert read_all(log) == {3: b"three"}
        assert await log.remove([1, 2]) == (1, 2)
        assert not second.exists()


async def test_all_checkpointed_and_gone_goes_on_above(place: Place) -> None:
    async with place.log() as log:
        await append(log, b"one", b"two")
        await log.seal()
    place.catalog.checkpoint(1)
    shutil.rmtree(place.root)
    async with place.log() as log:
        assert (log.health, log.next_lsn, log.first_lsn) == ("ok", 3, None)


async def test_a_file_without_a_row_held_nothing_acknowledged(place: Place) -> None:
    async with place.log() as log:
        await append(log, b"one")
    stray = put_segment(place, 2, entry(2, b"two", durable_lsn=1))
    del place.catalog.rows[DB][2]
    async with place.log() as log:
        assert (log.health, log.next_lsn) == ("ok", 2)
        assert not stray.exists()


async def test_a_file_of_after_the_manifest_was_copied_stays_and_stops_the_log(
    place: Place,
) -> None:
    """The manifest was put back from a backup: what was acknowledged since is not taken for the
    remains of a crash, and its LSNs are not given out again.
    """
    async with place.log() as log:
        await append(log, b"one")
        await log.seal()
        backup = place.catalog.copy()
        await append(log, b"two")
        await append(log, b"three")
    before = contents(place)
    place.catalog = backup
    async with place.log(floor_lsn=2) as log:
        assert log.health == "corrupt_wal"
        assert read_all(log) == {1: b"one"}
        with pytest.raises(CorruptWal):
            await append(log, b"other")
    assert contents(place) == before
    async with place.log(floor_lsn=4) as log:  # the same files, where the rows have gone in order
        assert log.health == "ok"
    assert len(place.files()) == 1


async def test_a_file_without_a_row_stays_beside_damage(place: Place) -> None:
    put_segment(place, 1, entry(1, b"one", durable_lsn=0), entry(3, b"x", durable_lsn=2))
    stray = put_segment(place, 9, entry(9, b"two", durable_lsn=1))
    del place.catalog.rows[DB][9]
    async with place.log() as log:
        assert log.health == "corrupt_wal"
    assert stray.exists()


@pytest.mark.parametrize("cut", [1, 50, 96, 100])
async def test_a_seal_that_was_broken_off_is_done_again(place: Place, cut: int) -> None:
    async with place.log() as log:
        await append(log, b"one")
        await log.seal()
    path = place.files()[0]
    sealed = path.read_bytes()
    path.write_bytes(sealed[:-cut])
    place.catalog.rows[DB][1] = OPEN_ROW
    async with place.log() as log:
        assert (log.health, log.next_lsn) == ("ok", 2)
        assert log.sealed_segments() == ()
        await log.seal()
    assert path.read_bytes() == sealed


@pytest.mark.parametrize("hole", [0, 100])
@pytest.mark.parametrize("part", ["first half", "second half", "longer by zeros"])
async def test_a_seal_that_was_broken_off_behind_later_appends_is_done_again(
    place: Place, hole: int, part: str
) -> None:
    """Sealing follows the answers: the next segment may be registered and in use by then."""
    async with place.log(chunk_bytes=10) as log:
        await append(log, b"one")
        log.raise_floor(2 + hole)
        await append(log, b"two")
        await settled(log)
    path, last = place.files()
    sealed, end = path.read_bytes(), HEADER + 87
    middle = (end + len(sealed)) // 2
    match part:
        case "first half":
            path.write_bytes(sealed[:middle])
        case "second half":
            path.write_bytes(sealed[:end] + bytes(middle - end) + sealed[middle:])
        case _:
            path.write_bytes(sealed[:end] + bytes(len(sealed) - end))
    place.catalog.rows[DB][1] = replace(place.catalog.rows[DB][1], state="open", last_lsn=0)
    async with place.log(chunk_bytes=10) as log:
        assert log.health == "ok"
        assert read_all(log) == {1: b"one", 2 + hole: b"two"}
        assert [info.last_lsn for info in log.sealed_segments()] == [1]
    assert path.read_bytes() == sealed
    assert last.exists()


async def test_a_damaged_entry_before_a_hole_is_no_broken_seal(place: Place) -> None:
    async with place.log(chunk_bytes=10) as log:
        await append(log, b"one", b"two")
        log.raise_floor(100)
        await append(log, b"later")
        await settled(log)
    path = place.files()[0]
    path.write_bytes(path.read_bytes()[: HEADER + 90])
    place.catalog.rows[DB][1] = replace(place.catalog.rows[DB][1], state="open", last_lsn=0)
    async with place.log(chunk_bytes=10) as log:
        assert log.health == "corrupt_wal"


async def test_a_sealed_file_whose_row_is_open_is_sealed_in_the_row(place: Place) -> None:
    async with place.log() as log:
        await append(log, b"one")
        await log.seal()
        await append(log, b"two")
    place.catalog.rows[DB][1] = OPEN_ROW
    async with place.log() as log:
        assert [row.state for row in place.catalog.of()] == ["sealed", "open"]
        assert [info.last_lsn for info in log.sealed_segments()] == [1]
        assert read_all(log) == {1: b"one", 2: b"two"}


async def test_all_unsealed_but_the_last_are_sealed_at_open(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(name: str) -> None:
        if name == "wal.mid_seal":
            raise OSError(28, "no room")

    monkeypatch.setattr(failpoints, "fp", no_room)
    async with place.log(chunk_bytes=10) as log:
        for record in (b"one", b"two", b"three"):
            await append(log, record)
        await settled(log)
        assert log.sealed_segments() == ()
    assert "wal.disk_full" in place.log_of_events.names()
    assert place.fatal == []
    monkeypatch.undo()
    async with place.log(chunk_bytes=10) as log:
        assert [info.last_lsn for info in log.sealed_segments()] == [1, 2]
        assert read_all(log) == {1: b"one", 2: b"two", 3: b"three"}


async def test_a_record_that_looks_like_a_trailer_or_an_entry_is_only_a_record(
    place: Place,
) -> None:
    """Hostile payloads: a whole sealed segment, and headers by the hundred, as records."""
    async with place.log() as log:
        await append(log, b"one")
        await log.seal()
    sealed = place.files()[0].read_bytes()
    fakes = [sealed, sealed[-112:], entry(9, b"x", durable_lsn=8), ENTRY_MAGIC * 1000]
    async with place.log(chunk_bytes=1 << 20) as log:
        for fake in fakes:
            await append(log, fake)
    async with place.log(chunk_bytes=1 << 20) as log:
        assert log.health == "ok"
        assert list(read_all(log).values()) == [b"one", *fakes]


async def test_another_databases_segment_is_damage(place: Place) -> None:
    path = put_segment(place, 1, entry(1, b"a", durable_lsn=0))
    header = SegmentHeader(
        engine=EngineCode.APPEND_ONLY, db_id=DB + 1, segment_id=1, first_lsn=1, chunk_bytes=4096
    )
    path.write_bytes(pack_segment_header(header) + path.read_bytes()[HEADER:])
    async with place.log() as log:
        assert log.health == "corrupt_wal"


async def test_a_request_over_three_segments_of_which_one_has_no_row(place: Place) -> None:
    """No crash of ours leaves this, since rows are written together; LSNs skip to the empty one."""
    async with place.log(chunk_bytes=10) as log:
        await append(log, b"zero")
        await append(log, b"one", b"two", b"three", per_entry=1)
        await settled(log)
    rows = place.catalog.rows[DB]
    assert sorted(rows) == [1, 2, 3, 4]
    place.catalog.rows[DB] = {
        1: rows[1],
        2: replace(rows[2], state="open", last_lsn=0),
        3: replace(rows[3], state="open", last_lsn=0),
    }
    for path, size in zip(place.files()[1:3], (HEADER + 87, HEADER + 87), strict=True):
        path.write_bytes(path.read_bytes()[:size])
    async with place.log(chunk_bytes=10) as log:
        assert log.health == "ok"
        assert read_all(log) == {1: b"zero"}
        assert log.next_lsn == 3
        assert [path.stat().st_size for path in place.files()] == [
            place.files()[0].stat().st_size, HEADER, HEADER,
        ]  # fmt: skip
        assert (await append(log, b"x" * 4000)).first_lsn == 3
    async with place.log(chunk_bytes=10) as log:
        assert read_all(log) == {1: b"zero", 3: b"x" * 4000}
        assert (await append(log, b"next")).first_lsn == 4
        await log.seal()
    async with place.log(chunk_bytes=10) as log:
        assert read_all(log) == {1: b"zero", 3: b"x" * 4000, 4: b"next"}
        log.raise_floor(10)
        assert (await append(log, b"ten")).first_lsn == 10


async def test_an_empty_open_segment_below_the_floor_is_left_behind(place: Place) -> None:
    put_segment(place, 1)
    async with place.log(floor_lsn=10) as log:
        assert (await append(log, b"a")).first_lsn == 10
        await log.seal()
        assert (await append(log, b"b")).first_lsn == 11
    async with place.log(floor_lsn=10) as log:
        assert (log.health, read_all(log)) == ("ok", {10: b"a", 11: b"b"})


async def test_an_empty_open_segment_takes_an_entry_beyond_its_ceiling(place: Place) -> None:
    put_segment(place, 1)
    async with place.log() as log:
        await append(log, *[b""] * 3000)
        await log.seal()
    assert place.catalog.of()[0].ceiling_lsn == 1 + 3000 + 1
