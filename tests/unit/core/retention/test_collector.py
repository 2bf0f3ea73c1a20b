"""Doom, grace, proof, deletion; and what stops them (fault rows 37, 38, 40)."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from app.core.base.errors import OwnershipLost, RemoteUnavailable
from app.core.base.events import Events
from app.core.formats.crc64 import crc64
from app.core.retention.collector import RETRY_US, BlobCollector
from app.core.retention.orphans import OrphanSweep
from app.core.stores.manifest import ops
from app.core.stores.manifest.errors import KeyDoomed
from app.core.stores.manifest.records import BlobIntent
from app.core.stores.remote.protocol import BlobInfo, BytesBody
from tests.helpers.memory_remote import MemoryRemote
from tests.unit.core.retention.world import World
from tests.unit.core.stores.manifest.builders import (
    batch,
    blob,
    chunk,
    create_database,
    job,
    open_store,
    publish,
    retire,
)

NOW = 1_700_000_000_000_000
ULID = "01JDB4N0Z8Q3V5W7X9Y1A2B3C4"
SECOND = 1_000_000


def chunk_key(number: int, *, ulid: str = ULID) -> str:
    return f"checkpoints/acme/db/0000000001-000001-{ulid}/chunk-{number}-1-{'a' * 64}.blob"


class Remote(MemoryRemote):
    """Notes deletions and listings; may refuse some."""

    def __init__(self) -> None:
        super().__init__()
        self.deletions: list[list[str]] = []
        self.listings = 0
        self.refused: set[str] = set()
        self.break_listing_after: int | None = None
        self.modified_at_us = 0
        self.before_deletion: Callable[[], Awaitable[None]] | None = None

    async def delete_blobs(self, keys: Sequence[str]) -> Sequence[str]:
        self.deletions.append(list(keys))
        if self.before_deletion is not None:
            await self.before_deletion()
        await super().delete_blobs([key for key in keys if key not in self.refused])
        return [key for key in keys if key in self.refused]

    async def list_blobs(self, prefix: str) -> AsyncIterator[BlobInfo]:
        self.listings += 1
        for number, key in enumerate(sorted(self.objects)):
            if number == self.break_listing_after:
                raise RemoteUnavailable("the listing broke off")
            if key.startswith(prefix):
                size = len(self.objects[key])
                yield BlobInfo(
                    key=key, bytes=size, crc64=None, etag="", modified_at_us=self.modified_at_us
                )

    async def add(self, *keys: str) -> None:
        for key in keys:
            await self.put_blob(key, BytesBody(data=b"blob", crc64=crc64(b"blob")))


class Owner:
    lost = False
    confirmed = 0

    async def confirm(self) -> None:
        self.confirmed += 1
        if self.lost:
            raise OwnershipLost("another node owns the prefix")


class Bench:
    def __init__(self, world: World, *, grace: int) -> None:
        self.world, self.store, self.remote, self.owner = world, world.store, Remote(), Owner()
        self.blobs = BlobCollector(
            world.store, lambda: self.remote, self.owner,
            local=self, events=Events(), grace_us=grace * SECOND,
        )  # fmt: skip
        self.forgotten: list[str] = []
        """Blobs whose local copies went."""
        self.orphans = OrphanSweep(world.store, lambda: self.remote)

    async def forget(self, sha256: str) -> None:
        self.forgotten.append(sha256)

    async def sweep(self, *, delete: bool = False, before: int = NOW) -> Any:
        return await self.orphans.run(modified_before_us=before, delete=delete, eligible_at_us=NOW)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    store = await open_store(tmp_path / "manifest", gc_grace_seconds=60.0)
    yield Bench(World(store), grace=60)
    await store.aclose()


async def test_doom_grace_deletion(bench: Bench) -> None:
    await bench.remote.add("k", "other")
    await bench.store.commit(batch(retire("k", eligible_at_us=NOW)))
    assert (await bench.blobs.collect(NOW - 1)).doomed == 0
    assert bench.world.queued() == {"k": False}
    first = await bench.blobs.collect(NOW)
    assert (first.doomed, first.deleted) == (1, 0)
    assert bench.world.queued() == {"k": True}
    assert (await bench.blobs.collect(NOW + 59 * SECOND)).deleted == 0
    assert bench.owner.confirmed == 0
    last = await bench.blobs.collect(NOW + 60 * SECOND)
    assert (last.deleted, last.deleted_bytes) == (1, 100)
    assert set(bench.remote.objects) == {"other"}
    assert bench.world.queued() == {}
    assert bench.owner.confirmed == 1


async def test_idle_asks_the_store_nothing(bench: Bench) -> None:
    bench.remote.unavailable = True
    await bench.store.commit(batch(retire("later", eligible_at_us=NOW + 1)))
    collected = await bench.blobs.collect(NOW)
    assert (collected.doomed, collected.deleted) == (0, 0)
    assert bench.owner.confirmed == 0


@pytest.mark.parametrize("steps", range(6))
async def test_collection_against_publication(bench: Bench, steps: int) -> None:
    """Row 38. Whatever comes first wins, and no row ever names a blob that is deleted. The
    publication begins some turns of the loop after the collection.
    """
    db_id = await create_database(bench.store)
    await bench.remote.add("k")
    await bench.store.commit(batch(retire("k", eligible_at_us=NOW)))
    publication = batch(ops.UpsertChunk(row=chunk(db_id, blob=blob("k"))), publish(db_id))

    async def publish_later() -> None:
        for _ in range(steps):
            await asyncio.sleep(0)
        await bench.store.commit(publication)

    outcomes = await asyncio.gather(
        bench.blobs.collect(NOW), publish_later(), return_exceptions=True
    )
    await bench.blobs.collect(NOW + 10_000 * SECOND)
    with bench.store.read() as view:
        named = view.blob_references("k")
    if isinstance(outcomes[1], KeyDoomed):
        assert (named, bench.remote.objects) == ([], {})
    else:
        assert len(named) == 1
        assert "k" in bench.remote.objects
    assert bench.world.queued() == {}


async def test_a_publication_while_its_blob_is_deleted_is_refused(bench: Bench) -> None:
    """Row 38 at its worst: the store is deleting, and the manifest does not know it yet."""
    db_id = await create_database(bench.store)
    await bench.remote.add("k")
    await bench.store.commit(batch(retire("k", eligible_at_us=NOW)))
    publication = batch(ops.UpsertChunk(row=chunk(db_id, blob=blob("k"))), publish(db_id))

    async def publish_meanwhile() -> None:
        with pytest.raises(KeyDoomed):
            await bench.store.commit(publication)

    bench.remote.before_deletion = publish_meanwhile
    await bench.blobs.collect(NOW)
    await bench.blobs.collect(NOW + 10_000 * SECOND)
    with bench.store.read() as view:
        assert view.blob_references("k") == []
    assert bench.remote.deletions == [["k"]]
    assert bench.world.queued() == {}


async def test_a_row_that_names_a_queued_blob_takes_it_out(bench: Bench) -> None:
    """Even where the queue was filled behind the rows' back: the proof is the transaction's."""
    db_id = await create_database(bench.store)
    await bench.store.commit(
        batch(ops.UpsertChunk(row=chunk(db_id, blob=blob("k"))), publish(db_id))
    )
    await bench.remote.add("k")
    await bench.store.commit(batch(retire("k", eligible_at_us=NOW)))
    assert bench.world.queued() == {}
    await bench.blobs.collect(NOW + 1000 * SECOND)
    assert "k" in bench.remote.objects


async def test_a_job_in_flight_keeps_its_keys(bench: Bench) -> None:
    await bench.remote.add("k")
    intent = BlobIntent(row=chunk(1, blob=blob("k")))
    await bench.store.commit(
        batch(ops.EnqueueJob(job=job(intents=(intent,))), retire("k", eligible_at_us=NOW))
    )
    collected = await bench.blobs.collect(NOW)
    assert (collected.doomed, collected.kept) == (0, 1)
    await bench.blobs.collect(NOW + 1000 * SECOND)
    assert "k" in bench.remote.objects


async def test_who_lost_the_prefix_deletes_nothing(bench: Bench) -> None:
    """I17."""
    await bench.remote.add("k")
    await bench.store.commit(batch(retire("k", eligible_at_us=NOW), ops.DoomBlob(key="k")))
    bench.owner.lost = True
    with pytest.raises(OwnershipLost):
        await bench.blobs.collect(NOW)
    assert bench.remote.deletions == []
    assert bench.world.queued() == {"k": True}


async def test_what_could_not_be_deleted_is_tried_again(bench: Bench) -> None:
    await bench.remote.add("a", "b")
    await bench.store.commit(
        batch(*(retire(key, eligible_at_us=NOW) for key in "ab"), *map(doom, "ab"))
    )
    bench.remote.refused = {"b"}
    collected = await bench.blobs.collect(NOW)
    assert (collected.deleted, collected.failed) == (1, 1)
    assert bench.world.queued() == {"b": True}
    bench.remote.refused = set()
    assert (await bench.blobs.collect(NOW + RETRY_US - 1)).deleted == 0
    assert (await bench.blobs.collect(NOW + RETRY_US)).deleted == 1
    assert bench.remote.objects == {}


def doom(key: str) -> ops.DoomBlob:
    return ops.DoomBlob(key=key)


# --- orphans ----------------------------------------------------------------------------------


async def test_an_upload_that_lands_after_its_collection_is_an_orphan(bench: Bench) -> None:
    """Row 37."""
    key = chunk_key(0)
    await bench.store.commit(batch(retire(key, eligible_at_us=NOW), ops.DoomBlob(key=key)))
    await bench.blobs.collect(NOW)
    await bench.remote.add(key)
    report = await bench.sweep()
    assert [info.key for info in report.orphans] == [key]
    assert (report.queued, bench.world.queued()) == (0, {})
    assert (await bench.sweep(delete=True)).queued == 1
    assert (await bench.sweep(delete=True)).orphans == []  # known now: it is queued
    await bench.blobs.collect(NOW)
    assert bench.remote.objects == {}
    assert bench.forgotten == ["a" * 64] * 2


async def test_what_is_known_young_or_foreign_is_no_orphan(bench: Bench) -> None:
    db_id = await create_database(bench.store)
    published, intended, of_job = chunk_key(1), chunk_key(2), chunk_key(3, ulid="01" + "J" * 24)
    document = f"generations/acme/db/{db_id}/0000000001.json.zst"
    intent = BlobIntent(row=chunk(db_id, blob=blob(intended)))
    await bench.store.commit(
        batch(
            ops.UpsertChunk(row=chunk(db_id, blob=blob(published))),
            publish(db_id, document_key=document),
            ops.EnqueueJob(job=job(job_id="01" + "J" * 24, intents=(intent,))),
        )
    )
    strange = "checkpoints/someone/elses/file"
    await bench.remote.add(published, intended, of_job, document, strange, chunk_key(4))
    report = await bench.sweep(delete=True)
    assert [info.key for info in report.orphans] == [chunk_key(4)]
    assert report.foreign == [strange]
    assert report.listed == 6
    bench.remote.modified_at_us = NOW
    await bench.remote.add(chunk_key(5))
    assert [info.key for info in (await bench.sweep()).orphans] == []


async def test_what_a_probe_left_that_was_cut_short_is_an_orphan(bench: Bench) -> None:
    left = [f"probe/{'0a' * 10}/object", f"probe/{'0b' * 10}/absent"]
    strange = f"probe/{'0a' * 10}/elses"
    await bench.remote.add(*left, strange)
    report = await bench.sweep(delete=True)
    assert sorted(info.key for info in report.orphans) == left
    assert (report.foreign, report.queued) == ([strange], 2)
    await bench.blobs.collect(NOW)
    assert list(bench.remote.objects) == [strange]


@pytest.mark.parametrize("after", [0, 1, 2])
async def test_a_listing_that_breaks_off_deletes_nothing(bench: Bench, after: int) -> None:
    """Row 40."""
    await bench.remote.add(*(chunk_key(number) for number in range(3)))
    bench.remote.break_listing_after = after
    with pytest.raises(RemoteUnavailable):
        await bench.sweep(delete=True)
    assert bench.world.queued() == {}
    await bench.blobs.collect(NOW + 10_000 * SECOND)
    assert len(bench.remote.objects) == 3
