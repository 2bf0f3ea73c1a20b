"""Bodies that are read again: in memory, in a file, refused, left."""

import asyncio
import errno
import os
import threading
from pathlib import Path

import pytest

from app.core.base.errors import BodyTooLarge, DiskFull, ImageInvalid, InvalidRequest
from app.routers.bodies import BodyLimits, BodyMemory, BodyReader, Spool
from app.routers.exchange import ClientGone, Exchange
from app.routers.raw_bodies import HELD_BYTES_MAX, WRITE_BYTES, HeldBody, RawBody, SpooledBody
from tests.helpers.fake_clock import FakeClock
from tests.helpers.wait import wait_until

KIB = 1024
LIMITS = BodyLimits(
    bytes_max=64 * KIB * KIB, limit_name="max_wal_bytes", idle_timeout_seconds=5.0,
    bytes_per_second_min=0,
)  # fmt: skip


class Randomness:
    def bits(self, count: int) -> int:
        return 7


def reader_of(*pieces: bytes, broken: bool = False) -> BodyReader:
    messages = [
        {"type": "http.request", "body": piece, "more_body": broken or index < len(pieces) - 1}
        for index, piece in enumerate(pieces)
    ]
    if broken:
        messages.append({"type": "http.disconnect"})

    async def receive():
        return messages.pop(0)

    async def send(_): ...

    exchange = Exchange({"headers": []}, receive, send, Randomness())
    return BodyReader(exchange, LIMITS, clock=FakeClock())


@pytest.fixture
def spool(tmp_path: Path):
    made = Spool(tmp_path / "spool")
    yield made
    made.close_blocking()


def pieces_of(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)] or [b""]


@pytest.mark.parametrize(
    ("size", "memory_bytes", "kind"),
    [
        (0, 0, HeldBody),
        (10_000, 10_000, HeldBody),
        (10_000, 9_999, SpooledBody),
        (HELD_BYTES_MAX, 1 << 30, HeldBody),
        (HELD_BYTES_MAX + 1, 1 << 30, SpooledBody),
        (3 * WRITE_BYTES + 17, 64 * KIB, SpooledBody),
    ],
)
async def test_a_body_is_read_again_at_any_place(spool, tmp_path, size, memory_bytes, kind):
    data = os.urandom(size)
    memory = BodyMemory(memory_bytes)
    async with RawBody(reader_of(*pieces_of(data, 5000)), memory=memory, spool=spool) as raw:
        body = await raw.read()
        assert type(body) is kind
        assert body.size_bytes == size
        assert memory.used_bytes == (size if kind is HeldBody else 0)
        assert bytes(body.read_blocking(0, size)) == data
        for at in range(0, size, max(1, size // 7)):
            assert bytes(body.read_blocking(at, min(999, size - at))) == data[at : at + 999]
        assert not (tmp_path / "spool").exists() or not list((tmp_path / "spool").iterdir())
    assert memory.used_bytes == 0


async def test_a_file_that_is_too_short_is_a_failure(spool):
    data = bytes(10_000)
    async with RawBody(reader_of(data), memory=BodyMemory(0), spool=spool) as raw:
        body = await raw.read()
        with pytest.raises(OSError, match="shorter") as caught:
            body.read_blocking(9_000, 1_001)
        assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("memory_bytes", [0, 1 << 20])
async def test_the_head_is_looked_at_as_soon_as_it_is_there(spool, memory_bytes):
    seen: list[bytes] = []
    memory = BodyMemory(memory_bytes)

    def refuse(head: bytes) -> None:
        seen.append(head)
        raise ImageInvalid

    reader = reader_of(b"a" * 60, b"b" * 60, *[b"c" * 60] * 5)
    with pytest.raises(ImageInvalid):
        async with RawBody(
            reader, memory=memory, spool=spool, head_bytes=100, check_head=refuse
        ) as raw:
            await raw.read()
    assert seen == [b"a" * 60 + b"b" * 40]
    assert await reader.read_piece() == b"c" * 60  # no more than needed was read
    assert memory.used_bytes == 0

    seen.clear()
    reader = reader_of(b"short")
    with pytest.raises(ImageInvalid):
        async with RawBody(
            reader, memory=memory, spool=spool, head_bytes=100, check_head=refuse
        ) as raw:
            await raw.read()
    assert seen == [b"short"]


@pytest.mark.parametrize("count", [1, 200])
async def test_a_body_that_breaks_off_leaves_nothing(spool, tmp_path, count):
    memory = BodyMemory(100 * KIB)
    with pytest.raises(ClientGone):
        async with RawBody(
            reader_of(*[b"x" * KIB] * count, broken=True), memory=memory, spool=spool
        ) as raw:
            await raw.read()
    assert memory.used_bytes == 0
    assert not list((tmp_path / "spool").glob("*"))


async def test_a_body_over_the_limit_is_refused(spool):
    memory = BodyMemory(1 << 20)
    piece = b"x" * (8 * KIB * KIB)
    with pytest.raises(BodyTooLarge):
        async with RawBody(reader_of(*[piece] * 9), memory=memory, spool=spool) as raw:
            await raw.read()
    assert memory.used_bytes == 0


async def test_a_thread_may_read_on_when_the_request_is_gone(spool):
    async with RawBody(reader_of(bytes(10_000)), memory=BodyMemory(0), spool=spool) as raw:
        body = await raw.read()
    assert len(await asyncio.to_thread(body.read_blocking, 0, 10_000)) == 10_000


class Drafted:
    """Takes what comes, in the spool's threads."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.data = bytearray()
        self.calls: list[str] = []
        self.closed = threading.Event()
        self.failure: Exception | None = None

    def append_blocking(self, piece: bytes | bytearray) -> None:
        self.calls.append("append")
        if self.failure is not None:
            raise self.failure
        self.data += piece

    def sync_blocking(self) -> None:
        self.calls.append("sync")

    def read_blocking(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def close_blocking(self) -> None:
        self.closed.set()


@pytest.mark.parametrize("is_taken", [True, False])
async def test_a_large_body_goes_where_it_is_said_to(spool, is_taken):
    data = os.urandom(WRITE_BYTES * 5 + 17)
    drafted = Drafted(len(data))
    asked: list[bytes] = []

    async def draft(head: bytes) -> Drafted | None:
        asked.append(head)
        return drafted if is_taken else None

    pieces = reader_of(*pieces_of(data, 30))
    memory = BodyMemory(64 * KIB)
    async with RawBody(
        pieces, memory=memory, spool=spool, head_bytes=100, check_head=lambda head: None,
        draft=draft,
    ) as raw:  # fmt: skip
        body = await raw.read()
        assert asked == [data[:100]]
        assert type(body) is (Drafted if is_taken else SpooledBody)
        assert bytes(body.read_blocking(0, len(data))) == data
        assert memory.used_bytes == 0
        assert not drafted.closed.is_set()
    assert (await asyncio.to_thread(drafted.closed.wait, 30)) if is_taken else not drafted.calls
    assert ("sync" in drafted.calls) == is_taken


@pytest.mark.parametrize("size", [0, 1000, HELD_BYTES_MAX])
async def test_a_body_that_memory_holds_asks_for_no_draft(spool, size):
    async def draft(head: bytes) -> None:
        raise AssertionError

    reader = reader_of(*pieces_of(bytes(size), 100_000))
    async with RawBody(reader, memory=BodyMemory(1 << 30), spool=spool, draft=draft) as raw:
        assert type(await raw.read()) is HeldBody


@pytest.mark.parametrize("failure", [DiskFull(), OSError(errno.EIO, "Input/output error"), None])
async def test_a_draft_that_fails_or_is_of_another_length_is_closed(spool, failure):
    drafted = Drafted(WRITE_BYTES * 9)
    drafted.failure = failure
    reader = reader_of(*pieces_of(bytes(WRITE_BYTES * 8), 100_000))

    async def draft(head: bytes) -> Drafted:
        return drafted

    with pytest.raises(InvalidRequest if failure is None else type(failure)):
        async with RawBody(reader, memory=BodyMemory(0), spool=spool, draft=draft) as raw:
            await raw.read()
    assert await asyncio.to_thread(drafted.closed.wait, 30)
    if failure is not None:
        assert drafted.calls.count("append") == 1


async def test_a_draft_may_refuse_the_body(spool):
    async def draft(head: bytes) -> None:
        raise ImageInvalid

    reader = reader_of(*pieces_of(bytes(WRITE_BYTES * 8), WRITE_BYTES))
    with pytest.raises(ImageInvalid):
        async with RawBody(reader, memory=BodyMemory(0), spool=spool, draft=draft) as raw:
            await raw.read()
    assert await reader.read_piece() == bytes(WRITE_BYTES)


async def test_a_spool_file_is_closed_by_the_spools_threads(spool, monkeypatch):
    """With gigabytes in it that takes as long as hundreds of requests."""
    closed: list[str] = []
    really_close = os.close

    def close(fd: int) -> None:
        closed.append(threading.current_thread().name)
        really_close(fd)

    async with RawBody(reader_of(bytes(10_000)), memory=BodyMemory(0), spool=spool) as raw:
        body = await raw.read()
        fd = body._file.fd
        monkeypatch.setattr("app.routers.bodies.os.close", close)
        del body
    await wait_until(lambda: len(closed) == 1)
    assert closed[0].startswith("spool")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
