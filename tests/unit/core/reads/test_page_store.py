"""Pages from WAL, caches and remote store, against what they should be."""

import asyncio
import contextlib
import errno
import os
import random
import threading

import pytest
from pyroaring import BitMap

from app.core.base.errors import CorruptBlob, CorruptWal, GenerationExpired, NotFound, NotReady
from app.core.base.errors import RemoteUnavailable as Unavailable
from app.core.reads import wal_pages
from app.core.reads.page_cache import FetchOptions
from app.core.stores.manifest import ops
from tests.helpers.paged import PagedDatabase, made_page, paged_database
from tests.helpers.wait import wait_until

PAGE, CHUNK = 512, 65536
PER_CHUNK = CHUNK // PAGE


@pytest.fixture
async def db(tmp_path):
    async with paged_database(
        tmp_path, page_size=PAGE, chunk_bytes=CHUNK, small_blob_bytes=0
    ) as db:
        yield db


def page(seed):
    return made_page(seed, PAGE)


def changed(data, at=100):
    return data[:at] + b"changed!" + data[at + 8 :]


def by_chunk(pages):
    found = {}
    for number, data in pages.items():
        found.setdefault((number - 1) // PER_CHUNK, {})[number] = data
    return found


async def newest(db: PagedDatabase):
    with await db.store.point(db.db_id) as point:
        assert point.size_bytes == len(db.expected())
        return await db.read_all(point)


async def at(db: PagedDatabase, generation):
    with await db.store.point(db.db_id, generation=generation) as point:
        return await db.read_all(point)


async def tier_of(db: PagedDatabase, page_no, options=None, **where):
    with await db.store.point(db.db_id, **where) as point:
        read = await db.store.read_page(point, page_no, options or FetchOptions())
    if not where:
        assert read.data == db.content.get(page_no, bytes(PAGE))
    return read.tier


@pytest.mark.parametrize("patched", [True, False])
async def test_delta_layering_read_path(db, patched):
    """A base, three deltas, a merged one, a rewrite: each generation reads as it was, one page
    at a time and in bulk, from local files and from the remote store alone.
    """
    source = random.Random(7)
    await db.publish(rewrites=by_chunk({n: page(n) for n in range(1, 300)}))
    for generation in (2, 3, 4):
        numbers = source.sample(range(1, 330), 40)
        pages = {
            n: changed(db.content[n], at=8 * generation) if n in db.content else page(1000 + n)
            for n in sorted(numbers)
        }
        await db.publish(deltas=by_chunk(pages), patched=patched)
    with db.manifest.read() as view:
        deltas = view.delta_rows_of(db.db_id, 0)
    written = {n for row in deltas for n in BitMap.deserialize(row.pages)}
    merged = {n: db.content[n] for n in sorted(written)}
    await db.publish(
        deltas={0: merged},
        patched=patched,
        superseded=tuple(
            ops.SupersedeChunkDelta(
                db_id=db.db_id, chunk_id=0, generation=row.generation, superseded_at=5
            )
            for row in deltas
        ),
    )
    rewritten = {n: page(5000 + n) for n in range(PER_CHUNK + 1, 2 * PER_CHUNK + 1)}
    with db.manifest.read() as view:
        rows = [*view.chunk_rows_of(db.db_id, 1), *view.delta_rows_of(db.db_id, 1)]
    await db.publish(
        rewrites={1: rewritten},
        superseded=tuple(
            (ops.SupersedeChunk if hasattr(row, "visible_last") else ops.SupersedeChunkDelta)(
                db_id=db.db_id, chunk_id=1, generation=row.generation, superseded_at=6
            )
            for row in rows
        ),
    )
    assert db.generation == 6
    for _ in ("local", "remote"):
        for generation in range(1, 7):
            count, pages = db.history[generation]
            assert await at(db, generation) == db.expected(generation)
            with await db.store.point(db.db_id, generation=generation) as point:
                assert point.page_count == count
                for number in source.sample(range(1, count + 1), 60):
                    read = await db.store.read_page(point, number)
                    assert read.data == pages.get(number, bytes(PAGE))
                    assert read.generation == generation
        await db.hot_cache.set_limit(0)
        db.cache.set_limit(0)
    assert await newest(db) == db.expected()


async def test_an_empty_database_has_no_pages(db):
    with await db.store.point(db.db_id) as point:
        assert (point.lsn, point.page_count, point.generation) == (0, 0, 0)


async def test_the_wal_is_newer_than_what_is_published(db):
    await db.publish(rewrites={0: {n: page(n) for n in range(1, 20)}}, last_lsn=0)
    await db.append({3: page(103), 21: page(121)})
    await db.append({3: page(203)}, page_count=21)
    assert await newest(db) == db.expected()
    assert await tier_of(db, 3) == "wal"
    assert await tier_of(db, 4) == "local"
    assert await tier_of(db, 20) == "page_cache"  # never written: zeros
    assert await at(db, 1) == db.expected(1)


@pytest.mark.parametrize("page_size", [512, 4096])
async def test_any_log_reads_as_what_was_written(tmp_path, page_size):
    """Bulk reads gather frames of many entries and segments; single reads find the same."""
    source = random.Random(page_size)
    chunk_bytes = max(CHUNK, page_size)
    async with paged_database(tmp_path, page_size=page_size, chunk_bytes=chunk_bytes) as db:
        for _ in range(60):
            count = source.choice([0, 0, 0, 20, 90]) or None
            top = count or max(db.page_count, source.randrange(1, 120))
            numbers = source.sample(range(1, top + 1), min(top, source.randrange(1, 30)))
            await db.append(
                {n: made_page(source.randrange(50), page_size) for n in numbers}, page_count=top
            )
            if source.random() < 0.2:
                await db.wal.log(db.db_id).seal()
            if source.random() < 0.3:
                assert await newest(db) == db.expected()
        with await db.store.point(db.db_id) as point:
            for number in range(1, point.page_count + 1):
                read = await db.store.read_page(point, number)
                assert read.data == db.content.get(number, bytes(page_size))


async def test_a_point_stays_as_it_was(db):
    await db.append({n: page(n) for n in range(1, 40)})
    before = db.expected()
    with await db.store.point(db.db_id) as point:
        await db.append({5: page(900), 50: page(901)})
        await db.append({1: page(902)}, page_count=3)
        assert await db.read_all(point) == before
        assert (await db.store.read_page(point, 5)).data == page(5)
    assert await newest(db) == db.expected()


async def test_pages_that_were_cut_off_do_not_come_back(db):
    await db.publish(rewrites={0: {n: page(n) for n in range(1, 41)}}, last_lsn=0)
    await db.append({1: page(101)}, page_count=10)
    await db.append({1: page(102), 30: page(130)}, page_count=35)
    assert await newest(db) == db.expected()
    assert db.expected()[19 * PAGE : 20 * PAGE] == bytes(PAGE)
    assert await tier_of(db, 20) == "wal"
    assert await tier_of(db, 5) == "local"


async def test_pages_cut_off_by_a_publication_do_not_come_back(db):
    """The base still holds them, the generation does not; the log that cut them off is gone."""
    await db.publish(rewrites={0: {n: page(n) for n in range(1, 41)}}, last_lsn=0)
    await db.publish(deltas={0: {1: page(101)}}, page_count=10, last_lsn=0)
    for number in range(11, 41):
        db.content.pop(number, None)
    await db.append({1: page(102), 30: page(130)}, page_count=35)
    assert await newest(db) == db.expected()
    assert db.expected()[19 * PAGE : 20 * PAGE] == bytes(PAGE)
    assert await tier_of(db, 20) == "page_cache"
    assert await tier_of(db, 5) == "local"


async def test_wal_that_is_published_already_is_not_looked_at(db):
    """A segment that some reader holds may outlive newer ones: it is not the newest then."""
    await db.append({1: page(1), 2: page(2), 3: page(3)})
    await db.append({1: page(4)}, page_count=1)
    await db.publish(
        rewrites={0: {n: page(10 + n) for n in range(1, 6)}}, page_count=5, last_lsn=db.lsn
    )
    assert await newest(db) == db.expected()
    assert await tier_of(db, 1) == "local"
    await db.append({2: page(22)}, page_count=5)
    assert await newest(db) == db.expected()
    assert await tier_of(db, 1) == "page_cache"
    assert await tier_of(db, 3) == "page_cache"


async def test_a_generation_and_the_log_are_held_until_the_point_is_released(db):
    await db.append({1: page(1)})
    await db.publish(rewrites={0: {1: page(1)}}, last_lsn=db.lsn)
    await db.append({1: page(2)}, page_count=1)
    log = db.wal.log(db.db_id)
    point = await db.store.point(db.db_id)
    assert db.pins.generations(db.db_id) == {1}
    assert sum(segment.pins for segment in log._segments.values()) > 0
    point.release()
    point.release()
    assert not db.pins.is_pinned(db.db_id)
    assert sum(segment.pins for segment in log._segments.values()) == 0


async def test_generations_that_are_gone_or_never_were(db):
    await db.publish(rewrites={0: {1: page(1)}})
    await db.publish(deltas={0: {1: page(2)}})
    await db.manifest.commit(
        ops.ManifestBatch(ops=(ops.DeleteGeneration(db_id=db.db_id, generation=1),), reason="test")
    )
    with pytest.raises(GenerationExpired):
        await db.store.point(db.db_id, generation=1)
    for number in (0, 3):
        with pytest.raises(NotFound):
            await db.store.point(db.db_id, generation=number)


# --- tiers, requests, caches


async def test_a_cold_page_takes_two_ranged_reads_and_its_neighbours_none(tmp_path):
    async with paged_database(
        tmp_path, page_size=4096, chunk_bytes=1 << 20, small_blob_bytes=0
    ) as db:
        await db.publish(rewrites={0: {n: made_page(n, 4096) for n in range(1, 257)}}, local=False)
        assert await tier_of(db, 100) == "remote"
        assert len(db.remote.reads) == 2
        assert sum(length for _, _, length in db.remote.reads) < 100_000
        assert await tier_of(db, 100) == "page_cache"
        assert await tier_of(db, 101) == "page_cache"
        assert len(db.remote.reads) == 2
        assert await tier_of(db, 200) == "remote"
        assert len(db.remote.reads) == 3


async def test_a_kept_directory_saves_a_read_until_it_is_damaged(tmp_path):
    async with paged_database(
        tmp_path, page_size=4096, chunk_bytes=1 << 20, small_blob_bytes=1 << 14,
        directory_cache_bytes=1 << 20, page_cache_bytes=0,
    ) as db:  # fmt: skip
        content = {n: made_page(n, 4096) for n in range(1, 257)}
        await db.publish(rewrites={0: content}, local=False)
        await db.publish(deltas={0: {7: changed(content[7])}}, local=False)
        assert await tier_of(db, 100) == "remote"
        assert await tier_of(db, 7) == "remote"
        assert len(db.kept) == 2

        async def cold_reads(page_no: int) -> int:
            db.store._blobs._directories._directories.clear()
            db.store._blobs.reader.small_blobs._blobs.clear()
            before = len(db.remote.reads)
            assert await tier_of(db, page_no) == "remote"
            return len(db.remote.reads) - before

        assert await cold_reads(100) == 1, "its block"
        assert await cold_reads(7) == 2, "the delta, and the base's block"
        for path in (db.work / "directories").rglob("*"):
            if path.is_file():
                path.write_bytes(flip(path.read_bytes(), 30))
        assert await cold_reads(100) == 2
        assert await newest(db) == db.expected()
        assert await cold_reads(100) == 1, "kept anew"


async def test_the_directory_of_another_blob_is_not_taken(tmp_path):
    async with paged_database(
        tmp_path, page_size=PAGE, chunk_bytes=CHUNK, directory_cache_bytes=1 << 20
    ) as db:
        await db.publish(
            rewrites={
                0: {n: page(n) for n in range(1, 129)},
                1: {n: page(n) for n in range(129, 257)},
            }
        )
        assert await newest(db) == db.expected()
        one, other = sorted(path for path in (db.work / "directories").rglob("*") if path.is_file())
        one.write_bytes(other.read_bytes())
        db.store._blobs._directories._directories.clear()
        assert await newest(db) == db.expected()
        assert one.read_bytes() != other.read_bytes()


async def test_reading_on_is_read_ahead(tmp_path):
    async with paged_database(tmp_path, page_size=4096, chunk_bytes=1 << 22) as db:
        await db.publish(rewrites={0: {n: made_page(n, 4096) for n in range(1, 1025)}}, local=False)
        for number in range(1, 1025):
            await tier_of(db, number)
        assert len(db.remote.reads) < 40, "64 blocks of 64 KiB, most of them fetched along"


async def test_many_who_want_one_page_share_its_fetch(db):
    await db.publish(rewrites={0: {n: page(n) for n in range(1, 129)}}, local=False)
    with await db.store.point(db.db_id) as point:
        reads = await asyncio.gather(*(db.store.read_page(point, 5) for _ in range(20)))
    assert {read.data for read in reads} == {page(5)}
    assert len(db.remote.reads) == 2


async def test_bypass_leaves_the_cache_alone_and_pin_keeps_the_page(db):
    await db.publish(rewrites={0: {n: page(n) for n in range(1, 129)}})
    assert await tier_of(db, 5, FetchOptions(bypass=True)) == "local"
    assert await tier_of(db, 5, FetchOptions(populate=False)) == "local"
    assert len(db.cache) == 0
    with await db.store.point(db.db_id) as point:
        await db.store.read_page(point, 5, FetchOptions(pin=True))
        await db.store.read_page(point, 5, FetchOptions(pin=True))
        assert db.cache.stats().pinned == 1
        db.cache.set_limit(0)
        assert len(db.cache) == 1
        assert (await db.store.read_page(point, 5)).tier == "page_cache"
    assert len(db.cache) == 0


async def test_bulk_reads_go_past_the_page_cache(db):
    await db.publish(rewrites={0: {n: page(n) for n in range(1, 129)}})
    assert await newest(db) == db.expected()
    stats = db.cache.stats()
    assert (stats.entries, stats.hits, stats.misses) == (0, 0, 0)


async def test_a_range_reads_only_its_blocks(tmp_path):
    async with paged_database(tmp_path, page_size=4096, chunk_bytes=1 << 22, codec="none") as db:
        await db.publish(rewrites={0: {n: made_page(n, 4096) for n in range(1, 1025)}}, local=False)
        with await db.store.point(db.db_id) as point:
            wanted = db.expected()[300 * 4096 : 310 * 4096]
            assert await db.read_all(point, first=301, last=310) == wanted
        directory, *blocks = db.remote.reads
        assert sum(length for _, _, length in blocks) <= 2 * 65536
        del directory


async def test_the_lock_byte_page_is_zeros(tmp_path, monkeypatch):
    monkeypatch.setattr("app.core.reads.page_store.lock_byte_page", lambda size: 9)
    monkeypatch.setattr("app.core.reads.page_windows.lock_byte_page", lambda size: 9)
    async with paged_database(tmp_path) as db:
        await db.publish(rewrites={0: {n: page(n) for n in range(1, 20)}}, last_lsn=0)
        await db.append({9: page(90)}, page_count=19)
        db.content.pop(9)
        assert await newest(db) == db.expected()
        with await db.store.point(db.db_id) as point:
            assert (await db.store.read_page(point, 9)).data == bytes(PAGE)


@pytest.mark.parametrize("window_bytes", [PAGE, 3 * PAGE, 1 << 24])
async def test_runs_are_as_long_as_asked_for(db, window_bytes):
    await db.publish(rewrites=by_chunk({n: page(n) for n in range(1, 40)}), last_lsn=0)
    await db.append({3: page(30), 39: page(390)}, page_count=41)
    pieces = []
    with await db.store.point(db.db_id) as point:
        async for run in db.store.iter_pages(point, 1, 41, window_bytes=window_bytes):
            assert len(run.data) <= max(PAGE, window_bytes)
            pieces.append(bytes(run.data))
    assert b"".join(pieces) == db.expected()


async def test_an_iterator_that_is_left_lets_go_of_its_files(db):
    await db.publish(rewrites=by_chunk({n: page(n) for n in range(1, 1000)}))
    with await db.store.point(db.db_id) as point:
        runs = db.store.iter_pages(point, 1, 999)
        await anext(runs)
        assert db.hot_cache.stats().pinned > 0
        await runs.aclose()
        # A directory that was being fetched is let go of once its read has ended.
        await wait_until(lambda: db.hot_cache.stats().pinned == 0)
        async for _ in db.store.iter_pages(point, 1, 999):
            assert db.hot_cache.stats().pinned <= 1 + 4, "no more than what is read ahead"
    assert db.hot_cache.stats().pinned == 0


# --- damage


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]


async def test_a_damaged_local_file_is_dropped_and_read_remotely(db):
    await db.publish(rewrites={0: {n: page(n) for n in range(1, 129)}})
    with db.manifest.read() as view:
        blob = view.chunk_rows_of(db.db_id, 0)[0].blob
    (path,) = [one for one in (db.work / "hot").rglob("*") if one.is_file()]
    for at_byte in (70, blob.bytes - 150):  # a block, the directory
        await db.hot_cache.drop(blob.sha256.hex())
        path.write_bytes(flip(db.remote.objects[blob.key], at_byte))
        whole = db.work / "copy"
        whole.write_bytes(path.read_bytes())
        path.unlink()
        assert await db.hot_cache.admit_link(whole, sha256=blob.sha256.hex(), size_bytes=blob.bytes)
        db.store._blobs._directories._directories.clear()
        assert await newest(db) == db.expected()
        assert blob.sha256.hex() not in db.hot_cache
        whole.unlink()
    assert [fields["tier"] for name, fields in db.told if name == "read.damaged"] == ["local"] * 2


async def test_every_flipped_byte_of_a_remote_blob_is_found(db):
    await db.publish(rewrites={0: {n: page(n) for n in range(1, 33)}}, local=False)
    await db.publish(deltas={0: {n: changed(page(n)) for n in (3, 7, 30)}}, local=False)
    rows = {}
    with db.manifest.read() as view:
        for row in (*view.chunk_rows_of(db.db_id, 0), *view.delta_rows_of(db.db_id, 0)):
            rows[row.blob.key] = row
    for key, row in rows.items():
        intact = db.remote.objects[key]
        for at_byte in range(0, len(intact), 11):
            db.remote.objects[key] = flip(intact, at_byte)
            db.store._blobs._directories._directories.clear()
            db.store._blobs._directories.used_bytes = 0
            # Header and digests are not for readers.
            digests_at = row.directory_offset - 16 * row.count
            if at_byte < 64 or digests_at <= at_byte < row.directory_offset:
                assert await newest(db) == db.expected()
            else:
                with pytest.raises(CorruptBlob) as refused:
                    await newest(db)
                assert refused.value.fields["key"] == key
        db.remote.objects[key] = intact
    assert await newest(db) == db.expected()


async def test_a_small_blob_takes_one_read_and_is_fetched_again_if_damaged(tmp_path):
    async with paged_database(tmp_path, page_size=PAGE, chunk_bytes=CHUNK) as db:
        await db.publish(rewrites={0: {n: page(n) for n in range(1, 129)}}, local=False)
        await db.publish(deltas={0: {n: changed(page(n)) for n in (3, 7)}}, local=False)
        flips = iter([True, False, False])
        db.remote.on_read = lambda _key, _first, data: (
            flip(data, len(data) - 9) if next(flips) else data
        )
        assert await tier_of(db, 3) == "remote"
        assert len(db.remote.reads) == 3, "the delta twice, its base once"
        assert await newest(db) == db.expected()
        assert len(db.remote.reads) == 3
        db.store._blobs.reader.small_blobs._limit_bytes = 0
        small = db.store._blobs.reader.small_blobs
        with db.manifest.read() as view:
            (delta,) = view.delta_rows_of(db.db_id, 0)
        small.put(delta.blob, b"x")
        assert (small.get(delta.blob), small._used_bytes) == (None, 0)


async def test_damage_on_the_way_is_fetched_once_more(db):
    await db.publish(rewrites={0: {n: page(n) for n in range(1, 129)}}, local=False)
    flips = iter([True, False, True, False])
    db.remote.on_read = lambda _key, _first, data: flip(data, 10) if next(flips) else data
    assert await tier_of(db, 5) == "remote"
    assert next(flips, None) is None


async def test_an_object_in_anothers_place_is_noticed(db):
    await db.publish(
        rewrites={0: {n: page(n) for n in range(1, 129)}, 1: {n: page(n) for n in range(129, 257)}},
        local=False,
    )
    with db.manifest.read() as view:
        one, other = (view.chunk_rows_of(db.db_id, chunk)[0] for chunk in (0, 1))
    db.remote.objects[one.blob.key] = db.remote.objects[other.blob.key]
    with pytest.raises(CorruptBlob):
        await newest(db)
    with pytest.raises(CorruptBlob):
        await tier_of(db, 1)


async def test_a_missing_object_is_corrupt_and_an_outage_is_not(db):
    await db.publish(rewrites={0: {n: page(n) for n in range(1, 129)}}, local=False)
    db.remote.unavailable = True
    with pytest.raises(Unavailable):
        await tier_of(db, 1)
    db.remote.unavailable = False
    kept = dict(db.remote.objects)
    db.remote.objects.clear()
    with pytest.raises(CorruptBlob):
        await tier_of(db, 1)
    db.remote.objects.update(kept)
    assert await tier_of(db, 1) == "remote"


async def test_every_flipped_byte_of_the_wal_is_found(db):
    await db.append({n: page(n) for n in (1, 2, 3)})
    await db.append({2: page(12)}, page_count=3)
    expected = db.expected()
    (path,) = (db.work / "wal").rglob("*.wal")
    intact = path.read_bytes()
    for at_byte in range(64, len(intact), 23):
        path.write_bytes(flip(intact, at_byte))
        # With nothing known of the entries, and with all of it.
        db.store._wal_reader._checksums.clear()
        for _ in range(2):
            with contextlib.suppress(CorruptWal):
                assert await newest(db) == expected
            path.write_bytes(intact)
            assert await newest(db) == expected
            path.write_bytes(flip(intact, at_byte))
    path.write_bytes(intact)
    db.store._wal_reader._checksums.clear()
    path.write_bytes(flip(intact, len(intact) - 200))
    with pytest.raises(CorruptWal):
        await tier_of(db, 2)
    path.write_bytes(intact)


async def test_an_entry_read_whole_is_read_once_and_checked(db):
    await db.append({n: page(n) for n in (9, 2, 5)})  # not in page order
    await db.append({n: page(n) for n in (3, 4)})
    (path,) = (db.work / "wal").rglob("*.wal")
    intact = path.read_bytes()
    assert await newest(db) == db.expected()
    assert not db.store._wal_reader._checksums  # nothing to remember: it is checked each time
    for at_byte in range(64, len(intact), 23):
        path.write_bytes(flip(intact, at_byte))
        with pytest.raises(CorruptWal):
            await newest(db)
    path.write_bytes(intact)
    assert await newest(db) == db.expected()


@pytest.mark.parametrize("want", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
async def test_a_process_out_of_means_is_no_damage(db, monkeypatch, want):
    await db.append({n: page(n) for n in (1, 2, 3)})
    await db.append({2: page(12)})

    def refuse(*_):
        raise OSError(want, os.strerror(want))

    with monkeypatch.context() as patched:
        patched.setattr(wal_pages.os, "open", refuse)
        for read in (newest(db), tier_of(db, 1)):
            with pytest.raises(NotReady):
                await read
    assert not [name for name, _ in db.told if name == "read.damaged"]
    assert await newest(db) == db.expected()


async def test_what_is_remembered_of_entries_may_be_forgotten_while_others_are_checked(db):
    await db.append({n: page(n) for n in (1, 2, 3)})
    await db.append({2: page(12)})  # of the first entry only a part is wanted from now on
    await db.append({n: page(n) for n in (4, 5, 6)})
    await db.append({5: page(15)})
    reader = db.store._wal_reader
    reader._kept_bytes = 300  # of one entry
    assert await tier_of(db, 1) == "wal"
    assert len(reader._checksums) == 1
    assert await newest(db) == db.expected()


async def test_what_is_remembered_of_entries_is_counted_once(db, monkeypatch):
    await db.append({n: page(n) for n in (1, 2, 3)})
    await db.append({2: page(12)})
    reader, at_once = db.store._wal_reader, threading.Barrier(2, timeout=5)
    check = wal_pages._check_entries_blocking

    def check_at_once(*args):
        at_once.wait()
        return check(*args)

    monkeypatch.setattr(wal_pages, "_check_entries_blocking", check_at_once)
    await asyncio.gather(newest(db), tier_of(db, 1))
    held = [checksums.nbytes + 256 for checksums in reader._checksums.values()]
    assert held
    assert reader._used_bytes == sum(held)


@pytest.mark.parametrize(
    ("small_blob_bytes", "gets", "at_once"),
    [(0, 4, [2, 2]), (1 << 20, 2, [2])],
    ids=["large blobs: directories, then blocks", "small blobs: each whole"],
)
async def test_a_cold_patch_takes_two_round_trips(tmp_path, small_blob_bytes, gets, at_once):
    async with paged_database(
        tmp_path, page_size=PAGE, chunk_bytes=CHUNK, small_blob_bytes=small_blob_bytes
    ) as db:
        await db.publish(rewrites={0: {n: page(n) for n in range(1, 129)}}, local=False)
        await db.publish(deltas={0: {7: changed(page(7))}}, local=False)
        rounds: list[int] = []
        get_blob, waiting = db.remote.get_blob, 0

        async def get_with_others(*args, **kwargs):
            """Answers when whoever asks at the same time has asked, too."""
            nonlocal waiting
            waiting += 1
            for _ in range(50):
                await asyncio.sleep(0)
            if waiting:
                rounds.append(waiting)
                waiting = 0
            return await get_blob(*args, **kwargs)

        db.remote.get_blob = get_with_others
        assert await tier_of(db, 7) == "remote"
        assert len(db.remote.reads) == gets
        assert rounds == at_once


async def test_a_base_that_is_away_does_not_matter_to_pages_that_are_whole(db):
    await db.publish(rewrites={0: {n: page(n) for n in range(1, 100)}}, local=False)
    await db.publish(deltas={0: {7: changed(page(7)), 110: page(1000)}}, local=False)
    with db.manifest.read() as view:
        (base,) = view.chunk_rows_of(db.db_id, 0)
    del db.remote.objects[base.blob.key]
    assert await tier_of(db, 110) == "remote"
    with pytest.raises(CorruptBlob):
        await tier_of(db, 7)


async def test_a_patch_whose_base_is_another_one_is_refused(db):
    await db.publish(rewrites={0: {n: page(n) for n in range(1, 33)}}, local=False)
    await db.publish(deltas={0: {3: changed(page(3))}}, local=False)
    await db.publish(
        rewrites={0: {n: page(100 + n) for n in range(1, 33)}},
        superseded=(ops.SupersedeChunk(db_id=db.db_id, chunk_id=0, generation=1, superseded_at=3),),
        local=False,
    )
    with db.manifest.read() as view:
        bases = view.chunk_rows_of(db.db_id, 0)
        (delta,) = view.delta_rows_of(db.db_id, 0)
    assert delta.base_key == bases[0].blob.key
    db.remote.objects[bases[0].blob.key] = db.remote.objects[bases[1].blob.key]
    with pytest.raises(CorruptBlob):
        await tier_of(db, 3)


async def test_a_window_reads_its_base_once_however_many_deltas_patch_it(db):
    await db.publish(rewrites={0: {n: page(n) for n in range(1, 129)}})
    for generation in (2, 3, 4):
        await db.publish(
            deltas={0: {n: changed(db.content[n], at=8 * generation) for n in (generation, 50)}}
        )
    assert await newest(db) == db.expected()  # directories are known from here on
    db.told.clear()
    assert await newest(db) == db.expected()
    served = [fields for name, fields in db.told if name == "read.served"]
    with db.manifest.read() as view:
        rows = [*view.chunk_rows_of(db.db_id, 0), *view.delta_rows_of(db.db_id, 0)]
    assert [fields["tier"] for fields in served] == ["local"]
    assert served[0]["bytes"] < sum(row.blob.bytes for row in rows), "each block once"


@pytest.mark.parametrize("share", [0.2, 0.8])
@pytest.mark.parametrize("patched", [True, False])
async def test_windows_of_which_deltas_hold_little_or_much(db, share, patched):
    source = random.Random(3)
    await db.publish(rewrites={0: {n: page(n) for n in range(1, 100)}}, page_count=120, last_lsn=0)
    numbers = source.sample(range(1, 121), int(120 * share))
    await db.publish(
        deltas={
            0: {
                n: changed(db.content[n]) if n in db.content and n % 3 else page(1000 + n)
                for n in sorted(numbers)
            }
        },
        patched=patched,
        last_lsn=0,
    )
    assert await newest(db) == db.expected()
    await db.append({5: page(7000), 110: page(7001)})
    assert await newest(db) == db.expected()


async def test_patches_against_an_older_base_read_that_one(db):
    await db.publish(rewrites={0: {n: page(n) for n in range(1, 129)}})
    older = dict(db.bases)
    await db.publish(
        rewrites={0: {n: page(500 + n) for n in range(1, 129)}},
        superseded=(ops.SupersedeChunk(db_id=db.db_id, chunk_id=0, generation=1, superseded_at=2),),
    )
    db.bases.update(older)
    await db.publish(deltas={0: {n: changed(page(n)) for n in range(1, 129, 2)}})
    assert await newest(db) == db.expected()
