"""fsck beside a service that works: what moves while it looks is not called wrong."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app.core.base.tasks import BlockingPool
from app.core.checkpoint.document_store import make_document
from app.core.formats.crc64 import crc64
from app.core.services.fsck import Fsck
from app.core.stores.local.scratch import ScratchStore
from app.core.stores.manifest import ops
from app.core.stores.manifest.store import ManifestStore
from tests.helpers.memory_remote import MemoryRemote
from tests.unit.core.stores.manifest.builders import (
    FakeClock,
    batch,
    chunk,
    create_database,
    job,
    open_store,
    publish,
)

DATA = b"blob"


class Bench:
    def __init__(self, store: ManifestStore, fsck: Fsck, remote: MemoryRemote) -> None:
        self.store, self.fsck, self.remote = store, fsck, remote

    async def publish(self, db_id: int, generation: int, *, stored: bool = True) -> None:
        """Chunk 0 anew; its blob, and where it is `stored` its document, are in the bucket."""
        row = chunk(db_id, 0, generation)
        blob = msgspec.structs.replace(row.blob, bytes=len(DATA), crc64=crc64(DATA))
        row = msgspec.structs.replace(row, blob=blob)
        gone = [
            ops.SupersedeChunk(
                db_id=db_id, chunk_id=0, generation=generation - 1, superseded_at=generation
            )
        ][: generation - 1]
        await self.store.commit(batch(*gone, ops.UpsertChunk(row=row), publish(
            db_id, generation, document_key=f"generations/{db_id}/{generation}"
        )))  # fmt: skip
        self.remote.objects[blob.key] = DATA
        if stored:
            with self.store.read() as view:
                database, number = view.database(db_id), view.generation(db_id, generation)
                assert database is not None
                assert number is not None
                ready = make_document(database, number, view.chunk_states(db_id, generation), ())
            self.remote.objects[ready.key] = ready.data
            durable = ops.AdvanceCheckpointed(db_id=db_id, generation=generation, lsn=10)
            await self.store.commit(batch(durable))

    async def findings(self) -> list[str]:
        return [f"{one.invariant} {one.detail}" for one in (await self.fsck.run()).findings]


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    store, remote = await open_store(tmp_path / "manifest"), MemoryRemote()
    pool = BlockingPool("test", threads=2)
    await create_database(store)
    fsck = Fsck(
        manifest=store, remote=lambda: remote, wal_root=tmp_path / "wal", pool=pool,
        scratch=ScratchStore(tmp_path / "scratch", pool=pool, clock=FakeClock()), quota=None,
    )  # fmt: skip
    yield Bench(store, fsck, remote)
    pool.close_blocking()
    await store.aclose()


def before(
    remote: MemoryRemote, name: str, step: Callable[[], Awaitable[Any]]
) -> Callable[..., Any]:
    """The remote's call `name`, with `step` taken ahead of its first use."""
    call, steps = getattr(remote, name), [step]

    async def late(*args: Any, **options: Any) -> Any:
        if steps:
            await steps.pop()()
        return await call(*args, **options)

    return late


async def test_a_healthy_house_is_clean_and_damage_is_told(bench: Bench) -> None:
    for generation in (1, 2):
        await bench.publish(1, generation)
    assert await bench.findings() == []
    del bench.remote.objects["base-1-0-1"]
    del bench.remote.objects["generations/1/1"]
    assert await bench.findings() == [
        "I2 the blob is not on the remote store", "I3 the generation document is gone",
    ]  # fmt: skip


@pytest.mark.parametrize("call", ["head_blob", "get_blob"])
async def test_what_is_collected_meanwhile_is_not_missed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    for generation in (1, 2):
        await bench.publish(1, generation)

    async def collect() -> None:
        await bench.store.commit(
            batch(
                ops.DeleteGeneration(db_id=1, generation=1),
                ops.DeleteChunk(db_id=1, chunk_id=0, generation=1),
            )
        )
        del bench.remote.objects["base-1-0-1"], bench.remote.objects["generations/1/1"]

    monkeypatch.setattr(bench.remote, call, before(bench.remote, call, collect))
    assert await bench.findings() == []


async def test_a_publication_that_waits_for_its_next_attempt_is_not_wrong(bench: Bench) -> None:
    await bench.publish(1, 1, stored=False)
    assert await bench.findings() == ["I3 published, but its document was never stored"]
    await bench.store.commit(batch(ops.EnqueueJob(job=job(published_generation=1))))
    assert await bench.findings() == []
