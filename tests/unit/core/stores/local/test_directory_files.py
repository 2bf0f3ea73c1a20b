"""DirectoryFiles: a limit, the least recently used first, what is left after a restart."""

import errno
import hashlib
from pathlib import Path

import pytest

from app.core.base.events import Events
from app.core.base.tasks import BlockingPool
from app.core.stores.local.directory_files import DirectoryFiles


def name(number: int) -> str:
    return hashlib.sha256(bytes([number])).hexdigest()


def data(number: int) -> bytes:
    return bytes([number]) * 100


@pytest.fixture
def pool():
    pool = BlockingPool("test", threads=2)
    yield pool
    pool.close_blocking()


def opened(root: Path, pool: BlockingPool, *, limit_bytes: int = 300, told: list[str]):
    events = Events(lambda event, level, fields: told.append(event))
    return DirectoryFiles.open(root, limit_bytes=limit_bytes, pool=pool, events=events)


def on_disk(root: Path) -> set[str]:
    return {path.name for path in root.rglob("*") if path.is_file()}


async def test_the_least_recently_used_go_first(tmp_path, pool):
    kept = await opened(tmp_path, pool, told=[])
    for number in (1, 2, 3):
        await kept.put(name(number), data(number))
    assert await kept.get(name(1)) == data(1)
    await kept.put(name(4), data(4))
    assert on_disk(tmp_path) == {name(1), name(3), name(4)}
    assert (name(2) in kept, await kept.get(name(2)), len(kept)) == (False, None, 3)
    assert kept.used_bytes == 300


async def test_what_is_larger_than_the_limit_is_not_kept(tmp_path, pool):
    kept = await opened(tmp_path, pool, limit_bytes=99, told=[])
    await kept.put(name(1), data(1))
    blob = tmp_path / "blob"
    blob.write_bytes(data(2))
    await kept.put_from(blob, name(2), offset=0, length=100)
    assert (len(kept), kept.used_bytes) == (0, 0)


async def test_a_restart_finds_them_and_a_lower_limit_removes_the_oldest(tmp_path, pool):
    kept = await opened(tmp_path, pool, told=[])
    for number in (1, 2, 3):
        await kept.put(name(number), data(number))
    (tmp_path / "incoming" / "7.part").write_bytes(b"cut short")
    again = await opened(tmp_path, pool, limit_bytes=200, told=[])
    assert on_disk(tmp_path) == {name(2), name(3)}
    assert await again.get(name(3)) == data(3)
    await again.put(name(3), b"the first stays")
    assert await again.get(name(3)) == data(3)


async def test_a_part_of_a_blob_is_kept(tmp_path, pool):
    told: list[str] = []
    kept = await opened(tmp_path / "kept", pool, told=told)
    blob = tmp_path / "blob"
    blob.write_bytes(b"blocks" + data(5) + b"trailer")
    await kept.put_from(blob, name(5), offset=6, length=100)
    assert await kept.get(name(5)) == data(5)
    await kept.put_from(tmp_path / "none", name(6), offset=0, length=10)
    assert (name(6) in kept, told) == (False, ["directory.not_kept"])


async def test_what_cannot_be_written_or_read_is_not_there(tmp_path, pool, monkeypatch):
    told: list[str] = []
    kept = await opened(tmp_path, pool, told=told)

    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        await kept.put(name(1), data(1))
    assert (name(1) in kept, kept.used_bytes, on_disk(tmp_path)) == (False, 0, set())
    await kept.put(name(2), data(2))
    (found,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    found.unlink()
    assert await kept.get(name(2)) is None
    assert (name(2) in kept, kept.used_bytes) == (False, 0)
    assert told == ["directory.not_kept", "directory.unreadable"]
    await kept.drop(name(2))
