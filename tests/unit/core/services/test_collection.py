"""Why a blob is kept: every reason is told, and none of another tenant's (I12)."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from app.core.services.collection import BlobExplanation, Collection
from app.core.stores.manifest import ops
from app.core.stores.manifest.records import BlobIntent, SnapshotRecord
from app.core.workers.collector import Collector
from tests.unit.core.retention.test_collector import chunk_key
from tests.unit.core.retention.world import World
from tests.unit.core.stores.manifest.builders import (
    batch,
    blob,
    chunk,
    job,
    open_store,
    publish,
    retire,
)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    store = await open_store(tmp_path / "manifest", gc_grace_seconds=60.0)
    yield World(store)
    await store.aclose()


async def explain(world: World, key: str, *tenants: str) -> BlobExplanation:
    service = Collection(world.store, cast("Collector", None), world.pins)
    return await service.explain(key, sees=lambda tenant: not tenants or tenant in tenants)


def kinds(explanation: BlobExplanation) -> set[str]:
    return {reason.kind for reason in explanation.reasons}


async def test_rows_readers_snapshots_and_forks(world: World) -> None:
    db_id = await world.create()
    await world.publish(db_id, 0, "base")
    assert kinds(await explain(world, "base-1-0-1")) == {"chunk_row", "newest_generation"}
    await world.publish(db_id, 0, "base")
    await world.publish(db_id, 0, "delta")  # against the second base
    await world.publish(db_id, 0, "base")
    fork = await world.fork(db_id, 1)
    row = SnapshotRecord(
        db_id=db_id, name="s", generation=2, last_lsn=1, page_count=1, created_at_us=1
    )
    await world.store.commit(batch(ops.CreateSnapshot(row=row)))
    world.hold(db_id, 2)
    first = await explain(world, "base-1-0-1")
    assert kinds(first) == {"chunk_row", "retained_generations", "fork"}
    assert {"tenant": "acme", "database": f"d{fork}"} in [one.fields for one in first.reasons]
    second = await explain(world, "base-1-0-2")
    assert kinds(second) == {
        "chunk_row", "base_of_delta", "retained_generations", "snapshot", "reader",
    }  # fmt: skip
    assert kinds(await explain(world, "delta-1-0-3")) == {"delta_row", "retained_generations"}


async def test_jobs_documents_and_the_queue(world: World) -> None:
    await world.create()
    key = chunk_key(0)
    intent = BlobIntent(row=chunk(1, blob=blob(key)))
    await world.store.commit(batch(ops.EnqueueJob(job=job(intents=(intent,)))))
    told = await explain(world, key)
    assert (told.state, kinds(told)) == ("kept", {"job"})
    document = "generations/acme/d1/1/0000000001.json.zst"
    await world.store.commit(batch(publish(1, document_key=document)))
    assert kinds(await explain(world, document)) == {"generation_document"}
    assert kinds(await explain(world, "owner.json")) == {"owner"}
    await world.store.commit(batch(retire(chunk_key(1), eligible_at_us=7)))
    told = await explain(world, chunk_key(1))
    assert (told.state, told.eligible_at_us) == ("retired", 7)
    await world.store.commit(batch(ops.DoomBlob(key=chunk_key(1))))
    assert (await explain(world, chunk_key(1))).state == "doomed"
    assert (await explain(world, chunk_key(2))).state == "unknown"


async def test_another_tenants_blob_is_not_known(world: World) -> None:
    db_id = await world.create()
    row: Any = chunk(db_id, blob=blob(chunk_key(0)))
    await world.store.commit(batch(ops.UpsertChunk(row=row), publish(db_id)))
    assert (await explain(world, chunk_key(0), "acme")).state == "kept"
    assert (await explain(world, chunk_key(0), "zeta")).state == "unknown"
