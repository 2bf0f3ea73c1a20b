"""What the retrying store makes of failures. The store inside is a real one (a directory); a thin
layer before it fails as told, before or after the call took effect.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from app.core.base.clock import SeededRandomness
from app.core.base.errors import BopError, CorruptBlob, OutcomeUnknown, RemoteUnavailable
from app.core.base.tasks import BlockingPool
from app.core.stores.remote.directory import DirectoryRemoteStore
from app.core.stores.remote.probe import inspect_endpoint, probe
from app.core.stores.remote.protocol import (
    BlobInfo,
    Body,
    BytesBody,
    RemoteMisconfigured,
    RemoteStore,
    UploadCorrupted,
)
from app.core.stores.remote.requests import ConcurrencyLimit, Retrier, RetryBudget, RetryPolicy
from app.core.stores.remote.retrying import Retrying
from tests.helpers.remote import EventLog, bytes_body


class NoWait:
    def wall_ns(self) -> int:
        return 0

    def monotonic(self) -> float:
        return 0.0

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)


class Faulty(RemoteStore):
    """Calls of an op fail with the errors queued for it, `before` or `after` they take effect."""

    def __init__(self, inner: RemoteStore) -> None:
        self.inner = inner
        self.before: dict[str, list[BopError]] = {}
        self.after: dict[str, list[BopError]] = {}
        self.calls: list[str] = []

    def _check(self, when: dict[str, list[BopError]], op: str) -> None:
        if when.get(op):
            raise when[op].pop(0)

    async def _do(self, op: str, call: Callable[[], object]) -> object:
        self.calls.append(op)
        self._check(self.before, op)
        result = await call()
        self._check(self.after, op)
        return result

    async def put_blob(self, key: str, body: Body) -> BlobInfo:
        return await self._do("put_blob", lambda: self.inner.put_blob(key, body))

    async def put_if_absent(self, key: str, body: BytesBody) -> BlobInfo | None:
        return await self._do("put_if_absent", lambda: self.inner.put_if_absent(key, body))

    async def put_if_match(self, key: str, body: BytesBody, *, etag: str) -> BlobInfo | None:
        return await self._do("put_if_match", lambda: self.inner.put_if_match(key, body, etag=etag))

    async def head_blob(self, key: str) -> BlobInfo | None:
        return await self._do("head_blob", lambda: self.inner.head_blob(key))

    async def get_blob(self, key: str, *, first: int = 0, length: int | None = None) -> bytes:
        return await self._do(
            "get_blob", lambda: self.inner.get_blob(key, first=first, length=length)
        )

    async def iter_blob(
        self, key: str, *, first: int = 0, length: int | None = None
    ) -> AsyncIterator[bytes]:
        self.calls.append(f"iter_blob {first} {length}")
        self._check(self.before, "iter_blob")
        async for piece in self.inner.iter_blob(key, first=first, length=length):
            yield piece
            self._check(self.after, "iter_blob")

    async def delete_blobs(self, keys: Sequence[str]) -> Sequence[str]:
        return await self._do("delete_blobs", lambda: self.inner.delete_blobs(keys))

    async def list_blobs(self, prefix: str) -> AsyncIterator[BlobInfo]:
        async for info in self.inner.list_blobs(prefix):
            yield info

    async def aclose(self) -> None:
        await self.inner.aclose()


class Bench:
    def __init__(self, faulty: Faulty) -> None:
        self.faulty = faulty
        self.limit = ConcurrencyLimit(ceiling=1)
        retrier = Retrier(
            RetryPolicy(attempts_max=3),
            budget=RetryBudget(),
            clock=NoWait(),
            randomness=SeededRandomness(1),
            events=EventLog().events,
        )
        self.store = Retrying(faulty, retrier=retrier, limit=self.limit)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    pool = BlockingPool("test", threads=2)
    try:
        inner = await DirectoryRemoteStore.open(tmp_path / "remote", pool=pool)
        yield Bench(Faulty(inner))
    finally:
        pool.close_blocking()


UNKNOWN, DOWN = OutcomeUnknown("lost"), RemoteUnavailable("down")


async def test_a_lost_answer_is_looked_up_and_adopted(bench: Bench) -> None:
    bench.faulty.after["put_blob"] = [UNKNOWN]
    info = await bench.store.put_blob("a", bytes_body(b"x"))
    assert info == await bench.store.head_blob("a")
    assert bench.faulty.calls[:2] == ["put_blob", "head_blob"]
    assert bench.faulty.calls.count("put_blob") == 1


async def test_a_lost_request_is_looked_up_and_repeated(bench: Bench) -> None:
    bench.faulty.before["put_blob"] = [UNKNOWN]
    await bench.store.put_blob("a", bytes_body(b"x"))
    assert bench.faulty.calls == ["put_blob", "head_blob", "put_blob"]


async def test_unknown_stays_unknown_when_nobody_answers(bench: Bench) -> None:
    bench.faulty.before["put_blob"] = [UNKNOWN]
    bench.faulty.before["head_blob"] = [DOWN, DOWN, DOWN]
    with pytest.raises(OutcomeUnknown) as caught:
        await bench.store.put_blob("a", bytes_body(b"x"))
    assert isinstance(caught.value.__cause__, RemoteUnavailable)


async def test_unknown_stays_unknown_when_the_look_is_forbidden(bench: Bench) -> None:
    bench.faulty.before["put_if_absent"] = [UNKNOWN]
    bench.faulty.before["head_blob"] = [RemoteMisconfigured("no permission")]
    with pytest.raises(OutcomeUnknown):
        await bench.store.put_if_absent("a", bytes_body(b"x"))


@pytest.mark.parametrize("op", ["put_if_absent", "put_if_match"])
async def test_a_conditional_write_with_a_lost_answer_is_adopted(bench: Bench, op: str) -> None:
    start = await bench.faulty.inner.put_if_absent("cell", bytes_body(b"start"))
    assert start is not None
    bench.faulty.after[op] = [UNKNOWN]
    body = bytes_body(b"mine")
    if op == "put_if_absent":
        info = await bench.store.put_if_absent("fresh", body)
    else:
        info = await bench.store.put_if_match("cell", body, etag=start.etag)
    assert info is not None
    assert await bench.store.get_blob(info.key) == b"mine"
    assert bench.faulty.calls.count(op) == 1


async def test_equal_length_and_crc_are_not_enough(bench: Bench) -> None:
    """Bytes are compared: a checksum of another's object may be made equal."""
    body = BytesBody(data=b"mine", crc64=bytes_body(b"them").crc64)
    await bench.faulty.inner.put_blob("cell", bytes_body(b"them"))
    assert await bench.store._equal_object("cell", body) is None


async def test_a_lost_race_is_a_lost_race(bench: Bench) -> None:
    await bench.faulty.inner.put_blob("cell", bytes_body(b"them"))
    assert await bench.store.put_if_absent("cell", bytes_body(b"mine")) is None


async def test_damage_on_the_way_is_tried_once_more(bench: Bench) -> None:
    bench.faulty.before["put_blob"] = [UploadCorrupted("flip")]
    await bench.store.put_blob("a", bytes_body(b"x"))
    bench.faulty.before["put_blob"] = [UploadCorrupted("flip"), UploadCorrupted("flip")]
    with pytest.raises(CorruptBlob):
        await bench.store.put_blob("b", bytes_body(b"x"))
    assert bench.faulty.calls == ["put_blob"] * 4


async def test_a_stream_goes_on_behind_the_last_byte(bench: Bench) -> None:
    data = bytes(range(256)) * 4096
    await bench.faulty.inner.put_blob("a", bytes_body(data))
    bench.faulty.after["iter_blob"] = [DOWN, DOWN, DOWN, DOWN]
    pieces = [piece async for piece in bench.store.iter_blob("a", first=1, length=900_000)]
    assert b"".join(pieces) == data[1:900_001]
    assert bench.faulty.calls[:2] == ["iter_blob 1 900000", "iter_blob 262145 637856"]


async def test_a_stream_without_progress_ends(bench: Bench) -> None:
    await bench.faulty.inner.put_blob("a", bytes_body(b"x"))
    bench.faulty.before["iter_blob"] = [DOWN] * 9
    with pytest.raises(RemoteUnavailable):
        [piece async for piece in bench.store.iter_blob("a")]
    assert len(bench.faulty.calls) == 3


async def test_damage_in_a_stream_is_final(bench: Bench) -> None:
    """Bytes that were handed out cannot be taken back."""
    await bench.faulty.inner.put_blob("a", bytes_body(b"x"))
    bench.faulty.after["iter_blob"] = [CorruptBlob("flip")]
    with pytest.raises(CorruptBlob):
        [piece async for piece in bench.store.iter_blob("a")]


async def test_a_consumer_may_make_requests_while_it_streams(bench: Bench) -> None:
    """With a limit of one: the stream must not hold the slot its consumer needs."""
    await bench.faulty.inner.put_blob("a", bytes_body(bytes(600_000)))
    async with asyncio.timeout(5):
        async for piece in bench.store.iter_blob("a"):
            await bench.store.put_blob("b", bytes_body(piece))
    assert bench.limit.in_flight == 0


async def test_deletions_are_tried_again(bench: Bench) -> None:
    await bench.faulty.inner.put_blob("a", bytes_body(b"x"))
    bench.faulty.after["delete_blobs"] = [UNKNOWN, DOWN]
    assert list(await bench.store.delete_blobs(["a"])) == []
    assert await bench.store.head_blob("a") is None


# --- the probe, against stores that lack something --------------------------------------------


class Unconditional(Faulty):
    async def put_if_absent(self, key: str, body: BytesBody) -> BlobInfo | None:
        return await self.inner.put_blob(key, body)

    async def put_if_match(self, key: str, body: BytesBody, *, etag: str) -> BlobInfo | None:
        return await self.inner.put_blob(key, body)


class WithoutChecksums(Faulty):
    async def head_blob(self, key: str) -> BlobInfo | None:
        found = await self.inner.head_blob(key)
        return found and BlobInfo(
            key=key, bytes=found.bytes, crc64=None, etag=found.etag, modified_at_us=0
        )


class WithoutRanges(Faulty):
    async def get_blob(self, key: str, *, first: int = 0, length: int | None = None) -> bytes:
        return await self.inner.get_blob(key)


class WithoutListing(Faulty):
    async def list_blobs(self, prefix: str) -> AsyncIterator[BlobInfo]:
        return
        yield


class WithoutFirstWrite(Faulty):
    async def put_if_absent(self, key: str, body: BytesBody) -> BlobInfo | None:
        return None


class WithoutMatching(Faulty):
    async def put_if_match(self, key: str, body: BytesBody, *, etag: str) -> BlobInfo | None:
        return None


class WithoutReadAfterWrite(Faulty):
    async def head_blob(self, key: str) -> BlobInfo | None:
        return None


class RefusingRanges(Faulty):
    async def get_blob(self, key: str, *, first: int = 0, length: int | None = None) -> bytes:
        raise RemoteMisconfigured("The endpoint ignores Range.")


class WithWrongChecksums(Faulty):
    async def head_blob(self, key: str) -> BlobInfo | None:
        found = await self.inner.head_blob(key)
        return found and BlobInfo(
            key=key, bytes=found.bytes, crc64=1, etag=found.etag, modified_at_us=0
        )


class KeepingDeleted(Faulty):
    async def delete_blobs(self, keys: Sequence[str]) -> Sequence[str]:
        return keys


class WithoutDeleting(Faulty):
    async def delete_blobs(self, keys: Sequence[str]) -> Sequence[str]:
        return ()


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        (Unconditional, "If-None-Match on PUT is ignored"),
        (Unconditional, "If-Match on PUT is ignored"),
        (WithoutChecksums, "no CRC-64/NVME"),
        (WithoutRanges, "ranged GET"),
        (WithoutListing, "listing"),
        (WithoutDeleting, "still there"),
        (WithoutFirstWrite, "refuses a key that is not there"),
        (WithoutMatching, "refuses the object's own ETag"),
        (WithoutReadAfterWrite, "just written is not there"),
        (RefusingRanges, "ignores Range"),
        (WithWrongChecksums, "another checksum"),
    ],
)
async def test_the_probe_says_what_is_lacking(
    bench: Bench, lacking: type[Faulty], words: str
) -> None:
    store = lacking(bench.faulty.inner)
    report = await inspect_endpoint(store, randomness=SeededRandomness(1))
    assert any(words in text for text in report.lacks)
    with pytest.raises(RemoteMisconfigured, match=words):
        await probe(store, randomness=SeededRandomness(2))


async def test_the_probe_says_that_it_may_not_delete(bench: Bench) -> None:
    with pytest.raises(RemoteMisconfigured, match="s3:DeleteObject"):
        await probe(KeepingDeleted(bench.faulty.inner), randomness=SeededRandomness(2))


async def test_the_probe_leaves_nothing_behind_when_it_fails(bench: Bench) -> None:
    bench.faulty.before["put_if_match"] = [DOWN, DOWN, DOWN]
    with pytest.raises(RemoteUnavailable):
        await probe(bench.store, randomness=SeededRandomness(1))
    assert [info async for info in bench.faulty.inner.list_blobs("")] == []
