"""The page index on real logs, against lists that are searched from end to end."""

import asyncio
import os
import random
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.core.base.errors import CorruptWal, InvariantViolation, ManifestFull
from app.core.formats.frame_run import (
    FrameFooter,
    kept_frames,
    pack_footer,
    pack_frame_header,
)
from app.core.formats.segment import EngineCode, EntryType, check_entry
from app.core.formats.sqlite_wal import WalPosition
from app.core.stores.wal.log import AppendRequest, WalLog
from app.core.stores.wal.page_index import CUT_OFF, FramePlace
from app.core.stores.wal.page_parts import EntryBatch, PagePart
from tests.unit.core.stores.wal.builders import CHUNK, DB, Place, config, settled

PAGE = 512
FRAME = PAGE + 24
PAGES_MAX = 12


@dataclass(frozen=True)
class Frames:
    """A payload in memory, with pages that name themselves."""

    page_nos: np.ndarray
    commit_sizes: np.ndarray
    footer: FrameFooter | None
    tags: list[int]
    line_safe: bool = False

    @property
    def count(self) -> int:
        return len(self.page_nos)

    @property
    def payload_bytes(self) -> int:
        return len(self.load_blocking())

    def load_blocking(self) -> bytes:
        frames = b"".join(
            pack_frame_header(int(page_no), commit_size=int(size)) + page(tag)
            for page_no, size, tag in zip(self.page_nos, self.commit_sizes, self.tags, strict=True)
        )
        return frames + (pack_footer(self.footer) if self.footer else b"")


def page(tag: int) -> bytes:
    return tag.to_bytes(8, "little") * (PAGE // 8)


def footer_of(page_count: int, requests: int) -> FrameFooter:
    return FrameFooter(
        page_count=page_count,
        position=WalPosition(
            offset=32 + requests * FRAME,
            salt1=1,
            salt2=2,
            checksum1=3,
            checksum2=requests,
            page_size=PAGE,
            order="big",
        ),
    )


@dataclass
class Model:
    """Frames (LSN, page, tag) and commits (LSN, size) that are still in the log."""

    frames: list[tuple[int, int, int]] = field(default_factory=list)
    commits: list[tuple[int, int]] = field(default_factory=list)
    ends: dict[int, FrameFooter] = field(default_factory=dict)

    def where(self, page_no: int, at_lsn: int):
        versions = [lsn for lsn, page, _ in self.frames if page == page_no and lsn <= at_lsn]
        newest = max(versions, default=0)
        if any(newest <= lsn <= at_lsn and size < page_no for lsn, size in self.commits):
            return CUT_OFF
        return newest or None

    def drop(self, first_lsn: int, last_lsn: int) -> None:
        self.frames = [one for one in self.frames if not first_lsn <= one[0] <= last_lsn]
        self.commits = [one for one in self.commits if not first_lsn <= one[0] <= last_lsn]
        self.ends = {lsn: end for lsn, end in self.ends.items() if not first_lsn <= lsn <= last_lsn}


class Writer:
    """Appends requests of transactions to a log and to the model."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.requests = 0

    async def append(
        self, log: WalLog, transactions: list[tuple[list[int], int]], *, per_entry: int = 3
    ) -> None:
        """Each transaction: its frames' pages, and the size its last one commits."""
        page_nos, sizes = [], []
        for pages, size in transactions:
            page_nos += pages
            sizes += [0] * (len(pages) - 1) + [size]
        kept = kept_frames(
            np.array(page_nos, dtype=np.uint32), np.array(sizes, dtype=np.uint32), page_size=PAGE
        )
        numbers = np.array(page_nos, dtype=np.uint32)[kept]
        commits = np.array(sizes, dtype=np.uint32)[kept]
        self.requests += 1
        footer = footer_of(transactions[-1][1], self.requests)
        tags = [self.requests * 1000 + index for index in range(len(kept))]
        entries = [
            Frames(
                page_nos=numbers[at : at + per_entry],
                commit_sizes=commits[at : at + per_entry],
                footer=footer if at + per_entry >= len(kept) else None,
                tags=tags[at : at + per_entry],
            )
            for at in range(0, len(kept), per_entry)
        ]
        appended = await log.append(AppendRequest(entries=entries, entry_type=EntryType.FRAMES))
        for index, tag in enumerate(tags):
            lsn = appended.first_lsn + index
            self.model.frames.append((lsn, int(numbers[index]), tag))
            if commits[index]:
                self.model.commits.append((lsn, int(commits[index])))
        self.model.ends[appended.last_lsn] = footer


@asynccontextmanager
async def opened(place: Place):
    async with place.store() as store:
        libsql = replace(config(chunk_bytes=CHUNK), engine=EngineCode.LIBSQL, page_size=PAGE)
        yield await store.open_log(libsql, place.catalog.of())


async def check(log: WalLog, model: Model) -> None:
    index = await log.frames.read()
    tags = {lsn: tag for lsn, _, tag in model.frames}
    lsns = [lsn for lsn, _ in model.commits]
    assert len(index) == len(model.frames)
    all_pages = np.arange(1, PAGES_MAX + 2, dtype=np.uint32)
    for at_lsn in [*lsns[-6:], *lsns[:3], 0, log.durable_lsn + 5]:
        gathered = index.gather(all_pages, at_lsn=at_lsn)
        for page_no in range(1, PAGES_MAX + 2):
            expected = model.where(page_no, at_lsn)
            found = index.lookup(page_no, at_lsn=at_lsn)
            lsn = int(gathered.lsns[page_no - 1])
            assert bool(gathered.cut_off[page_no - 1]) == (expected is CUT_OFF)
            if expected is None or expected is CUT_OFF:
                assert found is expected
                assert lsn == 0
                assert gathered.segment[page_no - 1] == -1
                continue
            assert isinstance(found, FramePlace)
            assert found.lsn == lsn == expected
            read_back(found, page_no, tags[expected])
            segment_id, path = gathered.segments[gathered.segment[page_no - 1]]
            assert found == FramePlace(
                segment_id=segment_id, path=path, lsn=lsn, length=FRAME,
                offset=int(gathered.offsets[page_no - 1]),
                entry_offset=int(gathered.entry_offsets[page_no - 1]),
                entry_bytes=int(gathered.entry_bytes[page_no - 1]),
            )  # fmt: skip
        before = [(lsn, size) for lsn, size in model.commits if lsn <= at_lsn]
        commit = index.commit_at(at_lsn)
        assert (commit and (commit.lsn, commit.page_count)) == (before[-1] if before else None)
    for first_lsn in {1, *lsns[:2], *lsns[-2:]}:
        for last_lsn in {*lsns[:2], *lsns[-2:]}:
            check_newest(index, model, first_lsn, last_lsn)
    last = log.frames.last
    ends = sorted(model.ends)
    if ends:
        assert (last.last_lsn, last.footer) == (ends[-1], model.ends[ends[-1]])
    for lsn in {*ends[:3], *ends[-3:], *lsns[:3]}:
        assert await log.frames.footer_at(lsn) == model.ends.get(lsn)
    assert await log.frames.footer_at(log.durable_lsn + 1) is None


def check_newest(index, model: Model, first_lsn: int, last_lsn: int) -> None:
    part = Model(
        frames=[one for one in model.frames if first_lsn <= one[0] <= last_lsn],
        commits=[one for one in model.commits if first_lsn <= one[0] <= last_lsn],
    )
    expected = {
        page_no: lsn
        for page_no in range(1, PAGES_MAX + 1)
        if isinstance(lsn := part.where(page_no, last_lsn), int)
    }
    pages, lsns = index.newest(first_lsn, last_lsn)
    assert pages.tolist() == sorted(expected)
    assert dict(zip(pages.tolist(), lsns.tolist(), strict=True)) == expected
    lowest = index.lowest_page_count(first_lsn, last_lsn)
    for page_no in range(1, PAGES_MAX + 1):
        if page_no not in expected:
            cut = part.where(page_no, last_lsn) is CUT_OFF
            shrunk = any(size < page_no for _, size in shrinking(model, first_lsn, last_lsn))
            assert cut or lowest is None or lowest >= page_no
            assert lowest is not None or not shrunk
            assert not shrunk or lowest < page_no


def shrinking(model: Model, first_lsn: int, last_lsn: int) -> list[tuple[int, int]]:
    return [
        (lsn, size)
        for (_, before), (lsn, size) in zip(model.commits, model.commits[1:], strict=False)
        if size < before and first_lsn <= lsn <= last_lsn
    ]


def read_back(found: FramePlace, page_no: int, tag: int) -> None:
    with Path(found.path).open("rb") as file:
        entry = os.pread(file.fileno(), found.entry_bytes, found.entry_offset)
        frame = os.pread(file.fileno(), found.length, found.offset)
    header = check_entry(entry, offset=0)
    assert header.first_lsn <= found.lsn <= header.last_lsn
    assert int.from_bytes(frame[:4], "big") == page_no
    assert frame[24:] == page(tag)
    assert frame in entry


STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("append"),
            st.lists(
                st.tuples(
                    st.lists(st.integers(1, PAGES_MAX), min_size=1, max_size=9),
                    st.integers(1, PAGES_MAX),
                ),
                min_size=1,
                max_size=4,
            ),
            st.integers(1, 4),
        ),
        st.tuples(st.sampled_from(["seal", "restart", "remove", "check", "restart_unread"])),
    ),
    max_size=12,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(STEPS)
def test_it_finds_what_a_search_of_everything_finds(tmp_path_factory, steps):
    asyncio.run(follow(Place(tmp_path_factory.mktemp("index") / "wal"), steps))


async def follow(place: Place, steps) -> None:
    model = Model()
    writer = Writer(model)
    store = opened(place)
    log = await store.__aenter__()
    try:
        for step in steps:
            match step:
                case ("append", transactions, per_entry):
                    await writer.append(log, transactions, per_entry=per_entry)
                case ("seal",):
                    await log.seal()
                case ("restart",) | ("restart_unread",):
                    await settled(log)
                    await store.__aexit__(None, None, None)
                    store = opened(place)
                    log = await store.__aenter__()
                    if step == ("restart",):
                        await check(log, model)
                case ("remove",):
                    await settled(log)
                    for info in log.sealed_segments()[:1]:
                        place.catalog.checkpoint(info.segment_id)
                        assert await log.remove([info.segment_id]) == (info.segment_id,)
                        model.drop(info.first_lsn, info.last_lsn)
                case ("check",):
                    await check(log, model)
        await check(log, model)
    finally:
        await settled(log)
        await store.__aexit__(None, None, None)


async def test_a_segment_whose_sealing_the_manifest_refuses_at_a_start_is_read_all_the_same(
    place: Place,
) -> None:
    """Its trailer is durable, its row says open."""
    model = Model()
    writer = Writer(model)
    async with opened(place) as log:
        await writer.append(log, [([1, 2, 3], 3)])
        place.catalog.refusals.append(ManifestFull())
        with pytest.raises(ManifestFull):
            await log.seal()
    place.catalog.refusals.append(ManifestFull())
    async with opened(place) as log:
        assert log.health == "ok"
        await check(log, model)
        await writer.append(log, [([2], 3)])
        await log.seal()
        await check(log, model)
        assert [info.state for info in log.sealed_segments()] == ["sealed", "sealed"]


async def test_a_long_log_of_small_requests(place: Place) -> None:
    source = random.Random(11)
    model = Model()
    writer = Writer(model)
    async with opened(place) as log:
        for _ in range(300):
            pages = [source.randrange(1, PAGES_MAX + 1) for _ in range(source.randrange(1, 5))]
            await writer.append(log, [(pages, source.randrange(PAGES_MAX // 2, PAGES_MAX + 1))])
        await check(log, model)
        assert len(log.sealed_segments()) > 50
    async with opened(place) as log:
        await check(log, model)
        index = await log.frames.read()
        assert index.bytes < 600 * len(model.frames)


def test_a_lookup_looks_at_few_arrays() -> None:
    part = PagePart(segment_id=1, path=Path("1.wal"), first_lsn=1, page_size=PAGE)
    for number in range(2000):
        part.add(
            EntryBatch(
                offsets=np.array([64 + number * (80 + FRAME)]),
                entry_bytes=np.array([80 + FRAME]),
                counts=np.array([1]),
                page_nos=np.array([number % 7 + 1], dtype=np.uint32),
                commit_sizes=np.array([7], dtype=np.uint32),
            )
        )
    sizes = [len(level) for level in part._levels]
    assert sum(sizes) == 2000
    assert len(sizes) <= 11
    assert part.newest_lsn(3, at_lsn=2000) == 1999 - (1998 - 2) % 7
    assert part.bytes < 64 * 2000


async def test_what_was_not_read_yet_must_not_be_looked_up(place: Place) -> None:
    writer = Writer(Model())
    async with opened(place) as log:
        await writer.append(log, [([1, 2], 2)])
    async with opened(place) as log:
        with pytest.raises(InvariantViolation):
            log.frames.index.lookup(1, at_lsn=2)
        await writer.append(log, [([1], 2)])
        with pytest.raises(InvariantViolation):
            log.frames.index.newest(1, 3)
        await check(log, writer.model)


async def test_readers_wait_for_one_reading(place: Place) -> None:
    writer = Writer(Model())
    async with opened(place) as log:
        for _ in range(30):
            await writer.append(log, [([1, 2, 3], 3)])
    async with opened(place) as log:
        found = await asyncio.gather(*(log.frames.read() for _ in range(5)))
        assert all(one is found[0] for one in found)
        assert len(found[0]) == 90


async def test_damage_is_told_when_it_is_read(place: Place) -> None:
    writer = Writer(Model())
    async with opened(place) as log:
        for _ in range(30):
            await writer.append(log, [([1, 2, 3], 3)])
        await settled(log)
    damaged = place.files()[0]
    data = bytearray(damaged.read_bytes())
    data[700] ^= 1
    damaged.write_bytes(data)
    async with opened(place) as log:
        assert log.frames.last is not None
        with pytest.raises(CorruptWal):
            await log.frames.read()


async def test_a_damaged_end_stops_the_database(place: Place) -> None:
    writer = Writer(Model())
    async with opened(place) as log:
        await writer.append(log, [([1, 2, 3], 3)])
        await log.seal()
    damaged = place.files()[-1]
    data = bytearray(damaged.read_bytes())
    data[700] ^= 1
    damaged.write_bytes(data)
    async with opened(place) as log:
        assert log.health == "corrupt_wal"
        with pytest.raises(CorruptWal):
            await writer.append(log, [([1], 3)])


async def test_frames_behind_a_lost_segment_are_lost_too(place: Place) -> None:
    model = Model()
    writer = Writer(model)
    async with opened(place) as log:
        await writer.append(log, [([1, 2, 3], 3)])
        await log.seal()
        first = log.sealed_segments()[0]
        await writer.append(log, [([1], 3)])
        await log.seal()
        await writer.append(log, [([2], 3)])
    place.files()[1].unlink()
    async with opened(place) as log:
        assert (log.health, log.lost_from_lsn) == ("wal_lost", 4)
        assert log.lost_segment_ids == (4, 5)
        model.drop(4, 5)
        await check(log, model)
        await log.acknowledge_loss()
        assert log.frames.last.last_lsn == first.last_lsn
        await writer.append(log, [([3], 3)])
        assert model.frames[-1][0] > 1000  # above all that may have been given out
        await check(log, model)
    assert DB == 7
