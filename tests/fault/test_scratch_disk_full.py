"""Fault row 3: the disk fills while a checkpoint stages. On a small tmpfs of its own."""

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.core.base.errors import DiskFull
from app.core.base.events import Events
from app.core.base.tasks import BlockingPool
from app.core.coordination.quota import StorageQuota
from app.core.stores.local.hot_cache import HotCache
from app.core.stores.local.scratch import ScratchStore
from tests.helpers.fake_clock import FakeClock
from tests.helpers.small_disk import mounted_tmpfs

MIB = 1 << 20
JOB = "01J0000000000000000000000A"


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    with mounted_tmpfs(tmp_path / "disk", size_mib=4) as disk:
        yield disk


def names_in(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


@pytest.fixture
def pool():
    pool = BlockingPool("test", threads=2)
    yield pool
    pool.close_blocking()


def filler(path: Path, *, leave_bytes: int) -> Path:
    """Takes room until about `leave_bytes` are left, as a neighbour on the same disk would."""
    status = os.statvfs(path)
    target = path / "neighbour"
    target.write_bytes(b"\xff" * (status.f_bavail * status.f_frsize - leave_bytes))
    return target


async def stage(
    quota: StorageQuota, scratch: ScratchStore, pool: BlockingPool, *, chunks: int, room_bytes: int
) -> int:
    """A checkpoint's staging in short: reserve, make the directory, write; clean up in any case."""
    with await quota.reserve(tenant="acme", job_id=JOB, size_bytes=chunks * MIB):
        try:
            directory = await scratch.create(JOB, room_bytes=room_bytes)
            written = 0
            for number in range(chunks):
                pieces = (bytes([number + 1]) * 65536 for _ in range(16))
                written += await pool.run(directory.write_blocking, f"chunk-{number}", pieces)
            return written
        finally:
            await scratch.remove(JOB)


async def test_disk_full_while_staging_leaves_nothing(small_disk, pool):
    clock = FakeClock()
    quota = StorageQuota(
        global_limit_bytes=64 * MIB, drain_limit_bytes=0, clock=clock, events=Events()
    )
    root = small_disk / "checkpoint_scratch"
    scratch = ScratchStore(root, pool=pool, clock=clock)

    def nothing_left() -> None:
        assert names_in(root) == []
        assert quota.snapshot().global_used_bytes == 0
        assert quota.holders() == ()
        quota.check()

    # Known beforehand: refused before a directory is made.
    with pytest.raises(DiskFull) as refused:
        await stage(quota, scratch, pool, chunks=5, room_bytes=5 * MIB)
    assert refused.value.fields["requested_bytes"] == 5 * MIB
    assert refused.value.fields["free_bytes"] <= 4 * MIB
    nothing_left()

    # Found out while writing: the neighbour was faster.
    neighbour = filler(small_disk, leave_bytes=3 * MIB // 2)
    free_before = os.statvfs(small_disk).f_bavail
    with pytest.raises(DiskFull) as refused:
        await stage(quota, scratch, pool, chunks=3, room_bytes=0)
    cause = refused.value.__cause__
    assert isinstance(cause, OSError)
    assert cause.errno == errno.ENOSPC
    nothing_left()
    assert os.statvfs(small_disk).f_bavail == free_before

    # With room again the same job succeeds.
    neighbour.unlink()
    assert await stage(quota, scratch, pool, chunks=3, room_bytes=3 * MIB) == 3 * MIB
    nothing_left()


async def test_part_of_a_file_is_gone_even_before_the_directory_is(small_disk, pool):
    scratch = ScratchStore(small_disk / "checkpoint_scratch", pool=pool, clock=FakeClock())
    directory = await scratch.create(JOB)
    await pool.run(directory.write_blocking, "small", [b"x" * 1000])
    with pytest.raises(DiskFull):
        await pool.run(directory.write_blocking, "large", (b"x" * MIB for _ in range(8)))
    assert names_in(directory.path) == ["small"]
    assert await pool.run(directory.write_blocking, "large", [b"x" * MIB]) == MIB


async def test_full_disk_turns_cache_admissions_away_but_not_downloads(small_disk, tmp_path, pool):
    """The cache is a convenience: what does not fit on the disk is served and not kept."""
    root = small_disk / "hot_cache"
    cache = await HotCache.open(root, limit_bytes=64 * MIB, pool=pool, events=Events())
    filler(small_disk, leave_bytes=MIB // 2)
    source = tmp_path / "blob"
    source.write_bytes(b"y" * MIB)
    digest = hashlib.sha256(b"y" * MIB).hexdigest()
    assert not await cache.admit_link(source, sha256=digest, size_bytes=MIB)  # a copy: two disks
    async with cache.writer(sha256=digest, size_bytes=MIB) as writer:
        for _ in range(16):
            await writer.write(b"y" * 65536)
        assert not await writer.commit()
    assert [path for path in root.rglob("*") if path.is_file()] == []
    assert cache.stats().used_bytes == 0
