import os

import pytest

from app.core.base.tasks import BlockingPool
from app.core.formats.damage import Damage
from app.core.reads.byte_source import LocalFile, RemoteBlob
from tests.helpers.memory_remote import MemoryRemote
from tests.unit.core.reads.conftest import open_files

DATA = os.urandom(2 * 1024 * 1024 + 77)


@pytest.fixture(params=["file", "blob"])
async def source(request, tmp_path):
    if request.param == "blob":
        remote = MemoryRemote()
        remote.objects["key"] = DATA
        yield RemoteBlob(remote, "key")
        return
    (tmp_path / "f").write_bytes(DATA)
    pool = BlockingPool("test", threads=1)
    file = await LocalFile.open(tmp_path / "f", tier="local", pool=pool)
    yield file
    file.close()
    file.close()
    pool.close_blocking()


async def test_ranges(source):
    for first, length in [(0, 1), (5, 1000), (0, len(DATA)), (len(DATA) - 3, 3), (9, 0)]:
        wanted = DATA[first : first + length]
        assert await source.read(first, length) == wanted


async def test_fewer_bytes_than_asked_for_are_damage(source):
    with pytest.raises(Damage):
        await source.read(len(DATA) - 3, 4)


async def test_a_closed_file_is_not_left_open(tmp_path):
    (tmp_path / "f").write_bytes(DATA)
    pool = BlockingPool("test", threads=1)
    before = open_files()
    file = await LocalFile.open(tmp_path / "f", tier="wal", pool=pool)
    assert open_files() == before + 1
    file.close()
    assert open_files() == before
    pool.close_blocking()
