"""What a document in the bucket says about the age of this data directory (I14)."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.core.base.errors import StartRefused
from app.core.stores.manifest import ops
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.remote.keys import generation_document_key
from app.core.workers import older_copy
from app.core.workers.older_copy import refuse_older_copy
from tests.helpers.memory_remote import MemoryRemote
from tests.unit.core.stores.manifest.builders import batch, create_database, open_store, publish


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[ManifestStore]:
    store = await open_store(tmp_path / "manifest")
    yield store
    await store.aclose()


def document(db_id: int, generation: int, name: str = "db") -> str:
    return generation_document_key(tenant="acme", database=name, db_id=db_id, generation=generation)


async def test_as_new_as_the_bucket_is_taken(store: ManifestStore) -> None:
    db_id = await create_database(store)
    remote = MemoryRemote()
    await refuse_older_copy(store, remote)
    await store.commit(batch(publish(db_id)))
    await refuse_older_copy(store, remote)  # its document is still to be written
    remote.objects[document(db_id, 1)] = b""
    remote.objects[document(db_id + 1, 9, "another")] = b""
    remote.objects[f"generations/acme/db/{db_id}/notes.txt"] = b""
    await refuse_older_copy(store, remote)


async def test_a_later_document_is_told_with_what_to_do(store: ManifestStore) -> None:
    """Also where those between have expired."""
    db_id = await create_database(store)
    await store.commit(batch(publish(db_id)))
    remote = MemoryRemote()
    remote.objects[document(db_id, 7)] = b""
    with pytest.raises(StartRefused, match=r"acme/db is at generation 1 .* generation 7.* recover"):
        await refuse_older_copy(store, remote)
    await store.commit(batch(ops.SetDatabaseState(db_id=db_id, state="tombstoned")))
    await refuse_older_copy(store, remote)


async def test_so_many_are_looked_up_the_latest_published_first(
    store: ManifestStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(older_copy, "LOOKED_UP_MAX", 2)
    for number, committed_at_us in enumerate((30, 10, 20)):
        db_id = await create_database(store, name=f"db{number}")
        await store.commit(batch(publish(db_id, committed_at_us=committed_at_us)))
    with store.read() as view:
        assert [one.name for one in older_copy.latest_first(view)] == ["db0", "db2"]
