"""A disk that is full, and one that fails."""

import asyncio
import errno
from pathlib import Path

import pytest

from app.core.base.errors import DiskFull, NotReady, StorageFailure
from app.core.stores.wal.writer import write_all
from tests.helpers.open_files import open_files_below
from tests.unit.core.stores.wal.builders import (
    Place,
    append,
    append_together,
    config,
    read_all,
    request,
)
from tests.unit.core.stores.wal.disks import FaultyDisk


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
async def test_a_full_disk_takes_nothing_of_the_group_and_no_lsn(
    place: Place, disk: FaultyDisk, code: int
) -> None:
    async with place.log() as log:
        await append(log, b"one")
        before = place.files()[0].read_bytes()
        disk.write_max = 50
        disk.fail("write", None, code)  # the first part of it is written
        answers = await append_together(log, request(b"x" * 100), request(b"y"))
        assert [type(answer) for answer in answers] == [DiskFull, DiskFull]
        assert place.files()[0].read_bytes() == before
        assert disk.calls[-2:] == ["truncate", "sync_data"]
        assert (await append(log, b"two")).first_lsn == 2
    assert place.fatal == []
    assert "wal.disk_full" in place.log_of_events.names()
    async with place.log() as log:
        assert read_all(log) == {1: b"one", 2: b"two"}


@pytest.mark.parametrize("call", ["make_directory", "create", "write"])
async def test_a_full_disk_under_a_new_segment_leaves_no_file(
    place: Place, disk: FaultyDisk, call: str
) -> None:
    async with place.log() as log:
        disk.fail(call, errno.ENOSPC)
        with pytest.raises(DiskFull):
            await append(log, b"one")
        assert place.files() == []
        assert (await append(log, b"one")).first_lsn == 1
    assert place.fatal == []


async def test_a_full_disk_in_the_second_segment_takes_the_first_back_too(
    place: Place, disk: FaultyDisk
) -> None:
    async with place.log() as log:
        await append(log, b"one")
        before = [path.read_bytes() for path in place.files()]
        disk.fail("write", None, errno.ENOSPC)
        with pytest.raises(DiskFull):
            await append(log, b"x" * 3000, b"y" * 3000, per_entry=1)
        assert [path.read_bytes() for path in place.files()] == before
        assert (await append(log, b"two")).first_lsn == 2
    async with place.log() as log:
        assert read_all(log) == {1: b"one", 2: b"two"}


async def test_a_full_disk_while_sealing_leaves_the_segment_open(
    place: Place, disk: FaultyDisk
) -> None:
    async with place.log() as log:
        await append(log, b"one")
        before = place.files()[0].read_bytes()
        disk.fail("write", None, errno.ENOSPC)
        with pytest.raises(DiskFull):
            await log.seal()
        assert place.files()[0].read_bytes() == before
        assert (await append(log, b"two")).first_lsn == 2
        await log.seal()
        assert [info.last_lsn for info in log.sealed_segments()] == [2]


async def test_an_eio_on_a_full_disk_is_a_full_disk(place: Place, disk: FaultyDisk) -> None:
    async with place.log() as log:
        await append(log, b"one")
        disk.fail("write", errno.EIO)
        disk.free = 10
        with pytest.raises(DiskFull):
            await append(log, b"two")
    assert place.fatal == []


@pytest.mark.parametrize("call", ["create", "sync_directory"])
async def test_out_of_descriptors_is_no_failure_of_the_disk(
    place: Place, disk: FaultyDisk, call: str
) -> None:
    """A directory is opened for its sync: that it could not be says nothing of the disk."""
    async with place.log() as log:
        disk.fail(call, errno.EMFILE)
        with pytest.raises(NotReady):
            await append(log, b"one")
        assert (await append(log, b"one")).first_lsn == 1
    assert place.fatal == []


async def test_out_of_descriptors_under_a_second_segment_takes_the_group_back(
    place: Place, disk: FaultyDisk
) -> None:
    """Its data is written and synced, its name is not: nothing of it may come back later."""
    async with place.log() as log:
        await append(log, b"one")
        await log.seal()
        disk.fail("sync_directory", errno.ENFILE)
        with pytest.raises(NotReady):
            await append(log, b"two")
        assert len(place.files()) == 1
        assert (await append(log, b"two")).first_lsn == 2
        disk.fail("sync_directory", errno.EMFILE)
        with pytest.raises(NotReady):
            await log.remove([1])
        assert await log.remove([1]) == (1,)
        assert read_all(log) == {2: b"two"}
    assert place.fatal == []


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("write", errno.EIO),
        ("write", errno.EFBIG),
        ("sync_data", errno.EIO),
        ("sync_data", errno.ENOSPC),  # what of it is on the disk is unknown
        ("sync_directory", errno.EIO),
    ],
)
async def test_a_failure_of_the_disk_ends_all_logs_at_once(
    place: Place, disk: FaultyDisk, call: str, code: int
) -> None:
    async with place.store() as store:
        log = await store.open_log(config(db_id=1), ())
        other = await store.open_log(config(db_id=2), ())
        await append(other, b"before")
        polling = asyncio.ensure_future(other.wait_for(9))
        await asyncio.sleep(0)
        disk.fail(call, code)
        failing = asyncio.ensure_future(append(log, b"a"))
        await asyncio.sleep(0)
        behind = asyncio.ensure_future(append(log, b"b"))
        answers = await asyncio.gather(failing, behind, polling, return_exceptions=True)
        assert [type(answer) for answer in answers] == [StorageFailure] * 3
        disk.calls.clear()
        for one in (log, other):
            for _ in range(2):
                with pytest.raises(StorageFailure):
                    await append(one, b"after")
            with pytest.raises(StorageFailure):
                await one.seal()
            with pytest.raises(StorageFailure):
                await one.remove([1])
        assert disk.calls == []  # above all no second sync
        with pytest.raises(StorageFailure):
            await store.open_log(config(db_id=3), ())
    assert len(place.fatal) == 1
    assert isinstance(place.fatal[0], StorageFailure)


async def test_a_new_segment_that_cannot_be_looked_at_leaves_nothing(
    place: Place, disk: FaultyDisk
) -> None:
    async with place.log() as log:
        disk.fail("identify", errno.ENOMEM)
        with pytest.raises(NotReady):
            await append(log, b"one")
        assert place.files() == []
        assert open_files_below(place.root) == []
        assert (await append(log, b"one")).first_lsn == 1
    assert place.fatal == []


async def test_a_failed_truncation_is_fatal(place: Place, disk: FaultyDisk) -> None:
    async with place.log() as log:
        await append(log, b"one")
        disk.fail("write", errno.ENOSPC)
        disk.fail("truncate", errno.EIO)
        with pytest.raises(StorageFailure):
            await append(log, b"two")
    assert len(place.fatal) == 1


async def test_a_failed_sync_of_a_truncation_is_fatal(place: Place, disk: FaultyDisk) -> None:
    async with place.log() as log:
        await append(log, b"one")
        disk.fail("write", errno.ENOSPC)
        disk.fail("sync_data", errno.EIO)
        with pytest.raises(StorageFailure):
            await append(log, b"two")
    assert len(place.fatal) == 1


async def test_a_failed_seal_is_fatal(place: Place, disk: FaultyDisk) -> None:
    async with place.log() as log:
        await append(log, b"one")
        disk.fail("sync_data", errno.EIO)
        with pytest.raises(StorageFailure):
            await log.seal()
        with pytest.raises(StorageFailure):
            await append(log, b"two")
    assert len(place.fatal) == 1


async def test_a_failed_removal_is_fatal(place: Place, disk: FaultyDisk) -> None:
    async with place.log() as log:
        await append(log, b"one")
        await log.seal()
        disk.fail("sync_directory", errno.EIO)
        with pytest.raises(StorageFailure):
            await log.remove([1])
        with pytest.raises(StorageFailure):
            await append(log, b"two")
    assert len(place.fatal) == 1


@pytest.mark.parametrize("call", ["read", "sync_data"])
async def test_a_disk_that_fails_in_recovery_refuses_to_open(
    place: Place, disk: FaultyDisk, call: str
) -> None:
    async with place.log() as log:
        await append(log, b"one")
    path = place.files()[0]
    path.write_bytes(path.read_bytes() + b"torn")
    disk.fail(call, errno.EIO)
    async with place.store() as store:
        with pytest.raises(StorageFailure):
            await store.open_log(config(), place.catalog.of())
    assert len(place.fatal) == 1


async def test_a_bug_in_the_catalogue_is_fatal(place: Place) -> None:
    """Whether its row was written is unknown."""
    async with place.log() as log:
        place.catalog.refusals.append(ZeroDivisionError())  # type: ignore[arg-type]
        with pytest.raises(StorageFailure):
            await append(log, b"one")
    assert len(place.fatal) == 1


async def test_a_bug_behind_the_flush_is_fatal_and_leaves_nobody_waiting(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with place.log() as log:
        await append(log, b"one")
        monkeypatch.setattr(log, "_charge", lambda _: 1 / 0)
        answers = await asyncio.wait_for(append_together(log, request(b"two"), request(b"3")), 30)
        assert [type(answer) for answer in answers] == [StorageFailure] * 2
        with pytest.raises(StorageFailure):
            await append(log, b"after")
        await asyncio.wait_for(log.aclose(), 30)
    assert len(place.fatal) == 1


@pytest.mark.parametrize("write_max", [1, 7, 79, 100])
async def test_short_writes_are_completed(place: Place, disk: FaultyDisk, write_max: int) -> None:
    disk.write_max = write_max
    async with place.log() as log:
        await append_together(log, request(b"one"), request(b"x" * 500), request(b""))
        await log.seal()
    async with place.log() as log:
        assert read_all(log) == {1: b"one", 2: b"x" * 500, 3: b""}


def test_a_write_that_writes_nothing_does_not_spin(tmp_path: Path) -> None:
    disk = FaultyDisk()
    disk.write_max = 0
    fd = disk.create(tmp_path / "file")
    try:
        with pytest.raises(OSError, match="nothing"):
            write_all(disk, fd, [b"a"], 0)
    finally:
        disk.close(fd)


def test_more_pieces_than_the_kernel_takes(tmp_path: Path) -> None:
    disk = FaultyDisk()
    fd = disk.create(tmp_path / "file")
    pieces = [b"%04d" % number for number in range(3000)]
    try:
        write_all(disk, fd, pieces, 0)
    finally:
        disk.close(fd)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)
