"""What catalogue batches do, and that they do it whole."""

import pytest

from app.core.base.errors import InvariantViolation
from app.core.stores.manifest import ops
from app.core.stores.manifest.errors import (
    GenerationMoved,
    MissingRow,
    NameTaken,
    RowExists,
    WrongState,
)
from app.core.stores.manifest.records import (
    Retention,
)
from app.core.stores.manifest.store import ManifestStore
from tests.unit.core.stores.manifest.builders import (
    batch,
    chunk,
    create,
    create_database,
    delta,
    descriptor,
    job,
    publish,
    retire,
    segment,
)


async def test_batch_atomic_commit(store: ManifestStore) -> None:
    db_id = await create_database(store)
    await store.commit(batch(ops.EnqueueJob(job=job(db_id=db_id))))
    groups = store._writer.groups
    receipt = await store.commit(
        batch(
            ops.UpsertChunk(row=chunk(db_id)),
            ops.UpsertChunkDelta(row=delta(db_id, generation=1)),
            ops.RegisterSegment(row=segment(db_id)),
            publish(db_id),
            ops.UpdateJob(job_id="J1", changes={"published_generation": 1}),
            retire("old"),
        )
    )
    assert store._writer.groups == groups + 1
    assert receipt.results == (None,) * 6
    with store.read() as view:
        assert view.chunk_view(db_id, 1) == [chunk(db_id)]
        assert view.delta_view(db_id, 1) == [delta(db_id, generation=1)]
        assert view.segments(db_id) == [segment(db_id)]
        assert view.latest_generation(db_id) == publish(db_id).row
        assert view.job("J1").published_generation == 1
        assert [row.key for row in view.gc_rows()] == ["old"]
        assert view.last_sequence() == receipt.sequence == 2


async def test_batch_rollback_on_failure(store: ManifestStore) -> None:
    db_id = await create_database(store)
    with store.read() as view:
        before, counts = view.catalogue(), view.counts()
    with pytest.raises(MissingRow):
        await store.commit(
            batch(
                ops.UpsertChunk(row=chunk(db_id)),
                ops.UpsertChunkDelta(row=delta(db_id, generation=1)),
                publish(db_id),
                retire("old"),
                ops.EnqueueJob(job=job()),
                ops.RemoveSegment(db_id=db_id, segment_id=99),
            )
        )
    with store.read() as view:
        assert view.catalogue() == before
        assert view.counts() == counts
        assert view.last_sequence() == 1


async def test_change_log_append(store: ManifestStore) -> None:
    db_id = await create_database(store)
    await store.commit(batch(ops.UpsertChunk(row=chunk(db_id)), publish(db_id), reason="first"))
    await store.commit(batch(ops.PutMeta(name="note", value=b"x")))
    await store.commit(batch(ops.SetHealth(db_id=db_id, health="corrupt_wal"), reason="second"))
    with store.read() as view:
        changes = view.change_log()
        assert view.change_log(1, limit=1) == [changes[1]]
    assert [(change.sequence, change.generation, change.reason) for change in changes] == [
        (1, 0, "test"),
        (2, 1, "first"),
        (3, 1, "second"),
    ]
    assert {(change.db_id, change.tenant, change.database) for change in changes} == {
        (db_id, "acme", "db")
    }
    assert [ops.decode_op(raw) for raw in changes[1].ops] == [
        ops.UpsertChunk(row=chunk(db_id)),
        publish(db_id),
    ]
    created = ops.decode_op(changes[0].ops[0])
    assert isinstance(created, ops.RestoreDatabase)
    assert created.record.db_id == db_id


async def test_chunk_delta_upsert_delete(store: ManifestStore) -> None:
    db_id = await create_database(store)
    await store.commit(batch(ops.UpsertChunk(row=chunk(db_id)), publish(db_id)))
    await store.commit(batch(ops.UpsertChunkDelta(row=delta(db_id)), publish(db_id, 2)))
    with store.read() as view:
        assert view.delta_rows(db_id) == [delta(db_id)]
        assert view.delta_view(db_id, 1) == []
        assert view.delta_view(db_id, 2) == [delta(db_id)]
    await store.commit(
        batch(
            ops.SupersedeChunkDelta(db_id=db_id, chunk_id=0, generation=2, superseded_at=3),
            publish(db_id, 3),
        )
    )
    with store.read() as view:
        assert view.delta_view(db_id, 3) == []
        assert [row.generation for row in view.delta_view(db_id, 2)] == [2]
        assert [row.superseded_at for row in view.delta_rows_of(db_id, 0)] == [3]
    gone = ops.DeleteChunkDelta(db_id=db_id, chunk_id=0, generation=2)
    with pytest.raises(InvariantViolation, match="retained"):
        await store.commit(batch(gone))
    await store.commit(batch(ops.DeleteGeneration(db_id=db_id, generation=2), gone))
    with store.read() as view:
        assert view.delta_rows(db_id) == []
    with pytest.raises(MissingRow):
        await store.commit(batch(gone))


async def test_chunk_supersede_delete_and_drop(store: ManifestStore) -> None:
    db_id = await create_database(store)
    other = await create_database(store, name="other")
    await store.commit(batch(ops.UpsertChunk(row=chunk(other)), publish(other)))
    await store.commit(
        batch(
            ops.UpsertChunk(row=chunk(db_id)),
            ops.UpsertChunk(row=chunk(db_id, 1)),
            publish(db_id, next_chunk_id=2),
        )
    )
    await store.commit(
        batch(
            ops.SupersedeChunk(db_id=db_id, chunk_id=0, generation=1, superseded_at=2),
            ops.UpsertChunk(row=chunk(db_id, 0, 2, blob=None)),
            publish(db_id, 2, next_chunk_id=2),
        )
    )
    with store.read() as view:
        assert [row.chunk_id for row in view.chunk_view(db_id, 1)] == [0, 1]
        assert [row.chunk_id for row in view.chunk_view(db_id, 2)] == [1]
        assert len(view.chunk_rows(db_id)) == 3
        assert [row.generation for row in view.chunk_rows_of(db_id, 0)] == [1, 2]
    gone = ops.DeleteChunk(db_id=db_id, chunk_id=0, generation=1)
    with pytest.raises(InvariantViolation, match="retained"):
        await store.commit(batch(gone))
    await store.commit(batch(ops.DeleteGeneration(db_id=db_id, generation=1), gone))
    with store.read() as view:
        assert [row.generation for row in view.chunk_rows_of(db_id, 0)] == [2]
        assert view.chunk_rows(other) == [chunk(other)]


async def test_create_database_gives_names_and_ids_once(store: ManifestStore) -> None:
    first = await create_database(store)
    with pytest.raises(NameTaken):
        await store.commit(batch(create()))
    second = await create_database(store, tenant="beta")
    assert second > first
    with store.read() as view:
        assert view.database_id("acme", "db") == first
        assert view.database_id("acme", "nothing") is None
        assert view.database(second).tenant == "beta"


async def test_tombstone_frees_the_name_and_is_final(store: ManifestStore) -> None:
    db_id = await create_database(store)
    with pytest.raises(WrongState):
        await store.commit(batch(ops.RemoveDatabase(db_id=db_id)))
    await store.commit(batch(ops.SetDatabaseState(db_id=db_id, state="draining")))
    await store.commit(batch(ops.SetDatabaseState(db_id=db_id, state="tombstoned")))
    await store.commit(batch(ops.SetDatabaseState(db_id=db_id, state="tombstoned")))
    with pytest.raises(WrongState):
        await store.commit(batch(ops.SetDatabaseState(db_id=db_id, state="active")))
    again = await create_database(store)
    await store.commit(batch(ops.RemoveDatabase(db_id=db_id)))
    with store.read() as view:
        assert view.database_id("acme", "db") == again
        assert [row.db_id for row in view.all_databases()] == [again]


async def test_restore_writes_the_descriptor_and_its_generation(store: ManifestStore) -> None:
    record = descriptor(41, generation=7, floor_lsn=100, checkpointed_lsn=99)
    row = publish(41, 7, last_lsn=99).row
    await store.commit(
        batch(
            ops.RestoreDatabase(record=record),
            ops.RestoreGeneration(row=row),
            ops.UpsertChunk(row=chunk(41, generation=7)),
        )
    )
    assert await create_database(store, name="next") == 42
    with store.read() as view:
        assert view.database(41) == record
        assert view.generation(41, 7) == row
        assert view.change_log()[0].generation == 7
    with pytest.raises(RowExists):
        await store.commit(batch(ops.RestoreDatabase(record=descriptor(41, name="other"))))
    with pytest.raises(NameTaken):
        await store.commit(batch(ops.RestoreDatabase(record=descriptor(50))))


async def test_publish_moves_the_descriptor_on(store: ManifestStore) -> None:
    db_id = await create_database(store, engine="append_only")
    await store.commit(batch(ops.RaiseFloor(db_id=db_id, floor_lsn=5)))
    first = publish(db_id, 1, first_lsn=5, last_lsn=20, next_chunk_id=1)
    await store.commit(batch(first))
    with store.read() as view:
        after = view.database(db_id)
        assert (after.generation, after.first_lsn, after.floor_lsn) == (1, 5, 21)
        assert (after.next_chunk_id, after.page_count) == (1, 10)
    await store.commit(batch(publish(db_id, 2, first_lsn=21, last_lsn=30, next_chunk_id=2)))
    with store.read() as view:
        after = view.database(db_id)
        assert (after.generation, after.first_lsn, after.floor_lsn) == (2, 5, 31)
        assert view.generation(db_id, 1).superseded_at_us == 1_000_002
        assert view.latest_generation(db_id).generation == 2
        assert [row.generation for row in view.generations(db_id, 1)] == [2]
    for wrong in (2, 4):
        with pytest.raises(GenerationMoved):
            await store.commit(batch(publish(db_id, wrong)))
    await store.commit(batch(ops.RaiseFloor(db_id=db_id, floor_lsn=7)))
    await store.commit(batch(ops.RaiseFirstLsn(db_id=db_id, first_lsn=12)))
    with store.read() as view:
        assert view.database(db_id).floor_lsn == 31
        assert view.database(db_id).first_lsn == 12
    await store.commit(batch(ops.RaiseFloor(db_id=db_id, floor_lsn=1000)))
    await store.commit(batch(publish(db_id, 3, last_lsn=40, next_chunk_id=2)))
    with store.read() as view:
        assert view.database(db_id).floor_lsn == 1000


async def test_advance_checkpointed_never_falls_and_needs_the_generation(
    store: ManifestStore,
) -> None:
    db_id = await create_database(store)
    await store.commit(batch(publish(db_id, 1, last_lsn=10)))
    with pytest.raises(MissingRow):
        await store.commit(batch(ops.AdvanceCheckpointed(db_id=db_id, generation=2, lsn=10)))
    with pytest.raises(InvariantViolation):
        await store.commit(batch(ops.AdvanceCheckpointed(db_id=db_id, generation=1, lsn=11)))
    for lsn in (10, 4):
        await store.commit(batch(ops.AdvanceCheckpointed(db_id=db_id, generation=1, lsn=lsn)))
    with store.read() as view:
        assert view.database(db_id).checkpointed_lsn == 10
        assert view.generation(db_id, 1).document_stored


async def test_generations_are_verified_and_expire(store: ManifestStore) -> None:
    db_id = await create_database(store)
    await store.commit(batch(publish(db_id, 1)))
    await store.commit(batch(publish(db_id, 2)))
    await store.commit(batch(ops.MarkVerified(db_id=db_id, generation=2, verified_at_us=77)))
    with pytest.raises(WrongState):
        await store.commit(batch(ops.DeleteGeneration(db_id=db_id, generation=2)))
    await store.commit(batch(ops.DeleteGeneration(db_id=db_id, generation=1)))
    with store.read() as view:
        assert [row.verified_at_us for row in view.generations(db_id)] == [77]


async def test_segment_states(store: ManifestStore) -> None:
    db_id = await create_database(store)
    await store.commit(batch(ops.RegisterSegment(row=segment(db_id))))
    raised = segment(db_id, ceiling_lsn=2000)
    await store.commit(batch(ops.RegisterSegment(row=raised)))
    with pytest.raises(RowExists):
        await store.commit(batch(ops.RegisterSegment(row=segment(db_id))))
    cover = ops.CoverSegment(db_id=db_id, segment_id=1, generation=1)
    with pytest.raises(WrongState):
        await store.commit(batch(cover))
    with pytest.raises(InvariantViolation):
        await store.commit(
            batch(ops.SealSegment(db_id=db_id, segment_id=1, last_lsn=2000, bytes=9))
        )
    seal = ops.SealSegment(db_id=db_id, segment_id=1, last_lsn=50, bytes=9)
    await store.commit(batch(seal))
    await store.commit(batch(seal))
    await store.commit(batch(cover))
    await store.commit(batch(seal))
    other = ops.SealSegment(db_id=db_id, segment_id=1, last_lsn=51, bytes=9)
    with pytest.raises(WrongState):
        await store.commit(batch(other))
    with pytest.raises(RowExists):
        await store.commit(batch(ops.RegisterSegment(row=raised)))
    with store.read() as view:
        (row,) = view.all_segments()
        assert (row.state, row.last_lsn, row.bytes, row.covering_generation) == (
            "checkpointed",
            50,
            9,
            1,
        )
    await store.commit(batch(ops.RemoveSegment(db_id=db_id, segment_id=1)))
    with store.read() as view:
        assert view.segments(db_id) == []


async def test_descriptor_settings(store: ManifestStore) -> None:
    db_id = await create_database(store)
    retention = Retention(keep_generations=3)
    await store.commit(
        batch(
            ops.SetHealth(db_id=db_id, health="wal_lost", lost_from_lsn=9),
            ops.SetRetention(db_id=db_id, retention=retention),
        )
    )
    with store.read() as view:
        row = view.database(db_id)
        assert (row.health, row.lost_from_lsn, row.retention) == ("wal_lost", 9, retention)


async def test_ops_on_no_database_are_refused(store: ManifestStore) -> None:
    for op in (
        ops.UpsertChunk(row=chunk(9)),
        ops.UpsertChunkDelta(row=delta(9)),
        ops.RegisterSegment(row=segment(9)),
        publish(9),
        ops.SetHealth(db_id=9, health="ok"),
    ):
        with pytest.raises(MissingRow):
            await store.commit(batch(op))
    with store.read() as view:
        assert view.last_sequence() == 0


async def test_listing_databases(store: ManifestStore) -> None:
    for tenant, name in (("a", "x"), ("a", "y"), ("a", "z"), ("a-b", "x"), ("b", "q")):
        await create_database(store, tenant=tenant, name=name)
    with store.read() as view:
        assert [row.name for row in view.databases("a")] == ["x", "y", "z"]
        assert [row.name for row in view.databases("a", "x", limit=1)] == ["y"]
        everything = [f"{row.tenant}/{row.name}" for row in view.databases()]
        assert sorted(everything) == ["a-b/x", "a/x", "a/y", "a/z", "b/q"]
        page = view.databases(None, everything[1], limit=2)
        assert [f"{row.tenant}/{row.name}" for row in page] == everything[2:4]
