import hashlib

import pytest

from app.core.base.errors import RemoteUnavailable
from app.core.base.events import Events
from app.core.base.tasks import BlockingPool
from app.core.formats.crc64 import crc64
from app.core.reads.blob_check import PIECE_BYTES, BlobCheck
from app.core.stores.local.hot_cache import HotCache
from app.core.stores.manifest.records import BlobRef
from tests.helpers.memory_remote import MemoryRemote

DATA = bytes(range(256)) * (PIECE_BYTES // 256) + b"and a bit more"
BLOB = BlobRef(
    key="blob", sha256=hashlib.sha256(DATA).digest(), crc64=crc64(DATA), bytes=len(DATA)
)  # fmt: skip
ROTTEN = b"?" + DATA[1:]


@pytest.fixture
def pool():
    pool = BlockingPool("test", threads=2)
    yield pool
    pool.close_blocking()


@pytest.fixture
def remote():
    remote = MemoryRemote()
    remote.objects["blob"] = DATA
    return remote


@pytest.fixture
async def cache(tmp_path, pool):
    return await HotCache.open(
        tmp_path / "hot", limit_bytes=4 * len(DATA), pool=pool, events=Events()
    )


@pytest.fixture
def check(remote, cache, pool):
    return BlobCheck(remote=lambda: remote, copies=cache, pool=pool)


class Turns:
    def __init__(self):
        self.bytes = 0

    async def __call__(self, size_bytes):
        self.bytes += size_bytes


async def test_all_bytes_are_read_and_paid_for(check, remote):
    turns = Turns()
    assert (await check.check(BLOB, turns)).outcome == "ok"
    assert turns.bytes == len(DATA) == sum(length for _, _, length in remote.reads)


@pytest.mark.parametrize("flips", [1, 100])
async def test_a_flip_on_the_way_is_not_one_at_rest(check, remote, flips):
    left = [flips]

    def flip(key, first, data):
        left[0] -= 1
        return b"?" + data[1:] if left[0] >= 0 else data

    remote.on_read = flip
    assert (await check.check(BLOB, Turns())).outcome == ("ok" if flips == 1 else "damaged")


@pytest.mark.parametrize(
    ("stored", "outcome"),
    [(ROTTEN, "damaged"), (DATA[:-1], "damaged"), (DATA + b"x", "damaged"), (None, "missing")],
)
async def test_what_is_wrong_is_said_and_mended_from_a_right_copy(
    check, remote, cache, tmp_path, stored, outcome
):
    remote.objects.pop("blob")
    if stored is not None:
        remote.objects["blob"] = stored
    assert (await check.check(BLOB, Turns())).outcome == outcome
    assert not await check.repair(BLOB, Turns(), on_moved=lambda: None)  # there is no copy
    staged = tmp_path / "staged"
    staged.write_bytes(DATA)
    name = BLOB.sha256.hex()
    assert await cache.admit_link(staged, sha256=name, size_bytes=len(DATA))
    cache.path_of(name).write_bytes(ROTTEN)
    assert not await check.repair(BLOB, Turns(), on_moved=lambda: None)  # a wrong copy is none
    assert name not in cache
    staged.unlink()
    staged.write_bytes(DATA)
    assert await cache.admit_link(staged, sha256=name, size_bytes=len(DATA))
    assert await check.repair(BLOB, Turns(), on_moved=lambda: None)
    assert remote.objects["blob"] == DATA
    assert cache.stats().pinned == 0


async def test_not_to_know_is_no_damage(check, remote):
    remote.unavailable = True
    with pytest.raises(RemoteUnavailable):
        await check.check(BLOB, Turns())
