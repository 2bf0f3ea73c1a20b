"""HotCache: LRU, pins, links, rebuild, damage."""

import asyncio
import hashlib
import os
import shutil
import tempfile
import threading
from pathlib import Path

import pytest

from app.core.base import failpoints
from app.core.base.errors import CorruptBlob, InvariantViolation
from app.core.base.events import Events
from app.core.base.tasks import BlockingPool
from app.core.coordination.quota import StorageQuota
from app.core.coordination.usage import UsageKind
from app.core.stores.local.hot_cache import HotCache, plan_eviction
from app.core.workers.cache_check import CacheCheck
from tests.helpers.fake_clock import FakeClock


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def blob(number: int, size: int = 100) -> bytes:
    return bytes([number]) * size


class Record:
    """A quota's account, and the events, as they come."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.events = Events(lambda name, level, fields: self.names.append(name))
        self.quota = StorageQuota(
            global_limit_bytes=10**9, drain_limit_bytes=0, clock=FakeClock(), events=Events()
        )
        self.account = self.quota.account(kind=UsageKind.HOT_CACHE, tenant=None)

    @property
    def charged(self) -> int:
        return self.quota.snapshot().files_by_kind["hot_cache"]


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.fixture
def pool():
    pool = BlockingPool("test", threads=3)
    yield pool
    pool.close_blocking()


@pytest.fixture
def record():
    return Record()


@pytest.fixture
def open_cache(tmp_path, pool, record):
    async def open_cache(limit: int = 300) -> HotCache:
        return await HotCache.open(
            tmp_path / "hot_cache",
            limit_bytes=limit,
            pool=pool,
            events=record.events,
            account=record.account,
        )

    return open_cache


def stage(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "staged" / sha(data)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


async def admit(cache: HotCache, tmp_path: Path, data: bytes, *, keep: bool = False) -> bool:
    source = stage(tmp_path, data)
    admitted = await cache.admit_link(source, sha256=sha(data), size_bytes=len(data))
    if not keep:
        source.unlink()
    return admitted


async def read(cache: HotCache, data: bytes) -> bytes | None:
    pinned = await cache.pin(sha(data))
    if pinned is None:
        return None
    with pinned:
        return pinned.read_blocking(0, pinned.size_bytes)


async def written(cache: HotCache, *parts: bytes, sha256: str, size_bytes: int) -> bool:
    """As a download does it; whether it is kept."""
    async with cache.writer(sha256=sha256, size_bytes=size_bytes) as writer:
        for part in parts:
            await writer.write(part)
        return await writer.commit()


def files_of(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "hot_cache").rglob("*") if p.is_file())


def test_plan_eviction():
    oldest_first = [("a", 10), ("b", 20), ("c", 30)]
    assert plan_eviction(oldest_first, 0) == []
    assert plan_eviction(oldest_first, -5) == []
    assert plan_eviction(oldest_first, 10) == ["a"]
    assert plan_eviction(oldest_first, 11) == ["a", "b"]
    assert plan_eviction(oldest_first, 60) == ["a", "b", "c"]
    assert plan_eviction(oldest_first, 61) is None
    assert plan_eviction([], 0) == []


async def test_link_is_the_same_inode_and_a_second_admission_changes_nothing(
    tmp_path, open_cache, record
):
    cache = await open_cache()
    data = blob(1)
    source = stage(tmp_path, data)
    assert await cache.admit_link(source, sha256=sha(data), size_bytes=100)
    name = sha(data)
    target = tmp_path / "hot_cache" / name[:2] / name[2:4] / name
    assert target.stat().st_ino == source.stat().st_ino
    assert await cache.admit_link(source, sha256=sha(data), size_bytes=100)
    assert target.stat().st_nlink == 2
    assert (cache.stats().entries, cache.stats().used_bytes, record.charged) == (1, 100, 100)
    assert await read(cache, data) == data
    assert (cache.stats().hits, cache.stats().misses) == (1, 0)
    assert await read(cache, blob(9)) is None
    assert (cache.stats().hits, cache.stats().misses) == (1, 1)


@pytest.fixture
def elsewhere(tmp_path):
    """A directory on another file system."""
    shared_memory = Path("/dev/shm")
    if not shared_memory.is_dir() or shared_memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system here")
    with tempfile.TemporaryDirectory(dir=shared_memory) as directory:
        yield Path(directory)


async def test_copies_where_links_cannot_cross(tmp_path, open_cache, elsewhere):
    cache = await open_cache()
    data = blob(1)
    source = elsewhere / "blob"
    source.write_bytes(data)
    assert await cache.admit_link(source, sha256=sha(data), size_bytes=100)
    source.write_bytes(b"")
    assert await read(cache, data) == data
    assert files_of(tmp_path) == [sha(data)]


async def test_evicts_least_recently_used_within_the_limit(tmp_path, open_cache, record):
    cache = await open_cache(300)
    for number in (1, 2, 3):
        assert await admit(cache, tmp_path, blob(number))
    assert await read(cache, blob(1)) == blob(1)  # 2 is the oldest use now
    assert await admit(cache, tmp_path, blob(4, 50))
    assert sha(blob(2)) not in cache
    assert files_of(tmp_path) == sorted([sha(blob(1)), sha(blob(3)), sha(blob(4, 50))])
    stats = cache.stats()
    assert (stats.used_bytes, stats.entries, stats.evictions) == (250, 3, 1)
    assert record.charged == 250
    assert not await admit(cache, tmp_path, blob(5, 301))  # never fits: nobody goes for it
    assert cache.stats().entries == 3


async def test_pinned_files_are_not_evicted(tmp_path, open_cache):
    cache = await open_cache(200)
    await admit(cache, tmp_path, blob(1))
    await admit(cache, tmp_path, blob(2))
    first = await cache.pin(sha(blob(1)))
    second = await cache.pin(sha(blob(1)))
    with first, second:
        assert await admit(cache, tmp_path, blob(3))
        assert sha(blob(1)) in cache
        assert sha(blob(2)) not in cache
        assert not await admit(cache, tmp_path, blob(4, 150))  # would need the pinned one
        assert await cache.evict(1000) == 100
        assert first.read_blocking(10, 5) == blob(1)[10:15]
        first.close()
        first.close()
        assert await cache.evict(1000) == 0  # the second pin holds
    assert await cache.evict(1000) == 100
    assert cache.stats().used_bytes == 0


async def test_files_linked_elsewhere_free_nothing_and_stay(tmp_path, open_cache, record):
    cache = await open_cache(400)
    await admit(cache, tmp_path, blob(1), keep=True)  # its source is still linked
    await admit(cache, tmp_path, blob(2))
    await admit(cache, tmp_path, blob(3))
    assert await cache.reclaim(150) == 200
    assert list(files_of(tmp_path)) == [sha(blob(1))]
    assert await cache.reclaim(1) == 0
    (tmp_path / "staged" / sha(blob(1))).unlink()
    assert await cache.reclaim(1) == 100
    assert record.charged == 0


async def test_for_its_own_limit_a_shared_file_goes_too(tmp_path, open_cache):
    cache = await open_cache(100)
    await admit(cache, tmp_path, blob(1), keep=True)
    await admit(cache, tmp_path, blob(2))
    assert files_of(tmp_path) == [sha(blob(2))]


async def test_reclaims_for_a_quota(tmp_path, open_cache, record):
    cache = await open_cache(300)
    record.quota.add_reclaimer(cache)
    for number in (1, 2, 3):
        await admit(cache, tmp_path, blob(number))
    record.quota.set_global_limit(310)
    with await record.quota.reserve(tenant="acme", job_id=None, size_bytes=110):
        assert cache.stats().used_bytes == 200
        record.quota.check()


async def test_drop_under_a_reader_is_harmless(tmp_path, open_cache, record):
    cache = await open_cache()
    await admit(cache, tmp_path, blob(1))
    pinned = await cache.pin(sha(blob(1)))
    with pinned:
        await cache.drop(sha(blob(1)))
        await cache.drop(sha(blob(1)))
        assert files_of(tmp_path) == []
        assert pinned.read_blocking(0, 100) == blob(1)
        assert await cache.pin(sha(blob(1))) is None
        assert await admit(cache, tmp_path, blob(1))  # a fresh copy, while the old is read
    assert await read(cache, blob(1)) == blob(1)
    assert cache.stats().pinned == 0
    assert record.charged == 100


async def test_damaged_size_is_dropped_and_a_miss(tmp_path, open_cache, record):
    cache = await open_cache()
    await admit(cache, tmp_path, blob(1))
    await admit(cache, tmp_path, blob(2))
    name = sha(blob(1))
    os.truncate(tmp_path / "hot_cache" / name[:2] / name[2:4] / name, 60)
    assert await read(cache, blob(1)) is None
    assert "hot_cache.dropped" in record.names
    assert await cache.pin(sha(blob(2)), expected_bytes=99) is None
    assert files_of(tmp_path) == []
    assert (cache.stats().hits, cache.stats().misses) == (0, 2)
    source = stage(tmp_path, blob(3))
    assert not await cache.admit_link(source, sha256=sha(blob(3)), size_bytes=99)
    assert files_of(tmp_path) == []
    assert record.charged == 0
    assert cache.stats().used_bytes == 0


async def test_read_past_the_end_is_corrupt_never_short(tmp_path, open_cache):
    cache = await open_cache()
    await admit(cache, tmp_path, blob(1))
    with await cache.pin(sha(blob(1))) as pinned, pytest.raises(CorruptBlob):
        pinned.read_blocking(50, 51)


async def test_vanished_files_are_misses(tmp_path, open_cache):
    cache = await open_cache()
    await admit(cache, tmp_path, blob(1))
    await admit(cache, tmp_path, blob(2))
    shutil.rmtree(tmp_path / "hot_cache")  # losing it costs nothing but time
    assert await read(cache, blob(1)) is None
    assert sha(blob(1)) not in cache
    assert await cache.evict(1000) == 0
    assert cache.stats().used_bytes == 0
    assert await admit(cache, tmp_path, blob(3))
    assert await read(cache, blob(3)) == blob(3)


async def test_too_many_open_files_says_nothing_of_the_file(tmp_path, open_cache, monkeypatch):
    cache = await open_cache()
    await admit(cache, tmp_path, blob(1))

    def refuse(sha256: str) -> int:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(cache._files, "open_file_blocking", refuse)
        assert await read(cache, blob(1)) is None
    assert await read(cache, blob(1)) == blob(1)
    assert cache.stats().pinned == 0


async def test_rebuilt_from_what_is_there(tmp_path, open_cache, record):
    cache = await open_cache(300)
    for number in (1, 2, 3):
        await admit(cache, tmp_path, blob(number))
        name = sha(blob(number))
        os.utime(tmp_path / "hot_cache" / name[:2] / name[2:4] / name, (number, number))
    (tmp_path / "hot_cache/incoming/7.part").write_bytes(b"half")
    stray = tmp_path / "hot_cache/00/00/not-a-hash"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"?")
    record.quota.forget(kind=UsageKind.HOT_CACHE, owner="")

    again = await open_cache(250)  # a smaller limit: the oldest goes
    assert again.stats().used_bytes == 200
    assert record.charged == 200
    assert files_of(tmp_path) == sorted([sha(blob(2)), sha(blob(3)), "not-a-hash"])
    assert await read(again, blob(2)) == blob(2)
    assert await admit(again, tmp_path, blob(4))
    assert sha(blob(3)) not in again


async def test_lowered_limit_evicts_but_for_pins(tmp_path, open_cache):
    cache = await open_cache(300)
    for number in (1, 2, 3):
        await admit(cache, tmp_path, blob(number))
    with await cache.pin(sha(blob(1))):
        await cache.set_limit(150)
        assert cache.stats().used_bytes == 100
        await cache.set_limit(50)
        assert cache.stats().used_bytes == 100
    await cache.set_limit(50)
    assert cache.stats().used_bytes == 0


async def test_streamed_blob_is_verified_before_it_is_kept(tmp_path, open_cache, record):
    cache = await open_cache(500)
    data = bytes(range(200))
    parts = [data[:70], data[70:71], data[71:]]
    assert await written(cache, *parts, sha256=sha(data), size_bytes=200)
    assert await read(cache, data) == data

    for wrong in ([data[:70], b"!", data[71:]], [data[:199]], [data, b"!"]):
        other = blob(3, 200)
        with pytest.raises(CorruptBlob):
            await written(cache, *wrong, sha256=sha(other), size_bytes=200)
    assert files_of(tmp_path) == [sha(data)]
    assert cache.stats().used_bytes == record.charged == 200
    assert not await written(cache, blob(1, 501), sha256=sha(blob(1, 501)),
                                        size_bytes=501)  # fmt: skip
    assert await written(cache, sha256=sha(b""), size_bytes=0)
    assert await read(cache, b"") == b""


async def test_writer_left_without_commit_leaves_nothing(tmp_path, open_cache, record):
    cache = await open_cache(100)

    async def download_in_part() -> None:
        async with cache.writer(sha256=sha(blob(1)), size_bytes=100) as writer:
            await writer.write(blob(1)[:50])
            # What is arriving is room taken, and no second one of its name comes in beside it.
            assert not await admit(cache, tmp_path, blob(1))
            assert not await admit(cache, tmp_path, blob(2))
            raise RuntimeError("download")

    with pytest.raises(RuntimeError, match="download"):
        await download_in_part()
    assert files_of(tmp_path) == []
    assert await admit(cache, tmp_path, blob(2))
    assert cache.stats().used_bytes == record.charged == 100


@pytest.mark.parametrize("step", ["hot_cache.before_rename", "hot_cache.before_unlink"])
async def test_failed_steps_leave_index_and_disk_in_agreement(
    tmp_path, open_cache, record, monkeypatch, step
):
    cache = await open_cache(200)
    await admit(cache, tmp_path, blob(1))
    await admit(cache, tmp_path, blob(2))

    def fail(name: str) -> None:
        if name == step:
            raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(failpoints, "fp", fail)
        admitted = await admit(cache, tmp_path, blob(3))
    on_disk = set(files_of(tmp_path))
    if step == "hot_cache.before_rename":
        assert not admitted
        assert on_disk == {sha(blob(2))}
    else:  # the file that could not be removed is no longer served, but still paid for
        assert admitted
        assert on_disk == {sha(blob(1)), sha(blob(2)), sha(blob(3))}
        assert sha(blob(1)) not in cache
        assert "hot_cache.not_removed" in record.names
    assert record.charged == len(on_disk) * 100
    again = await open_cache(200)
    assert again.stats().used_bytes <= 200
    assert record.charged == len(files_of(tmp_path)) * 100


async def test_cancelled_admission_is_whole(tmp_path, open_cache, record, monkeypatch):
    """The disk's step ends and the index knows of it, and then the caller is cancelled."""
    cache = await open_cache(100)
    await admit(cache, tmp_path, blob(1))
    loop = asyncio.get_running_loop()
    reached = asyncio.Event()
    task: asyncio.Task[bool]

    def cancel_here(name: str) -> None:
        if name == "hot_cache.before_rename":
            loop.call_soon_threadsafe(task.cancel)
            loop.call_soon_threadsafe(reached.set)

    monkeypatch.setattr(failpoints, "fp", cancel_here)
    source = stage(tmp_path, blob(2))
    async with asyncio.TaskGroup() as group:
        task = group.create_task(cache.admit_link(source, sha256=sha(blob(2)), size_bytes=100))
        await reached.wait()
    assert task.cancelled()
    assert files_of(tmp_path) == [sha(blob(2))]
    assert sha(blob(2)) in cache
    assert cache.stats().used_bytes == record.charged == 100


async def test_a_file_that_is_leaving_cannot_be_admitted_under_its_removal(
    tmp_path, open_cache, record, monkeypatch
):
    cache = await open_cache()
    await admit(cache, tmp_path, blob(1))
    loop = asyncio.get_running_loop()
    reached, go = asyncio.Event(), threading.Event()

    def hold(name: str) -> None:
        if name == "hot_cache.before_unlink":
            loop.call_soon_threadsafe(reached.set)
            assert go.wait(timeout=30)

    monkeypatch.setattr(failpoints, "fp", hold)
    async with asyncio.TaskGroup() as group:
        evicting = group.create_task(cache.evict(1))
        await reached.wait()
        admitted = await admit(cache, tmp_path, blob(1))
        found = await read(cache, blob(1))
        go.set()
    assert not admitted
    assert found is None
    assert evicting.result() == 100
    assert files_of(tmp_path) == []
    assert cache.stats().used_bytes == record.charged == 0


async def test_cancelled_pin_leaves_no_pin_and_no_descriptor(tmp_path, open_cache):
    cache = await open_cache()
    await admit(cache, tmp_path, blob(1))
    before = open_descriptors()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(cache.pin(sha(blob(1)))) for _ in range(20)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
    assert all(task.cancelled() for task in tasks)
    assert cache.stats().pinned == 0
    assert open_descriptors() == before


async def test_many_tasks_at_once_stay_within_the_limit(tmp_path, open_cache, record):
    cache = await open_cache(500)
    wrong: list[bytes] = []

    async def work(number: int) -> None:
        for round_ in range(6):
            data = blob((number * 3 + round_) % 12, 60)
            source = tmp_path / f"src-{number}-{round_}"
            source.write_bytes(data)
            await cache.admit_link(source, sha256=sha(data), size_bytes=60)
            source.unlink()
            assert cache.stats().used_bytes <= 500
            found = await read(cache, data)
            if found is not None and found != data:
                wrong.append(found)
            if round_ == 3:
                await cache.evict(60)
            if round_ == 4:
                await cache.drop(sha(data))

    async with asyncio.TaskGroup() as group:
        for number in range(12):
            group.create_task(work(number))
    assert wrong == []
    assert cache.stats().used_bytes == record.charged == 60 * len(files_of(tmp_path))
    assert cache.stats().pinned == 0
    record.quota.check()


async def test_names_are_hashes_only(tmp_path, open_cache):
    cache = await open_cache()
    for name in ("../../etc/passwd", "AB" * 32, ""):
        with pytest.raises(InvariantViolation):
            await cache.admit_link(tmp_path, sha256=name, size_bytes=1)


async def test_files_found_at_start_are_hashed_in_the_background(tmp_path, open_cache, record):
    good, bad, gone = blob(1), blob(2), blob(3)
    cache = await open_cache()
    for data in (good, bad, gone):
        await cache.admit_link(stage(tmp_path, data), sha256=sha(data), size_bytes=len(data))
    files = {sha(data): next((tmp_path / "hot_cache").rglob(sha(data))) for data in (bad, gone)}
    shutil.rmtree(tmp_path / "staged")
    files[sha(bad)].write_bytes(b"?" + bad[1:])  # of the same size: only its bytes tell

    cache = await open_cache()
    files[sha(gone)].unlink()
    check = CacheCheck(cache, events=record.events)
    assert await check.run_once() == 2
    assert cache.names() == (sha(good),)
    assert not files[sha(bad)].exists()
    assert (cache.stats().hits, cache.stats().misses, cache.stats().pinned) == (0, 0, 0)
    assert record.charged == len(good)
    assert "hot_cache.verified" in record.names
    assert await check.run_once() == 0
    assert await cache.verify(sha(bad))  # what is absent is no damage


async def test_a_download_makes_room_within_the_quota(tmp_path, open_cache, record):
    cache = await open_cache(limit=1000)
    for number in (1, 2):
        async with cache.writer(sha256=sha(blob(number)), size_bytes=100) as writer:
            await writer.write(blob(number))
            assert await writer.commit()
    record.quota.set_global_limit(250)
    async with cache.writer(sha256=sha(blob(3)), size_bytes=100) as writer:
        await writer.write(blob(3))
        assert await writer.commit()
    assert cache.names() == (sha(blob(2)), sha(blob(3)))
    record.quota.set_global_limit(99)
    async with cache.writer(sha256=sha(blob(4)), size_bytes=100) as writer:
        await writer.write(blob(4))
        assert not await writer.commit()  # the bytes were right, but there is no room for them
    assert record.charged <= 200


async def test_room_beside_what_is_to_stay(tmp_path, pool):
    cache = await HotCache.open(tmp_path / "hot", limit_bytes=100, pool=pool, events=Events())
    names = []
    for number in range(3):
        data = bytes([number]) * 30
        name = hashlib.sha256(data).hexdigest()
        async with cache.writer(sha256=name, size_bytes=30) as writer:
            await writer.write(data)
            assert await writer.commit()
        names.append(name)
    assert cache.has_room(10, beside=names)
    assert not cache.has_room(11, beside=names)
    assert cache.has_room(40, beside=names[1:])
    assert not cache.has_room(41, beside=names[1:])
    pinned = await cache.pin(names[0])
    assert not cache.has_room(40, beside=names[1:])
    pinned.close()
    assert cache.refresh(names[0])
    assert not cache.refresh("0" * 64)
    await cache.evict(30)
    assert names[1] not in cache  # the one refreshed was used last
