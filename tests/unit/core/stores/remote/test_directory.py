"""The directory store: the contract, and what only a directory can get wrong."""

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from app.core.base.clock import SeededRandomness
from app.core.base.errors import DiskFull, OutcomeUnknown, RemoteUnavailable
from app.core.base.tasks import BlockingPool
from app.core.stores.remote import directory as directory_module
from app.core.stores.remote.directory import DirectoryRemoteStore
from app.core.stores.remote.keys import ProbeKey, parse_key
from app.core.stores.remote.probe import inspect_endpoint
from app.core.stores.remote.protocol import RemoteMisconfigured, RemoteStore
from tests.helpers.open_files import open_files_below
from tests.helpers.remote import bytes_body, file_body, opened_remote
from tests.helpers.remote_contract import RemoteStoreContract
from tests.helpers.wait import wait_until


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "remote"


@pytest.fixture
async def store(root: Path) -> AsyncIterator[RemoteStore]:
    async with opened_remote(f"file://{root}") as opened:
        yield opened


@pytest.fixture
def pool() -> Iterator[BlockingPool]:
    made = BlockingPool("test", threads=4)
    yield made
    made.close_blocking()


def files_below(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} - {".lock"}


class TestDirectoryContract(RemoteStoreContract):
    list_count = 205

    @pytest.fixture(autouse=True)
    def _small_batches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(directory_module, "LIST_BATCH_COUNT", 100)


async def test_objects_are_plain_files_named_by_their_keys(root: Path, store: RemoteStore) -> None:
    await store.put_blob("generations/a/b.json", bytes_body(b"{}"))
    assert files_below(root) == {"generations/a/b.json"}
    assert (root / "generations/a/b.json").read_bytes() == b"{}"


async def test_an_uploaded_file_is_copied_not_linked(
    root: Path, store: RemoteStore, tmp_path: Path
) -> None:
    body = file_body(tmp_path / "staged", b"content")
    await store.put_blob("blob", body)
    assert (root / "blob").stat().st_ino != body.path.stat().st_ino
    body.path.write_bytes(b"CONTENT")
    assert await store.get_blob("blob") == b"content"


async def test_head_tells_bit_rot(root: Path, store: RemoteStore) -> None:
    body = bytes_body(b"sound content")
    await store.put_blob("blob", body)
    (root / "blob").write_bytes(b"sound_content")
    found = await store.head_blob("blob")
    assert found is not None
    assert found.bytes == body.bytes
    assert found.crc64 != body.crc64


async def test_empty_directories_go_with_their_last_object(root: Path, store: RemoteStore) -> None:
    await store.put_blob("a/b/c/1", bytes_body(b"x"))
    await store.put_blob("a/2", bytes_body(b"x"))
    await store.delete_blobs(["a/b/c/1"])
    assert not (root / "a/b").exists()
    await store.delete_blobs(["a/2"])
    assert not (root / "a").exists()


async def test_opening_removes_what_a_dead_process_left_and_nothing_else(
    root: Path, pool: BlockingPool
) -> None:
    store = await DirectoryRemoteStore.open(root, pool=pool)
    (root / ".tmp" / "dead").write_bytes(b"half")
    with store._temporary() as (living, _):
        await DirectoryRemoteStore.open(root, pool=pool)
        assert [path.name for path in (root / ".tmp").iterdir()] == [living.name]
    assert list((root / ".tmp").iterdir()) == []


async def test_two_stores_on_one_directory_have_one_winner(root: Path) -> None:
    """As two processes: each has its own pool and file descriptors."""
    url = f"file://{root}"
    async with opened_remote(url) as one, opened_remote(url) as two:
        start = await one.put_if_absent("cell", bytes_body(b"start"))
        assert start is not None
        results = await asyncio.gather(
            *(
                store.put_if_match("cell", bytes_body(f"{number}".encode()), etag=start.etag)
                for number, store in enumerate([one, two] * 10)
            )
        )
        assert sum(info is not None for info in results) == 1


async def test_changes_are_made_one_at_a_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at an object and its replacement nobody else changes anything."""
    inside, most = 0, 0
    make, sync = directory_module.make_directories, DirectoryRemoteStore._make_durable

    def enter(at: Path, wanted: Path) -> list[Path]:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        threading.Event().wait(0.005)  # room for another to come in, if it can
        return make(at, wanted)

    def leave(store: DirectoryRemoteStore, directory: Path) -> None:
        nonlocal inside
        sync(store, directory)
        inside -= 1

    monkeypatch.setattr(directory_module, "make_directories", enter)
    monkeypatch.setattr(DirectoryRemoteStore, "_make_durable", leave)
    url = f"file://{root}"
    async with opened_remote(url) as one, opened_remote(url) as two:
        await asyncio.gather(
            *(
                store.put_blob(f"key-{number}", bytes_body(b"x"))
                for number, store in enumerate([one, two] * 8)
            )
        )
    assert most == 1


async def test_a_full_disk_is_told_and_leaves_nothing(
    root: Path, pool: BlockingPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await DirectoryRemoteStore.open(root, pool=pool)

    def no_room(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(directory_module.os, "fsync", no_room)
    with pytest.raises(DiskFull):
        await store.put_blob("blob", bytes_body(b"x"))
    assert files_below(root) == set()


async def test_a_failed_sync_of_the_directory_is_an_unknown_outcome(
    root: Path, pool: BlockingPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await DirectoryRemoteStore.open(root, pool=pool)

    def broken(directory: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(directory_module, "sync_directory", broken)
    with pytest.raises(OutcomeUnknown):
        await store.put_blob("blob", bytes_body(b"x"))


async def test_what_cannot_be_synced_is_not_confirmed_by_a_look_at_it(
    root: Path, store: RemoteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look finds it in memory; a power cut may still take it."""
    sync, broken = directory_module.sync_directory, True

    def fail(directory: Path) -> None:
        if broken:
            raise OSError(errno.EIO, "Input/output error")
        sync(directory)

    monkeypatch.setattr(directory_module, "sync_directory", fail)
    body = bytes_body(b"x")
    with pytest.raises(OutcomeUnknown):
        await store.put_blob("a/blob", body)
    with pytest.raises(OutcomeUnknown):
        await store.put_if_absent("a/document", body)
    with pytest.raises(RemoteUnavailable):
        await store.head_blob("a/blob")
    broken = False
    found = await store.head_blob("a/blob")
    assert found is not None
    assert (found.bytes, found.crc64) == (body.bytes, body.crc64)


async def test_what_an_earlier_process_put_is_synced_before_it_is_confirmed(
    root: Path, pool: BlockingPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have died between giving the object its name and syncing that, or the directories."""
    store = await DirectoryRemoteStore.open(root, pool=pool)
    await store.put_blob("a/b/blob", bytes_body(b"x"))
    synced: list[Path] = []
    monkeypatch.setattr(directory_module, "sync_directory", synced.append)
    store = await DirectoryRemoteStore.open(root, pool=pool)
    assert synced == [root.parent]
    del synced[:]
    assert await store.head_blob("a/b/blob") is not None
    assert set(synced) == {root, root / "a", root / "a/b"}
    assert await store.head_blob("a/b/blob") is not None
    assert len(synced) == 3
    await store.put_blob("a/b/other", bytes_body(b"x"))
    assert synced[3:] == [root / "a/b"]
    await store.put_blob("a/c/other", bytes_body(b"x"))
    assert set(synced[4:]) == {root / "a", root / "a/c"}
    del synced[:]
    assert await store.delete_blobs(["a/b/blob", "a/b/other"]) == ()
    await store.put_blob("a/b/blob", bytes_body(b"x"))
    assert set(synced) == {root / "a/b", root / "a"}


async def test_objects_of_a_directory_and_of_one_below_it_are_deleted_in_one_call(
    root: Path, pool: BlockingPool
) -> None:
    store = await DirectoryRemoteStore.open(root, pool=pool)
    keys = ["a/1", "a/b/2", "a/b/c/3"]
    for key in keys:
        await store.put_blob(key, bytes_body(b"x"))
    assert await store.delete_blobs(keys) == ()
    assert not (root / "a").exists()


async def test_a_stream_given_up_while_its_file_is_opened_leaves_nothing_open(
    root: Path, store: RemoteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.put_blob("blob", bytes_body(b"x"))
    opening, go_on = threading.Event(), threading.Event()
    open_range = DirectoryRemoteStore._open_range_blocking

    def slowly(*args: object) -> tuple[int, int]:
        opened = open_range(*args)  # type: ignore[arg-type]
        opening.set()
        assert go_on.wait(30)
        return opened

    monkeypatch.setattr(DirectoryRemoteStore, "_open_range_blocking", slowly)
    reading = asyncio.ensure_future(anext(store.iter_blob("blob")))
    assert await asyncio.to_thread(opening.wait, 30)
    reading.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await wait_until(lambda: open_files_below(root) == [], timeout=10)


async def test_file_and_directories_are_synced_before_a_put_returns(
    root: Path, pool: BlockingPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await DirectoryRemoteStore.open(root, pool=pool)
    synced: list[str] = []
    fsync = os.fsync

    def record(fd: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", record)
    await store.put_blob("a/b/blob", bytes_body(b"x"))
    assert synced[0].startswith(str(root / ".tmp"))
    assert set(synced[1:]) == {str(root), str(root / "a"), str(root / "a/b")}
    synced.clear()
    await store.delete_blobs(["a/b/blob"])
    assert str(root / "a/b") in synced


async def test_a_directory_that_cannot_be_made_says_so(tmp_path: Path, pool: BlockingPool) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises((RemoteMisconfigured, RemoteUnavailable)):
        await DirectoryRemoteStore.open(tmp_path / "file" / "remote", pool=pool)
    with pytest.raises(RemoteMisconfigured):
        await DirectoryRemoteStore.open(tmp_path / "file", pool=pool)


async def test_what_a_probe_leaves_that_is_cut_short_has_keys_of_ours(
    root: Path, store: RemoteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the orphan sweep may take it."""

    async def cut_short(*_: object) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(DirectoryRemoteStore, "head_blob", cut_short)
    with pytest.raises(asyncio.CancelledError):
        await inspect_endpoint(store, randomness=SeededRandomness(1))
    [left] = files_below(root)
    assert isinstance(parse_key(left), ProbeKey)


async def test_a_stream_survives_the_deletion_of_its_object(store: RemoteStore) -> None:
    data = os.urandom(1024 * 1024)
    await store.put_blob("blob", bytes_body(data))
    stream = store.iter_blob("blob")
    pieces = [await anext(stream)]
    await store.delete_blobs(["blob"])
    pieces += [piece async for piece in stream]
    assert b"".join(pieces) == data
