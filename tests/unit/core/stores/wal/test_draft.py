"""Appends whose files are written before they are flushed: linked, dropped, failing."""

import asyncio
import errno
import os
import threading
from pathlib import Path

import pytest

from app.core.base.errors import DiskFull, InvariantViolation, StorageFailure
from app.core.stores.wal.draft import Draft
from app.core.stores.wal.log import WalLog
from app.core.stores.wal.requests import AppendRequest
from tests.helpers.open_files import open_files_below
from tests.unit.core.stores.wal.builders import CHUNK, Place, append, read_all, request, settled
from tests.unit.core.stores.wal.disks import FaultyDisk

RECORDS = [bytes([65 + number]) * (300 + number) for number in range(40)]  # several segments


@pytest.fixture
def disk() -> FaultyDisk:
    return FaultyDisk()


@pytest.fixture
def place(tmp_path: Path, disk: FaultyDisk) -> Place:
    return Place(root=tmp_path / "wal", disk=disk)


def large() -> AppendRequest:
    return request(*RECORDS, per_entry=2)


async def drafted(log: WalLog, made: AppendRequest, *, entries: int | None = None) -> Draft:
    draft = await log.draft(made)
    assert draft is not None
    stop = len(made.entries) if entries is None else entries
    for count in range(0, stop + 1, 3):
        await asyncio.to_thread(draft.write_blocking, count)
        await asyncio.to_thread(draft.sync_blocking)
    await asyncio.to_thread(draft.write_blocking, stop)
    return draft


async def test_a_draft_becomes_the_segments_that_an_append_would_have_written(
    tmp_path: Path, place: Place, disk: FaultyDisk
) -> None:
    plain = Place(root=tmp_path / "plain")
    async with plain.log() as log:
        expected = await log.append(large())
        await settled(log)
    async with place.log() as log:
        made = large()
        draft = await drafted(log, made)
        assert place.files() == [], "nothing has a name yet"
        disk.calls.clear()
        assert await log.append(made, draft=draft) == expected
        assert "write" not in disk.calls[: disk.calls.index("sync_directory")]
        await settled(log)
        assert read_all(log) == dict(enumerate(RECORDS, 1))
        assert (await append(log, b"next")).first_lsn == len(RECORDS) + 1
    written = {path.name: path.read_bytes() for path in plain.files()}
    first, *others = sorted(written)
    assert len(others) > 2
    for name in (first, *others[:-1]):  # the last one goes on
        assert (place.root / "7" / name).read_bytes() == written[name]
    async with place.log() as log:
        assert read_all(log) == dict(enumerate([*RECORDS, b"next"], 1))
    assert place.fatal == []


async def test_a_draft_is_written_as_any_append_where_the_log_has_moved(place: Place) -> None:
    async with place.log() as log:
        made = large()
        draft = await drafted(log, made)
        await append(log, b"quicker")
        done = await log.append(made, draft=draft)
        assert done.first_lsn == 2
        assert draft.read_blocking(3) == made.entries[3].load_blocking()
        assert draft.read_blocking(19) == made.entries[19].load_blocking()
        assert read_all(log) == dict(enumerate([b"quicker", *RECORDS], 1))
        assert await log.draft(large()) is None, "the log has an open segment"
        await log.seal()
        again = large()
        draft = await drafted(log, again)
        assert (await log.append(again, draft=draft)).first_lsn == len(RECORDS) + 2


async def test_an_unfinished_draft_is_not_used(place: Place) -> None:
    async with place.log() as log:
        made = large()
        draft = await drafted(log, made, entries=19)
        with pytest.raises(InvariantViolation):
            draft.read_blocking(19)
        await log.append(made, draft=draft)
        assert read_all(log) == dict(enumerate(RECORDS, 1))


async def test_files_of_a_draft_that_is_left_are_closed(place: Place) -> None:
    async with place.log() as log:
        draft = await drafted(log, large())
        assert len(open_files_below(place.root)) > 2
        draft.close_blocking()
        draft.close_blocking()
        assert open_files_below(place.root) == []
        assert list(place.root.iterdir()) == []
        with pytest.raises(InvariantViolation):
            draft.read_blocking(0)


async def test_a_draft_is_closed_by_the_last_thread_that_is_at_it(
    place: Place, disk: FaultyDisk
) -> None:
    syncing, may_end = threading.Event(), threading.Event()

    def sync(fd: int) -> None:
        syncing.set()
        assert may_end.wait(30)
        os.fstat(fd)  # still open

    async with place.log() as log:
        draft = await drafted(log, large(), entries=10)
        draft.write_blocking(20)
        disk.sync_data = sync  # type: ignore[method-assign]
        thread = asyncio.create_task(asyncio.to_thread(draft.sync_blocking))
        assert await asyncio.to_thread(syncing.wait, 30)
        draft.close_blocking()
        assert open_files_below(place.root) != []
        may_end.set()
        await thread
        draft.check()
        assert open_files_below(place.root) == []


@pytest.mark.parametrize("call", ["create_unnamed", "link"])
@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EXDEV, errno.EMFILE])
async def test_without_the_means_there_is_no_draft(
    place: Place, disk: FaultyDisk, call: str, code: int
) -> None:
    async with place.log() as log:
        disk.fail(call, code)
        assert await log.draft(large()) is None
        assert open_files_below(place.root) == []
        assert list(place.root.iterdir()) == []
        await append(log, b"one")
    assert place.fatal == []


async def test_a_full_disk_under_a_draft_leaves_nothing(place: Place, disk: FaultyDisk) -> None:
    async with place.log() as log:
        draft = await log.draft(large())
        assert draft is not None
        disk.fail("write", None, errno.ENOSPC)
        with pytest.raises(DiskFull):
            draft.write_blocking(20)
        draft.close_blocking()
        assert open_files_below(place.root) == []
        assert (await append(log, b"one")).first_lsn == 1
    assert place.fatal == []


@pytest.mark.parametrize("nth", [0, 2])
async def test_a_full_disk_under_a_link_takes_the_group_back(
    place: Place, disk: FaultyDisk, nth: int
) -> None:
    async with place.log() as log:
        made = large()
        draft = await drafted(log, made)
        disk.fail("link", *[None] * nth, errno.ENOSPC)
        with pytest.raises(DiskFull):
            await log.append(made, draft=draft)
        draft.close_blocking()
        assert place.files() == []
        assert open_files_below(place.root) == []
        assert (await append(log, b"one")).first_lsn == 1
    assert place.fatal == []


async def test_a_refused_row_takes_a_draft_back(place: Place) -> None:
    async with place.log() as log:
        made = large()
        draft = await drafted(log, made)
        place.catalog.refusals.append(DiskFull())
        with pytest.raises(DiskFull):
            await log.append(made, draft=draft)
        assert place.files() == []
        assert place.catalog.of() == ()
        assert (await append(log, b"one")).first_lsn == 1


@pytest.mark.parametrize("has_moved", [False, True])
async def test_a_failed_sync_of_a_draft_is_fatal_once_it_is_used(
    place: Place, disk: FaultyDisk, has_moved: bool
) -> None:
    """The page cache may have thrown away what could not be written (I16)."""
    async with place.log(chunk_bytes=CHUNK) as log:
        made = large()
        draft = await log.draft(made)
        assert draft is not None
        draft.write_blocking(19)
        disk.fail("sync_data", errno.EIO)
        draft.sync_blocking()
        draft.write_blocking(20)
        if has_moved:
            with pytest.raises(StorageFailure):
                draft.read_blocking(0)
            return
        with pytest.raises(StorageFailure):
            await log.append(made, draft=draft)
        assert place.files() == []
    assert len(place.fatal) == 1


async def test_a_failed_write_of_a_draft_is_told_and_harms_no_log(
    place: Place, disk: FaultyDisk
) -> None:
    async with place.log() as log:
        draft = await log.draft(large())
        assert draft is not None
        disk.fail("write", errno.EIO)
        with pytest.raises(OSError, match="Input/output"):
            draft.write_blocking(20)
        assert (await append(log, b"one")).first_lsn == 1
    assert place.fatal == []
