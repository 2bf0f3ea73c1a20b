import asyncio
import errno
import os
import shutil
import stat
import threading

import pytest

from app.core.base import failpoints
from app.core.base.errors import DiskFull, InvariantViolation, NotReady, StorageFailure
from app.core.base.tasks import BlockingPool
from app.core.stores.local import disk
from app.core.stores.local.scratch import ScratchStore
from tests.helpers.fake_clock import FakeClock

A = "01J0000000000000000000000A"
B = "01J0000000000000000000000B"


def names_in(path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


@pytest.fixture
def pool():
    pool = BlockingPool("test", threads=2)
    yield pool
    pool.close_blocking()


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def root(tmp_path):
    return tmp_path / "checkpoint_scratch"


@pytest.fixture
def store(root, pool, clock):
    return ScratchStore(root, pool=pool, clock=clock)


def age(path, clock, seconds):
    at = clock.wall_ns() - round(seconds * 1e9)
    os.utime(path, ns=(at, at))


def test_a_process_out_of_means_is_no_failure_of_the_disk(tmp_path):
    for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        with pytest.raises(NotReady), disk.disk_errors(tmp_path):
            raise OSError(number, os.strerror(number))


async def test_who_is_cancelled_while_it_creates_can_remove_it(store, root, monkeypatch):
    """Otherwise the thread would make the directory behind the back of the removal."""
    loop, entered, go = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    create_blocking = store._create_blocking

    def held(*arguments):
        loop.call_soon_threadsafe(entered.set)
        assert go.wait(5)
        create_blocking(*arguments)

    monkeypatch.setattr(store, "_create_blocking", held)
    creating = asyncio.ensure_future(store.create(A))
    await entered.wait()
    creating.cancel()
    for _ in range(3):
        await asyncio.sleep(0)
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await creating
    await store.remove(A)
    await asyncio.to_thread(lambda: None)
    assert not list(root.glob("*"))


async def test_create_takes_up_an_existing_directory_and_remove_is_idempotent(store, root):
    assert await store.list() == []
    scratch = await store.create(A)
    assert scratch.path == root / A
    assert scratch.write_blocking("chunk-0", [b"ab", memoryview(b"cd")]) == 4
    again = await store.create(A)
    assert again.file("chunk-0").read_bytes() == b"abcd"
    again.write_blocking("chunk-0", [b"new"])
    assert again.file("chunk-0").read_bytes() == b"new"
    await again.sync("chunk-0")
    assert names_in(root / A) == ["chunk-0"]
    assert await store.remove(A) == 3
    assert await store.remove(A) == 0
    assert names_in(root) == []


@pytest.mark.parametrize("name", ["", "..", "../x", A.lower(), A + "/x", A + "A", f"{A}.removing"])
async def test_only_ulids_name_directories(store, root, name):
    for call in (store.create, store.remove, store.finish_removal):
        with pytest.raises(InvariantViolation):
            await call(name)
    assert not root.exists()


async def test_file_names_stay_inside(store):
    scratch = await store.create(A)
    for name in ("", ".", "..", "a/b", "a\0b", "x.part"):
        with pytest.raises(InvariantViolation):
            scratch.file(name)


async def test_list_tells_ages_sizes_and_only_what_is_ours(store, root, clock):
    young = await store.create(A)
    young.write_blocking("f", [b"12345"])
    old = await store.create(B)
    (root / "not-ours").mkdir()
    (root / "file").write_text("x")
    (root / "01J0000000000000000000000C").symlink_to(root / A)
    age(young.file("f"), clock, 10)
    age(young.path, clock, 500)  # the newest of it counts
    age(old.path, clock, 4000)
    entries = await store.list()
    assert [(e.job_id, e.age_seconds, e.bytes, e.removing) for e in entries] == [
        (B, 4000.0, 0, False),
        (A, 10.0, 5, False),
    ]
    clock.jump_wall(-1000)
    assert (await store.list())[1].age_seconds == 0


async def test_failed_write_leaves_no_part_and_the_old_file(store):
    scratch = await store.create(A)
    scratch.write_blocking("f", [b"old"])

    def pieces():
        yield b"new"
        raise RuntimeError("source failed")

    with pytest.raises(RuntimeError, match="source failed"):
        scratch.write_blocking("f", pieces())
    assert names_in(scratch.path) == ["f"]
    assert scratch.file("f").read_bytes() == b"old"


async def test_crash_while_removing_is_never_taken_for_a_jobs_files(store, root, monkeypatch):
    scratch = await store.create(A)
    scratch.write_blocking("f", [b"12345"])

    def crash(name: str) -> None:
        if name == "stage.mid_remove_scratch":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(failpoints, "fp", crash)
        with pytest.raises(KeyboardInterrupt):
            await store.remove(A)
    assert [(e.job_id, e.removing) for e in await store.list()] == [(A, True)]
    anew = await store.create(A)
    assert names_in(anew.path) == []
    anew.write_blocking("g", [b"1"])
    assert await store.finish_removal(A) == 5
    assert names_in(root) == [A]  # the new one stays
    assert await store.remove(A) == 1
    assert names_in(root) == []


async def test_two_may_remove_at_once(store, root, monkeypatch):
    scratch = await store.create(A)
    for number in range(5):
        scratch.write_blocking(f"f{number}", [b"x"])
    real_unlink = os.unlink

    def unlink_twice(path, *args, **kwargs):
        real_unlink(path, *args, **kwargs)
        real_unlink(path, *args, **kwargs)  # as if another had been first

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", unlink_twice)
        await store.remove(A)
    assert names_in(root) == []


async def test_other_errors_of_removing_are_told(store, monkeypatch):
    await store.create(A)

    def refuse(path, onerror):
        try:
            raise PermissionError(errno.EACCES, "denied")
        except PermissionError as error:
            onerror(os.rmdir, str(path), (type(error), error, None))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(PermissionError):
        await store.remove(A)


async def test_room_is_asked_for_before_anything_is_made(store, root):
    with pytest.raises(DiskFull) as refused:
        await store.create(A, room_bytes=1 << 60)
    assert refused.value.fields["requested_bytes"] == 1 << 60
    assert refused.value.fields["free_bytes"] < 1 << 60
    assert names_in(root) == []
    await store.create(A, room_bytes=1)


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, DiskFull), (errno.EDQUOT, DiskFull),
                         (errno.EIO, StorageFailure), (errno.EROFS, StorageFailure)],
)  # fmt: skip
@pytest.mark.parametrize("call", ["fdatasync", "fsync"])
async def test_what_a_failed_sync_means(store, monkeypatch, number, kind, call):
    scratch = await store.create(A)

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(disk.os, call, fail)
        with pytest.raises(kind):
            scratch.write_blocking("f", [b"x"])
    assert [name for name in names_in(scratch.path) if name.endswith(".part")] == []


async def test_writes_are_synced_before_they_are_named(store, monkeypatch):
    scratch = await store.create(A)
    steps: list[str] = []
    real_fdatasync, real_fsync = os.fdatasync, os.fsync

    def fdatasync(descriptor: int) -> None:
        steps.append(f"data, named={scratch.file('f').exists()}")
        real_fdatasync(descriptor)

    def fsync(descriptor: int) -> None:
        assert stat.S_ISDIR(os.fstat(descriptor).st_mode)
        steps.append(f"directory, named={scratch.file('f').exists()}")
        real_fsync(descriptor)

    monkeypatch.setattr(disk.os, "fdatasync", fdatasync)
    monkeypatch.setattr(disk.os, "fsync", fsync)
    scratch.write_blocking("f", [b"x"])
    assert steps == ["data, named=False", "directory, named=True"]
