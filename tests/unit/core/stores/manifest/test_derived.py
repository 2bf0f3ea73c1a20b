"""Blobs are retired by the commit in which their last row goes (I8); old manifests get indexes."""

from pathlib import Path

import pytest

from app.core.base.errors import InvariantViolation
from app.core.stores.manifest import ops
from app.core.stores.manifest.errors import KeyDoomed
from app.core.stores.manifest.records import SnapshotRecord
from app.core.stores.manifest.store import ManifestStore
from migrations.runner import load_steps
from tests.unit.core.stores.manifest.builders import (
    batch,
    blob,
    chunk,
    create_database,
    delta,
    open_store,
    publish,
    retire,
)
from tests.unit.core.stores.manifest.test_replay import indexes_of

GRACE_US = 60_000_000


@pytest.fixture
async def store(tmp_path: Path):
    store = await open_store(tmp_path / "manifest", gc_grace_seconds=60.0)
    yield store
    await store.aclose()


async def chain(store: ManifestStore) -> int:
    """A base with a delta against it, both superseded by a rewrite in generation 3."""
    db_id = await create_database(store)
    await store.commit(batch(ops.UpsertChunk(row=chunk(db_id)), publish(db_id)))
    await store.commit(
        batch(
            ops.UpsertChunkDelta(row=delta(db_id, base_key=f"base-{db_id}-0-1")), publish(db_id, 2)
        )
    )
    await store.commit(
        batch(
            ops.SupersedeChunk(db_id=db_id, chunk_id=0, generation=1, superseded_at=3),
            ops.SupersedeChunkDelta(db_id=db_id, chunk_id=0, generation=2, superseded_at=3),
            ops.UpsertChunk(row=chunk(db_id, 0, 3)),
            publish(db_id, 3),
        )
    )
    return db_id


def drop(db_id: int, generation: int) -> ops.DeleteGeneration:
    return ops.DeleteGeneration(db_id=db_id, generation=generation)


async def test_the_last_row_dooms_its_blob_and_its_document(store: ManifestStore) -> None:
    db_id = await chain(store)
    base = ops.DeleteChunk(db_id=db_id, chunk_id=0, generation=1)
    gone = ops.DeleteChunkDelta(db_id=db_id, chunk_id=0, generation=2)
    with pytest.raises(InvariantViolation, match="encoded against"):
        await store.commit(batch(drop(db_id, 1), drop(db_id, 2), base))
    with pytest.raises(InvariantViolation, match="retained generation"):
        await store.commit(batch(drop(db_id, 1), gone, base))
    receipt = await store.commit(batch(drop(db_id, 1), drop(db_id, 2), gone, base))
    assert receipt.sequence is not None
    now_us = 1_700_000_000_000_000
    with store.read() as view:
        queued = {row.key: row for row in view.gc_rows()}
        assert set(queued) == {
            "generations/1", "generations/2", f"base-{db_id}-0-1", f"delta-{db_id}-0-2",
        }  # fmt: skip
        assert all(row.doomed for row in queued.values())
        assert {row.eligible_at_us for row in queued.values()} == {now_us + GRACE_US}
        assert queued[f"base-{db_id}-0-1"].bytes == 100
        keys = [row.key for row in view.gc_rows()]
        assert keys[0].startswith("generations/")  # documents before what they name
        assert view.superseded_chunks(db_id, behind=0, through=None) == []
    again = chunk(db_id, 1, 4, blob=blob(f"base-{db_id}-0-1"))
    with pytest.raises(KeyDoomed):
        await store.commit(batch(ops.UpsertChunk(row=again), publish(db_id, 4)))


async def test_a_blob_that_another_row_names_is_not_retired(store: ManifestStore) -> None:
    db_id = await chain(store)
    other = await create_database(store, name="other")
    shared = chunk(other, 0, 1, blob=blob(f"base-{db_id}-0-1"))
    await store.commit(batch(ops.UpsertChunk(row=shared), publish(other)))
    await store.commit(
        batch(
            drop(db_id, 1),
            drop(db_id, 2),
            ops.DeleteChunkDelta(db_id=db_id, chunk_id=0, generation=2),
            ops.DeleteChunk(db_id=db_id, chunk_id=0, generation=1),
        )
    )
    with store.read() as view:
        assert view.gc_row(f"base-{db_id}-0-1") is None
        [reference] = view.blob_references(f"base-{db_id}-0-1")
        assert (reference.kind, reference.db_id, reference.generation) == ("chunk", other, 1)
    await store.commit(batch(retire(f"base-{db_id}-0-1")))
    with store.read() as view:
        assert view.gc_row(f"base-{db_id}-0-1") is None


async def test_a_queued_blob_that_a_row_names_is_not_doomed(store: ManifestStore) -> None:
    await store.commit(batch(retire("k", eligible_at_us=5)))
    receipt = await store.commit(batch(ops.DoomBlob(key="k", eligible_at_us=9)))
    assert receipt.results == (True,)
    with store.read() as view:
        assert view.gc_row("k").eligible_at_us == 9
    db_id = await create_database(store)
    await store.commit(
        batch(ops.UpsertChunkDelta(row=delta(db_id, generation=1, base_key="b")), publish(db_id))
    )
    with store.read() as view:
        assert [one.kind for one in view.blob_references("b")] == ["base"]


async def test_a_snapshot_that_goes_takes_its_document_along(store: ManifestStore) -> None:
    db_id = await chain(store)
    row = SnapshotRecord(
        db_id=db_id, name="s", generation=1, last_lsn=1, page_count=1, created_at_us=1,
        document=blob("snapshots/s"),
    )  # fmt: skip
    await store.commit(batch(ops.CreateSnapshot(row=row)))
    await store.commit(batch(ops.DeleteSnapshot(db_id=db_id, name="s")))
    with store.read() as view:
        assert view.gc_row("snapshots/s").doomed
    with pytest.raises(KeyDoomed):
        await store.commit(batch(ops.CreateSnapshot(row=row)))


async def test_superseded_rows_are_found_by_the_generation_they_ended_in(
    store: ManifestStore,
) -> None:
    db_id = await chain(store)
    with store.read() as view:
        assert view.superseded_chunks(db_id, behind=2, through=3) == [0]
        assert view.superseded_chunks(db_id, behind=0, through=2) == []
        assert view.superseded_chunks(db_id, behind=3, through=None) == []
        assert view.superseded_chunks(db_id + 1, behind=0, through=None) == []


async def test_a_manifest_from_before_gets_its_indexes(tmp_path: Path) -> None:
    path = tmp_path / "old"
    store = await open_store(path)
    await chain(store)
    with store.read() as view:
        expected = indexes_of(view)
    assert expected["superseded_index"]
    environment = store._environment
    transaction = environment.begin(write=True)
    for name in expected:
        table = next(one for one in environment.handles if one.name == name)
        transaction.drop(environment.handles[table], delete=False)
    schema = next(one for one in environment.handles if one.name == "schema")
    transaction.delete(b"migration/0002", db=environment.handles[schema])
    transaction.commit()
    await store.aclose()
    store = await open_store(path, migrations=load_steps())
    with store.read() as view:
        assert view.derived_indexes() == expected
    await store.aclose()
