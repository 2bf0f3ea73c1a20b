"""What every remote store must do. A backend's test module subclasses this with a `store` fixture:
an empty store, opened with its decorators.
"""

import asyncio
import os
from pathlib import Path

import msgspec
import pytest

from app.core.base.clock import SeededRandomness
from app.core.base.errors import CorruptBlob
from app.core.formats.crc64 import crc64
from app.core.stores.remote.keys import InvalidKey
from app.core.stores.remote.probe import inspect_endpoint, probe
from app.core.stores.remote.protocol import BlobMissing, BytesBody, FileBody, RemoteStore
from app.core.stores.remote.streams import closing
from tests.helpers.remote import bytes_body, file_body
from tests.helpers.wait import wait_until

MIB = 1024 * 1024
HOSTILE_KEYS = [
    "", "/", "/etc/passwd", "a//b", "a/", "../up", "a/../b", "a/./b", ".hidden", "a/.tmp", "nul\0",
    "a\nb", "a b", "a%2fb", "a\\b", "ä", "x" * 256, "a/" * 600 + "a",
]  # fmt: skip


class RemoteStoreContract:
    list_count = 1005
    large_bytes = 5 * MIB + 3

    async def test_probe_finds_nothing_lacking(self, store: RemoteStore) -> None:
        report = await inspect_endpoint(store, randomness=SeededRandomness(1))
        assert report.lacks == ()
        assert await probe(store, randomness=SeededRandomness(1)) == report
        assert [info async for info in store.list_blobs("")] == []

    async def test_put_then_get(self, store: RemoteStore) -> None:
        body = bytes_body(b"some bytes")
        info = await store.put_blob("checkpoints/a/b", body)
        assert (info.key, info.bytes, info.crc64) == ("checkpoints/a/b", 10, body.crc64)
        assert await store.get_blob("checkpoints/a/b") == b"some bytes"
        found = await store.head_blob("checkpoints/a/b")
        assert found is not None
        assert (found.key, found.bytes, found.crc64) == (info.key, info.bytes, info.crc64)
        assert found.etag == info.etag
        assert abs(found.modified_at_us - info.modified_at_us) < 60_000_000

    async def test_empty_object(self, store: RemoteStore, tmp_path: Path) -> None:
        await store.put_blob("empty", bytes_body(b""))
        await store.put_blob("empty-file", file_body(tmp_path / "empty", b""))
        for key in ("empty", "empty-file"):
            assert await store.get_blob(key) == b""
            assert [piece async for piece in store.iter_blob(key)] == []
            found = await store.head_blob(key)
            assert found is not None
            assert (found.bytes, found.crc64) == (0, 0)

    async def test_file_body_of_many_pieces(self, store: RemoteStore, tmp_path: Path) -> None:
        data = os.urandom(self.large_bytes)
        body = file_body(tmp_path / "large", data)
        info = await store.put_blob("large", body)
        assert (info.bytes, info.crc64) == (len(data), crc64(data))
        pieces = [piece async for piece in store.iter_blob("large")]
        assert b"".join(pieces) == data
        assert len(pieces) > 1
        assert max(map(len, pieces)) <= 256 * 1024
        assert await store.get_blob("large") == data

    async def test_putting_an_equal_object_again_is_harmless(self, store: RemoteStore) -> None:
        body = bytes_body(b"same")
        first = await store.put_blob("same", body)
        again = await store.put_blob("same", body)
        assert (first.bytes, first.crc64) == (again.bytes, again.crc64)
        assert await store.get_blob("same") == b"same"

    @pytest.mark.parametrize(
        ("first", "length"),
        [(0, 1), (0, 1000), (1, 1), (500, 500), (999, 1), (37, None), (0, 0), (1000, 0)],
    )
    async def test_ranges(self, store: RemoteStore, first: int, length: int | None) -> None:
        data = os.urandom(1000)
        await store.put_blob("ranged", bytes_body(data))
        expected = data[first:] if length is None else data[first : first + length]
        assert await store.get_blob("ranged", first=first, length=length) == expected
        pieces = [piece async for piece in store.iter_blob("ranged", first=first, length=length)]
        assert b"".join(pieces) == expected

    async def test_the_range_at_the_very_end_is_empty(self, store: RemoteStore) -> None:
        await store.put_blob("ranged", bytes_body(b"0123456789"))
        assert await store.get_blob("ranged", first=10) == b""

    @pytest.mark.parametrize(("first", "length"), [(0, 11), (5, 6), (10, 1), (11, None), (99, 1)])
    async def test_a_range_that_the_object_does_not_hold(
        self, store: RemoteStore, first: int, length: int | None
    ) -> None:
        await store.put_blob("short", bytes_body(b"0123456789"))
        with pytest.raises(CorruptBlob):
            await store.get_blob("short", first=first, length=length)
        with pytest.raises(CorruptBlob):
            [piece async for piece in store.iter_blob("short", first=first, length=length)]

    async def test_absent_objects(self, store: RemoteStore) -> None:
        assert await store.head_blob("checkpoints/none") is None
        with pytest.raises(BlobMissing):
            await store.get_blob("checkpoints/none")
        with pytest.raises(BlobMissing):
            await store.get_blob("checkpoints/none", first=3, length=4)
        with pytest.raises(BlobMissing):
            [piece async for piece in store.iter_blob("checkpoints/none")]

    async def test_a_prefix_of_a_key_is_no_object(self, store: RemoteStore) -> None:
        await store.put_blob("a/b/c", bytes_body(b"x"))
        assert await store.head_blob("a/b") is None
        with pytest.raises(BlobMissing):
            await store.get_blob("a/b")

    async def test_wrong_checksum_is_refused_and_leaves_nothing(
        self, store: RemoteStore, tmp_path: Path
    ) -> None:
        with pytest.raises(CorruptBlob):
            await store.put_blob("bad", BytesBody(data=b"right", crc64=crc64(b"wrong")))
        (tmp_path / "bad").write_bytes(b"x" * MIB)
        body = FileBody(path=tmp_path / "bad", bytes=MIB, crc64=crc64(b"wrong"))
        with pytest.raises(CorruptBlob):
            await store.put_blob("bad", body)
        assert await store.head_blob("bad") is None
        assert [info async for info in store.list_blobs("")] == []

    async def test_an_upload_tells_of_its_pieces(self, store: RemoteStore, tmp_path: Path) -> None:
        """Whoever looks whether anything moves hears of it while the upload is under way."""
        told: list[asyncio.AbstractEventLoop] = []
        body = msgspec.structs.replace(
            file_body(tmp_path / "large", os.urandom(9 * MIB + 1)),
            on_moved=lambda: told.append(asyncio.get_running_loop()),
        )
        await store.put_blob("large", body)
        await wait_until(lambda: len(told) >= 9)  # what a thread tells comes by the loop

    async def test_wrong_length_is_refused(self, store: RemoteStore, tmp_path: Path) -> None:
        (tmp_path / "short").write_bytes(b"short")
        body = FileBody(path=tmp_path / "short", bytes=100, crc64=crc64(b"short"))
        with pytest.raises(CorruptBlob):
            await store.put_blob("short", body)
        assert await store.head_blob("short") is None

    async def test_put_if_absent(self, store: RemoteStore) -> None:
        first = await store.put_if_absent("once", bytes_body(b"first"))
        assert first is not None
        assert await store.put_if_absent("once", bytes_body(b"second")) is None
        assert await store.get_blob("once") == b"first"
        again = await store.put_if_absent("once", bytes_body(b"first"))
        assert again is not None
        assert again.etag == first.etag

    async def test_put_if_match(self, store: RemoteStore) -> None:
        one = await store.put_if_absent("cell", bytes_body(b"one"))
        assert one is not None
        two = await store.put_if_match("cell", bytes_body(b"two"), etag=one.etag)
        assert two is not None
        assert two.etag != one.etag
        assert await store.put_if_match("cell", bytes_body(b"three"), etag=one.etag) is None
        assert await store.get_blob("cell") == b"two"
        head = await store.head_blob("cell")
        assert head is not None
        assert await store.put_if_match("cell", bytes_body(b"four"), etag=head.etag) is not None
        assert await store.put_if_match("no-cell", bytes_body(b"x"), etag=one.etag) is None
        assert await store.head_blob("no-cell") is None

    async def test_put_if_absent_race_has_one_winner(self, store: RemoteStore) -> None:
        bodies = [bytes_body(f"racer {number}".encode()) for number in range(24)]
        results = await asyncio.gather(*(store.put_if_absent("race", body) for body in bodies))
        winners = [body for body, info in zip(bodies, results, strict=True) if info is not None]
        assert len(winners) == 1
        assert await store.get_blob("race") == winners[0].data

    async def test_put_if_match_race_has_one_winner(self, store: RemoteStore) -> None:
        start = await store.put_if_absent("race", bytes_body(b"start"))
        assert start is not None
        bodies = [bytes_body(f"racer {number}".encode()) for number in range(24)]
        results = await asyncio.gather(
            *(store.put_if_match("race", body, etag=start.etag) for body in bodies)
        )
        winners = [body for body, info in zip(bodies, results, strict=True) if info is not None]
        assert len(winners) == 1
        assert await store.get_blob("race") == winners[0].data

    async def test_delete(self, store: RemoteStore) -> None:
        for key in ("a/1", "a/2", "b/1"):
            await store.put_blob(key, bytes_body(b"x"))
        assert list(await store.delete_blobs(["a/1", "never/was", "b/1"])) == []
        assert {info.key async for info in store.list_blobs("")} == {"a/2"}
        assert list(await store.delete_blobs(["a/1"])) == []
        assert list(await store.delete_blobs([])) == []

    async def test_a_deleted_key_can_be_written_again(self, store: RemoteStore) -> None:
        await store.put_if_absent("a/b/c", bytes_body(b"one"))
        await store.delete_blobs(["a/b/c"])
        assert await store.put_if_absent("a/b/c", bytes_body(b"two")) is not None
        assert await store.get_blob("a/b/c") == b"two"

    async def test_list_by_prefix(self, store: RemoteStore) -> None:
        keys = ["a/b/1", "a/b/2", "a/bc/1", "ab/1", "z"]
        for key in keys:
            await store.put_blob(key, bytes_body(key.encode()))

        async def listed(prefix: str) -> set[str]:
            return {info.key async for info in store.list_blobs(prefix)}

        assert await listed("") == set(keys)
        assert await listed("a/") == {"a/b/1", "a/b/2", "a/bc/1"}
        assert await listed("a/b") == {"a/b/1", "a/b/2", "a/bc/1"}
        assert await listed("a/b/") == {"a/b/1", "a/b/2"}
        assert await listed("a/b/1") == {"a/b/1"}
        assert await listed("none/") == set()
        found = [info async for info in store.list_blobs("a/b/2")]
        assert (found[0].bytes, found[0].crc64) == (5, None)
        head = await store.head_blob("a/b/2")
        assert head is not None
        assert head.etag == found[0].etag

    async def test_list_is_complete_over_many_pages(self, store: RemoteStore) -> None:
        keys = {f"many/{number % 3}/{number:05d}" for number in range(self.list_count)}
        gate = asyncio.Semaphore(16)

        async def put(key: str) -> None:
            async with gate:
                await store.put_blob(key, bytes_body(b"x"))

        await asyncio.gather(*(put(key) for key in keys))
        found = [info.key async for info in store.list_blobs("many/")]
        assert len(found) == len(keys)
        assert set(found) == keys
        assert list(await store.delete_blobs(sorted(keys)[5:])) == []
        left = {info.key async for info in store.list_blobs("many/")}
        assert left == set(sorted(keys)[:5])

    async def test_an_abandoned_stream_leaves_nothing_open(self, store: RemoteStore) -> None:
        await store.put_blob("large", bytes_body(os.urandom(2 * MIB)))
        for _ in range(30):
            async with closing(store.iter_blob("large")) as stream:
                assert await anext(stream)
        assert len(await store.get_blob("large")) == 2 * MIB

    @pytest.mark.parametrize("key", HOSTILE_KEYS)
    async def test_hostile_keys_are_refused(self, store: RemoteStore, key: str) -> None:
        body = bytes_body(b"x")
        with pytest.raises(InvalidKey):
            await store.put_blob(key, body)
        with pytest.raises(InvalidKey):
            await store.put_if_absent(key, body)
        with pytest.raises(InvalidKey):
            await store.head_blob(key)
        with pytest.raises(InvalidKey):
            await store.get_blob(key)
        with pytest.raises(InvalidKey):
            await store.delete_blobs([key])
        assert [info async for info in store.list_blobs("")] == []
