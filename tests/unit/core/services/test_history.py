"""Snapshots and forks over a real manifest and a remote store that fails as told."""

import asyncio
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app.core.base.errors import (
    CorruptBlob,
    DatabaseConflict,
    DatabaseNotFound,
    DiskFull,
    FormatFromFuture,
    GenerationExpired,
    NoGeneration,
    NotFound,
    SnapshotExists,
    SnapshotNotFound,
)
from app.core.base.events import Events
from app.core.checkpoint.generation_document import decode_document
from app.core.checkpoint.history_objects import HistoryObjects
from app.core.retention.selection import select_generation
from app.core.retention.snapshot_document import (
    decode_snapshot,
    encode_snapshot,
    restored_snapshot,
)
from app.core.services.forks import Forks, forked
from app.core.services.history import History
from app.core.services.recovery import pinned_rows
from app.core.services.snapshots import Snapshots
from app.core.stores.manifest import ops
from app.core.stores.manifest.lineage import FORK_DEPTH_MAX
from app.core.stores.manifest.records import DatabaseRecord, Retention, SnapshotRecord
from app.core.stores.manifest.store import ManifestStore
from app.core.workers.history_upload import HistoryUpload
from tests.helpers.memory_remote import MemoryRemote
from tests.unit.core.stores.manifest.builders import (
    FakeClock,
    batch,
    chunk,
    create_database,
    descriptor,
    open_store,
    publish,
)


class Directory:
    """Names over the manifest; notes which logs were opened."""

    def __init__(self, store: ManifestStore) -> None:
        self.store = store
        self.opened: list[int] = []

    def read(self, tenant: str, name: str) -> DatabaseRecord:
        with self.store.read() as view:
            db_id = view.database_id(tenant, name)
            record = None if db_id is None else view.database(db_id)
        if record is None:
            raise DatabaseNotFound
        return record

    async def open(self, db_id: int) -> None:
        self.opened.append(db_id)


class Bench:
    def __init__(self, store: ManifestStore) -> None:
        self.store, self.remote, self.clock = store, MemoryRemote(), FakeClock()
        self.directory, self.durable = Directory(store), []
        self.objects = HistoryObjects(
            manifest=store, remote=lambda: self.remote, on_durable=self.durable.append,
            events=Events(),
        )  # fmt: skip
        self.upload = HistoryUpload(
            self.objects, ready=self.ready, clock=self.clock, events=Events()
        )
        parts: Any = (store, self.directory, self.upload)
        self.snapshots = Snapshots(*parts, clock=self.clock, events=Events())
        self.forks = Forks(*parts, clock=self.clock, events=Events())

    async def ready(self) -> None:
        pass

    async def publish(self, db_id: int, generation: int, **fields: Any) -> None:
        key = f"generations/acme/db/{db_id}/{generation:010d}.json.zst"
        rows = [ops.UpsertChunk(row=chunk(db_id, generation - 1, generation, **fields))]
        row = publish(db_id, generation, next_chunk_id=generation, document_key=key)
        await self.store.commit(batch(*rows, row))

    async def expire(self, db_id: int, generation: int) -> None:
        await self.store.commit(batch(ops.DeleteGeneration(db_id=db_id, generation=generation)))


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    store = await open_store(tmp_path / "manifest")
    await create_database(store)
    yield Bench(store)
    await store.aclose()


def objects(bench: Bench, prefix: str) -> list[str]:
    return [key for key in bench.remote.objects if key.startswith(prefix)]


# --- snapshots


async def test_a_snapshot_is_refused_with_its_reason(bench: Bench) -> None:
    with pytest.raises(NoGeneration):
        await bench.snapshots.create("acme", "db", "s")
    await bench.publish(1, 1)
    await bench.publish(1, 2)
    await bench.expire(1, 1)
    with pytest.raises(GenerationExpired):
        await bench.snapshots.create("acme", "db", "s", generation=1)
    with pytest.raises(NotFound):
        await bench.snapshots.create("acme", "db", "s", generation=3)
    await bench.snapshots.create("acme", "db", "s")
    with pytest.raises(SnapshotExists):
        await bench.snapshots.create("acme", "db", "s")
    with pytest.raises(SnapshotNotFound):
        await bench.snapshots.delete("acme", "db", "t")


async def test_a_snapshot_stands_while_the_remote_store_is_away(bench: Bench) -> None:
    await bench.publish(1, 1)
    bench.remote.unavailable = True
    row = await bench.snapshots.create("acme", "db", "s")
    assert bench.snapshots.get("acme", "db", "s") == row
    assert not await bench.upload.run_once()
    bench.remote.unavailable = False
    assert await bench.upload.run_once()
    assert bench.snapshots.get("acme", "db", "s").document_stored
    (key,) = objects(bench, "snapshots/acme/db/s/meta-")
    data = bench.remote.objects[key]
    restored = restored_snapshot(decode_snapshot(data, key=key), data=data, key=key)
    assert restored == msgspec.structs.replace(row, document_stored=True)


async def test_a_snapshot_that_cannot_be_marked_stands_all_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was made: an answer that says otherwise would be a lie (I13)."""
    await bench.publish(1, 1)
    commit = bench.store.commit

    async def full(asked: ops.ManifestBatch) -> Any:
        if asked.reason == "snapshot.stored":
            raise DiskFull
        return await commit(asked)

    monkeypatch.setattr(bench.store, "commit", full)
    row = await bench.snapshots.create("acme", "db", "s")
    assert bench.snapshots.get("acme", "db", "s") == row
    assert not await bench.upload.run_once()
    monkeypatch.undo()
    assert await bench.upload.run_once()
    assert bench.snapshots.get("acme", "db", "s").document_stored


async def test_two_who_change_retention_at_once_both_do(bench: Bench) -> None:
    directory: Any = bench.directory
    history = History(bench.store, directory, now_us=lambda: 0, events=Events())

    def change(**fields: int) -> Callable[[Retention], Retention]:
        return lambda retention: msgspec.structs.replace(retention, **fields)

    await asyncio.gather(
        history.set_retention("acme", "db", change(keep_generations=7)),
        history.set_retention("acme", "db", change(keep_seconds=5)),
        history.set_retention("acme", "db", change(minimum_generations=3)),
    )
    assert bench.directory.read("acme", "db").retention == Retention(
        keep_generations=7, keep_seconds=5, minimum_generations=3
    )


async def test_a_document_that_lands_behind_the_deletion_is_taken_away(bench: Bench) -> None:
    await bench.publish(1, 1)
    bench.remote.unavailable = True
    row = await bench.snapshots.create("acme", "db", "s")
    bench.remote.unavailable = False
    await bench.snapshots.delete("acme", "db", "s")
    assert row.document is not None
    key = row.document.key
    await bench.store.commit(batch(ops.ForgetBlob(key=key)))  # collected before it landed
    await bench.objects.store_snapshot(row)
    assert objects(bench, "snapshots/") == [key]
    with bench.store.read() as view:
        assert view.gc_row(key) is not None  # it goes the way of all objects


async def test_a_document_does_not_count_for_another_snapshot_of_the_name(bench: Bench) -> None:
    """Deleted and made again, of another generation, while the first one's was on its way."""
    await bench.publish(1, 1)
    await bench.publish(1, 2)
    bench.remote.unavailable = True
    first = await bench.snapshots.create("acme", "db", "s", generation=1)
    await bench.snapshots.delete("acme", "db", "s")
    second = await bench.snapshots.create("acme", "db", "s", generation=2)
    bench.remote.unavailable = False
    await bench.objects.store_snapshot(first)
    assert not bench.snapshots.get("acme", "db", "s").document_stored
    assert await bench.upload.run_once()
    assert bench.snapshots.get("acme", "db", "s").document_stored
    assert second.document is not None
    assert second.document.key in bench.remote.objects


def test_a_snapshot_document_that_is_not_one() -> None:
    row = SnapshotRecord(db_id=1, name="s", generation=1, last_lsn=1, page_count=1, created_at_us=1)
    data = encode_snapshot(descriptor(1), row)
    for damaged in (data[:-1], b"[]", data.replace(b"bop-snapshot", b"other"), data):
        with pytest.raises(CorruptBlob):  # the last is right, but not of this key
            decode_snapshot(damaged, key="snapshots/acme/restored/s/meta-0.json")
    with pytest.raises(FormatFromFuture):
        decode_snapshot(data.replace(b'"version":1', b'"version":2'), key="k")


def test_of_two_documents_of_one_name_the_newer_counts() -> None:
    def row(name: str, generation: int, created_at_us: int) -> SnapshotRecord:
        return SnapshotRecord(
            db_id=1, name=name, generation=generation, last_lsn=1, page_count=1,
            created_at_us=created_at_us,
        )  # fmt: skip

    old, new, lost = row("a", 1, 5), row("a", 2, 6), row("b", 9, 7)
    assert pinned_rows([new, old, lost], {1, 2}) == [new]


# --- forks


async def test_a_fork_is_refused_with_its_reason(bench: Bench) -> None:
    async def fork(**fields: Any) -> Any:
        return await bench.forks.create(
            "acme", "db", fork_tenant="acme", **{"fork_database": "copy", **fields}
        )

    with pytest.raises(NoGeneration):
        await fork()
    await bench.publish(1, 1)
    await bench.publish(1, 2)
    await bench.expire(1, 1)
    with pytest.raises(GenerationExpired):
        await fork(generation=1)
    with pytest.raises(SnapshotNotFound):
        await fork(snapshot="s")
    with pytest.raises(DatabaseConflict):
        await fork(fork_database="db")
    status = await fork()
    assert (status.record.generation, status.earliest_generation) == (2, 2)
    assert bench.directory.opened == [status.record.db_id]
    with pytest.raises(DatabaseConflict):
        await fork()


async def test_a_fork_never_had_the_generations_before_it(bench: Bench) -> None:
    await bench.publish(1, 1)
    await bench.publish(1, 2)
    await bench.forks.create("acme", "db", fork_tenant="acme", fork_database="copy")
    fork = bench.directory.read("acme", "copy")
    with bench.store.read() as view:
        assert select_generation(view, fork, generation=2).generation == 2
        with pytest.raises(NotFound):
            select_generation(view, fork, generation=1)


@pytest.mark.parametrize("race", ["expired", "deleted", "name"])
async def test_a_fork_that_loses_a_race_leaves_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, race: str
) -> None:
    await bench.publish(1, 1)
    await bench.publish(1, 2)
    commit = bench.store.commit

    async def overtaken(asked: ops.ManifestBatch) -> Any:
        monkeypatch.undo()
        receipt = await commit(asked)  # of the id; then the other is first
        match race:
            case "expired":
                await bench.expire(1, 1)
            case "deleted":
                await commit(batch(ops.SetDatabaseState(db_id=1, state="tombstoned")))
            case "name":
                await create_database(bench.store, name="copy")
        return receipt

    monkeypatch.setattr(bench.store, "commit", overtaken)
    lost = {
        "expired": GenerationExpired, "deleted": DatabaseNotFound, "name": DatabaseConflict,
    }[race]  # fmt: skip
    with pytest.raises(lost):
        await bench.forks.create(
            "acme", "db", fork_tenant="acme", fork_database="copy", generation=1
        )
    assert bench.directory.opened == []
    with bench.store.read() as view:
        assert view.all_forks() == []
        assert [one.name for one in view.databases()] == {
            "expired": ["db"], "deleted": [], "name": ["copy", "db"],
        }[race]  # fmt: skip


async def test_the_document_of_a_fork_is_the_same_however_late_it_is_written(bench: Bench) -> None:
    await bench.publish(1, 1)
    status = await bench.forks.create("acme", "db", fork_tenant="acme", fork_database="copy")
    child = status.record.db_id
    fork = bench.store
    with fork.read() as view:
        (registered,) = view.forks_of(1)
    await bench.objects.store_fork(registered)
    (key,) = objects(bench, f"generations/acme/copy/{child}/")
    first = bench.remote.objects[key]
    assert bench.durable == [child]
    document = decode_document(first, key=key)
    assert [one.blob.key for one in document.chunks] == ["base-1-0-1"]
    assert document.chunks[0].origin_db_id == 1

    # A crash before the commit that says so, a generation of its own, a head cut: the same.
    with fork.read() as view:
        row = view.generation(child, 1)
    unsaid = msgspec.structs.replace(row, document_stored=False)
    await fork.commit(batch(ops.RestoreGeneration(row=unsaid)))
    await fork.commit(
        batch(
            ops.SupersedeChunk(db_id=child, chunk_id=0, generation=1, superseded_at=2),
            ops.UpsertChunk(row=chunk(child, 0, 2)),
            ops.RaiseFirstLsn(db_id=child, first_lsn=5),
            publish(child, 2, next_chunk_id=7),
        )
    )
    assert await bench.objects.store_missing() == 1
    assert bench.remote.objects[key] == first
    assert await bench.objects.store_missing() == 0


async def test_one_damaged_document_does_not_hold_up_the_others(bench: Bench) -> None:
    await bench.publish(1, 1)
    damaged = await bench.forks.create("acme", "db", fork_tenant="acme", fork_database="one")
    await bench.forks.create("acme", "db", fork_tenant="acme", fork_database="two")
    with bench.store.read() as view:
        first = view.generation(damaged.record.db_id, 1)
    assert first is not None
    bench.remote.objects[first.document_key] = b"not a document"
    assert not await bench.upload.run_once()
    assert len(objects(bench, "generations/acme/two/")) == 1
    assert bench.remote.objects[first.document_key] == b"not a document"


async def test_a_deep_fork_adopts_every_chunk(bench: Bench) -> None:
    await bench.publish(1, 1)
    names = ["db", *(f"f{level}" for level in range(FORK_DEPTH_MAX + 1))]
    for parent, name in pairwise(names):
        status = await bench.forks.create("acme", parent, fork_tenant="acme", fork_database=name)
        db_id = status.record.db_id
        with bench.store.read() as view:
            assert [row.blob for row in view.chunk_view(db_id, 1)] == [chunk(1).blob]
            owned, depth = view.chunk_rows(db_id), view.fork_depth(db_id)
    assert [row.origin_db_id for row in owned] == [1]
    assert depth == 0
    with bench.store.read() as view:
        assert view.fork_depth(db_id - 1) == FORK_DEPTH_MAX


def test_lsns_of_a_fork_go_on_above_a_cut_tail() -> None:
    parent = descriptor(1, "log", generation=4, first_lsn=90, next_chunk_id=8)
    start = publish(1, 3, last_lsn=50).row
    log = msgspec.structs.replace(parent, engine="append_only")
    place = {"db_id": 2, "tenant": "t", "name": "n", "now_us": 7}
    record, first = forked(log, start, (11, 60), **place)
    assert (record.first_lsn, record.floor_lsn, record.next_chunk_id) == (11, 61, 8)
    assert (first.generation, first.last_lsn, first.committed_at_us) == (3, 50, 7)
    record, _ = forked(log, start, None, **place)
    assert (record.first_lsn, record.floor_lsn) == (51, 51)
    record, _ = forked(parent, start, None, **place)
    assert (record.first_lsn, record.floor_lsn, record.page_count) == (90, 51, 30)
    assert record.wal_position == b""
