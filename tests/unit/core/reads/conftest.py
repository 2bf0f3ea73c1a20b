import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from app.core.base.events import Events
from app.core.base.tasks import BlockingPool
from app.core.formats.record_framing import unpack_records
from app.core.reads.paged_plan import ListedChunks
from app.core.reads.record_reader import RecordReader, RecordStream
from app.core.stores.local.hot_cache import HotCache
from app.core.stores.manifest.records import ChunkRecord
from tests.helpers.fake_clock import FakeClock
from tests.helpers.logs import FakePin, SegmentFile, build_chunk
from tests.helpers.memory_remote import MemoryRemote

MIB = 1 << 20


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@dataclass
class House:
    """A reader on real files, a real hot cache, and a remote store in memory."""

    root: Path
    remote: MemoryRemote
    hot_cache: HotCache
    pool: BlockingPool
    reader: RecordReader
    seen: list[tuple[str, dict]] = field(default_factory=list)
    chunks: list[ChunkRecord] = field(default_factory=list)
    segments: list[SegmentFile] = field(default_factory=list)
    pins: list[FakePin] = field(default_factory=list)

    async def publish(self, segment: SegmentFile, *, cached=False, **options) -> ChunkRecord:
        """A chunk of the segment, on the remote store and, if asked, in the hot cache."""
        path = self.root / f"blob-{len(self.chunks)}"
        row = build_chunk(segment, path, chunk_id=len(self.chunks), **options)
        self.remote.objects[row.blob.key] = path.read_bytes()
        if cached:
            assert await self.hot_cache.admit_link(
                path, sha256=row.blob.sha256.hex(), size_bytes=row.blob.bytes
            )
        else:
            path.unlink()
        self.chunks.append(row)
        return row

    def cached_path(self, row: ChunkRecord) -> Path:
        (path,) = (
            path for path in self.root.rglob("*") if path.name == row.blob.sha256.hex()
        )  # fmt: skip
        return path

    async def open(
        self, from_lsn=1, to_lsn=None, *, limit=None, as_lines=False, next_lsn=None, chunks=None
    ) -> RecordStream:
        pin = FakePin(self.segments)
        self.pins.append(pin)
        ends = [row.visible_last for row in self.chunks]
        ends += [one.durable_last_lsn for one in self.segments]
        return await self.reader.open(
            chunks=chunks or ListedChunks(self.chunks),
            pin=pin,
            next_lsn=max(ends, default=0) + 1 if next_lsn is None else next_lsn,
            from_lsn=from_lsn,
            to_lsn=to_lsn,
            limit=limit,
            as_lines=as_lines,
        )

    async def read(self, from_lsn=1, to_lsn=None, **options) -> list[bytes]:
        return unpack_records(await self.read_bytes(from_lsn, to_lsn, **options))

    async def read_bytes(self, from_lsn=1, to_lsn=None, **options) -> bytes:
        stream = await self.open(from_lsn, to_lsn, **options)
        try:
            pieces = [piece async for piece in stream.content]
        finally:
            await stream.aclose()
        assert all(0 < len(piece) <= MIB for piece in pieces)
        return b"".join(pieces)

    def events(self, name: str) -> list[dict]:
        return [fields for seen, fields in self.seen if seen == name]

    async def wait_served(self, count: int) -> None:
        """Until that many ranges were read and checked."""
        async with asyncio.timeout(10):
            while len(self.events("read.served")) < count:  # noqa: ASYNC110 - on any of its ends
                await asyncio.sleep(0)

    def check_nothing_is_held(self) -> None:
        assert all(pin.releases >= 1 for pin in self.pins)
        assert self.hot_cache.stats().pinned == 0


@pytest.fixture
async def house(tmp_path) -> AsyncIterator[House]:
    seen: list[tuple[str, dict]] = []
    events = Events(lambda name, level, fields: seen.append((name, dict(fields))))
    pool = BlockingPool("test-reads", threads=2)
    remote = MemoryRemote()
    hot_cache = await HotCache.open(
        tmp_path / "hot_cache", limit_bytes=256 * MIB, pool=pool, events=events
    )
    reader = RecordReader(
        remote=lambda: remote, hot_cache=hot_cache, pool=pool, events=events, clock=FakeClock()
    )
    yield House(tmp_path, remote, hot_cache, pool, reader, seen)
    pool.close_blocking()
