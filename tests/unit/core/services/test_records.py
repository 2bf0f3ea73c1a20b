"""Reads of records, from a log with very many chunks."""

import asyncio
import gc
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from app.core.base.events import Events
from app.core.base.tasks import BlockingPool
from app.core.formats.record_framing import unpack_records
from app.core.reads.read_point import GenerationPins
from app.core.reads.record_reader import RecordReader
from app.core.services.records import Records
from app.core.stores.local.hot_cache import HotCache
from app.core.stores.manifest import ops
from app.core.stores.manifest.store import ManifestStore
from tests.helpers.logs import FakePin, build_chunk, build_segment
from tests.helpers.memory_remote import MemoryRemote
from tests.unit.core.stores.manifest.builders import (
    MIB,
    batch,
    chunk,
    create_database,
    open_store,
    publish,
)

CHUNK_RECORDS = 10
HELD_SECONDS_MAX = 0.02


class House:
    """A log of so many chunks, of which the first and the last are really there."""

    def __init__(
        self, manifest: ManifestStore, reader: RecordReader, db_id: int, *, chunks: int
    ) -> None:
        self.last_lsn = chunks * CHUNK_RECORDS
        self.manifest = manifest
        self.pin = FakePin(())
        self.pins = GenerationPins()
        log = SimpleNamespace(
            next_lsn=self.last_lsn + 1, health="ok", pin=lambda first, last: self.pin
        )
        record = SimpleNamespace(db_id=db_id)
        directory: Any = SimpleNamespace(require=lambda tenant, name, engine: (record, log))
        self.records = Records(manifest, directory, reader, pins=self.pins, record_bytes_max=MIB)

    async def read_first_piece(self, from_lsn: int) -> tuple[list[bytes], tuple[int | None, ...]]:
        stream = await self.records.open_read(
            "acme", "log", from_lsn=from_lsn, to_lsn=None, limit=None, wait_seconds=0,
            as_lines=False,
        )  # fmt: skip
        try:
            piece = await anext(stream.content)
        finally:
            await stream.aclose()
        assert self.pin.releases
        return unpack_records(piece), (stream.first_lsn, stream.last_lsn, stream.next_lsn)


def records_of(chunk_id: int) -> list[bytes]:
    return [b"%d" % (chunk_id * CHUNK_RECORDS + number + 1) for number in range(CHUNK_RECORDS)]


@asynccontextmanager
async def long_log(tmp_path: Path, *, chunks: int) -> AsyncIterator[House]:
    manifest = await open_store(tmp_path / "manifest", map_bytes=1024 * MIB)
    db_id = await create_database(manifest, engine="append_only")
    pool, remote = BlockingPool("reads", threads=2), MemoryRemote()
    hot_cache = await HotCache.open(tmp_path / "hot", limit_bytes=MIB, pool=pool, events=Events())
    reader = RecordReader(remote=lambda: remote, hot_cache=hot_cache, pool=pool, events=Events())
    rows = [
        chunk(
            db_id, number, first=number * CHUNK_RECORDS + 1, last=(number + 1) * CHUNK_RECORDS,
            visible_last=(number + 1) * CHUNK_RECORDS,
        )
        for number in range(chunks)
    ]  # fmt: skip
    for number in (0, chunks - 1):
        segment = build_segment(
            tmp_path / f"segment-{number}", [records_of(number)],
            first_lsn=number * CHUNK_RECORDS + 1, db_id=db_id,
        )  # fmt: skip
        row = build_chunk(segment, tmp_path / f"chunk-{number}", chunk_id=number)
        rows[number] = row = msgspec.structs.replace(row, db_id=db_id, origin_db_id=db_id)
        assert row.blob is not None
        remote.objects[row.blob.key] = (tmp_path / f"chunk-{number}").read_bytes()
    await manifest.commit(
        batch(
            *(ops.UpsertChunk(row=row) for row in rows),
            publish(db_id, next_chunk_id=chunks, last_lsn=chunks * CHUNK_RECORDS),
        )
    )
    del rows
    yield House(manifest, reader, db_id, chunks=chunks)
    pool.close_blocking()
    await manifest.aclose()


@asynccontextmanager
async def held() -> AsyncIterator[list[float]]:
    """Processor time that the event loop's thread spent in one turn; collections are left out, of
    which a process of tests has long ones.
    """
    turns: list[float] = []

    async def watch() -> None:
        last = time.thread_time()
        while True:
            await asyncio.sleep(0)
            now = time.thread_time()
            turns.append(now - last)
            last = now

    gc.collect()
    gc.disable()
    watching = asyncio.create_task(watch())
    try:
        yield turns
    finally:
        watching.cancel()
        gc.enable()


async def test_a_read_of_all_of_a_long_log_never_holds_the_loop(tmp_path: Path) -> None:
    async with long_log(tmp_path, chunks=100_000) as house:
        async with held() as turns:
            records, lsns = await house.read_first_piece(1)
        assert records == records_of(0)
        assert lsns == (1, house.last_lsn, house.last_lsn + 1)
        assert max(turns) < HELD_SECONDS_MAX


async def test_a_read_of_its_end_needs_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unexpected(self: ManifestStore, function: Any) -> Any:
        raise AssertionError("rows near the end are looked at at once")

    async with long_log(tmp_path, chunks=1_000) as house:
        monkeypatch.setattr(ManifestStore, "read_in_thread", unexpected)
        records, lsns = await house.read_first_piece(house.last_lsn - 3)
        assert records == records_of(999)[-4:]
        assert lsns == (house.last_lsn - 3, house.last_lsn, house.last_lsn + 1)
