"""What asks for merges of small chunks lives with a manifest that has no reader to spare."""

import asyncio
from typing import Any

from app.core.base.clock import SeededRandomness
from app.core.base.errors import ManifestBusy
from app.core.base.events import Events
from app.core.stores.manifest import ops
from app.core.workers.coalescing import Coalescing
from tests.unit.core.stores.manifest.builders import (
    FakeClock,
    batch,
    chunk,
    create_database,
    open_store,
    publish,
)


class Queue:
    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.told = asyncio.Event()

    async def enqueue(self, job: Any, *, join: bool) -> Any:
        self.asked.append((job.kind, job.db_id))
        self.told.set()
        return job


async def test_a_manifest_without_a_reader_to_spare_ends_nothing(tmp_path, monkeypatch):
    manifest, events, queue = await open_store(tmp_path / "manifest"), Events(), Queue()
    await create_database(manifest, engine="append_only")
    rows = [
        ops.UpsertChunk(row=chunk(1, n, 1, first=n + 1, last=n + 1, visible_last=n + 1))
        for n in range(200)
    ]
    await manifest.commit(batch(*rows, publish(1, 1, next_chunk_id=200, last_lsn=200)))
    parts: Any = (manifest, queue)
    coalescing = Coalescing(
        *parts, clock=FakeClock(), randomness=SeededRandomness(1), events=events,
        deadline_seconds=60,
    )  # fmt: skip
    read_in_thread = manifest.read_in_thread

    looked = asyncio.Event()

    async def busy(function: Any) -> Any:
        monkeypatch.setattr(manifest, "read_in_thread", read_in_thread)
        looked.set()
        raise ManifestBusy

    monkeypatch.setattr(manifest, "read_in_thread", busy)
    task = asyncio.get_running_loop().create_task(coalescing.run())
    try:
        async with asyncio.timeout(5):
            events.info("checkpoint.published", db_id=1)
            await looked.wait()
            events.info("checkpoint.published", db_id=1)  # the next publication looks again
            await queue.told.wait()
        assert queue.asked == [("coalesce_chunks", 1)]
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.wait({task})
        await manifest.aclose()
