"""Retired and doomed blobs: a publication and a collection never cross (I8)."""

import pytest

from app.core.stores.manifest import ops
from app.core.stores.manifest.errors import KeyDoomed, MissingRow, WrongState
from app.core.stores.manifest.store import ManifestStore
from tests.unit.core.stores.manifest.builders import (
    batch,
    blob,
    chunk,
    create_database,
    delta,
    publish,
    retire,
)

LONG = "checkpoints/" + "x" * 600


async def test_retiring_is_ordered_and_idempotent(store: ManifestStore) -> None:
    await store.commit(batch(retire("late", eligible_at_us=9), retire("early", eligible_at_us=3)))
    await store.commit(batch(retire("late", eligible_at_us=1), retire(LONG)))
    with store.read() as view:
        assert [row.key for row in view.gc_rows()] == ["early", LONG, "late"]
        assert [row.key for row in view.gc_rows(limit=1)] == ["early"]
        assert view.gc_row("late").eligible_at_us == 9
        assert view.gc_row("other") is None


@pytest.mark.parametrize("what", ["chunk", "delta", "base"])
async def test_a_publication_that_names_a_doomed_key_is_refused(
    store: ManifestStore, what: str
) -> None:
    db_id = await create_database(store)
    await store.commit(batch(ops.UpsertChunk(row=chunk(db_id)), publish(db_id)))
    await store.commit(batch(retire("k"), ops.DoomBlob(key="k")))
    naming = {
        "chunk": ops.UpsertChunk(row=chunk(db_id, 1, 2, blob=blob("k"))),
        "delta": ops.UpsertChunkDelta(row=delta(db_id, blob=blob("k"))),
        "base": ops.UpsertChunkDelta(row=delta(db_id, base_key="k")),
    }[what]
    with pytest.raises(KeyDoomed):
        await store.commit(batch(naming, publish(db_id, 2)))
    with store.read() as view:
        assert view.database(db_id).generation == 1
        assert view.is_doomed("k")


async def test_a_publication_takes_a_retired_key_back(store: ManifestStore) -> None:
    db_id = await create_database(store)
    await store.commit(batch(retire("k")))
    await store.commit(batch(ops.UpsertChunk(row=chunk(db_id, blob=blob("k"))), publish(db_id)))
    with store.read() as view:
        assert view.gc_rows() == []
        assert not view.is_doomed("k")
    with pytest.raises(MissingRow):
        await store.commit(batch(ops.DoomBlob(key="k")))


async def test_a_doomed_blob_may_be_given_a_time_of_its_own(store: ManifestStore) -> None:
    await store.commit(batch(retire("a", eligible_at_us=5), retire("b", eligible_at_us=5)))
    await store.commit(batch(ops.DoomBlob(key="a", eligible_at_us=9), ops.DoomBlob(key="b")))
    with store.read() as view:
        assert [(row.key, row.eligible_at_us) for row in view.gc_rows()] == [("b", 5), ("a", 9)]


async def test_unretire(store: ManifestStore) -> None:
    await store.commit(batch(ops.UnretireBlob(key="k"), retire("k")))
    await store.commit(batch(ops.UnretireBlob(key="k")))
    await store.commit(batch(retire("k"), ops.DoomBlob(key="k")))
    with pytest.raises(KeyDoomed):
        await store.commit(batch(ops.UnretireBlob(key="k")))


async def test_doom_stays_until_forgotten(store: ManifestStore) -> None:
    await store.commit(batch(retire("k")))
    with pytest.raises(WrongState):
        await store.commit(batch(ops.ForgetBlob(key="k")))
    await store.commit(batch(ops.DoomBlob(key="k")))
    await store.commit(batch(retire("k")))
    with store.read() as view:
        assert view.is_doomed("k")
    await store.commit(batch(ops.ForgetBlob(key="k")))
    with store.read() as view:
        assert view.gc_row("k") is None
        assert view.counts()["gc_key_index"] == 0
