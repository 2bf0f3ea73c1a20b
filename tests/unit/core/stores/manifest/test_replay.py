"""Replaying the change log gives the catalogue (I14), whatever was committed."""

import asyncio
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from app.core.base.errors import InvariantViolation
from app.core.stores.manifest import ops
from app.core.stores.manifest.derived import index_entries
from app.core.stores.manifest.errors import BatchRefused
from app.core.stores.manifest.records import ForkParent, Retention, SnapshotRecord
from app.core.stores.manifest.replay import replay
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.manifest.tables import DERIVED_INDEXES
from app.core.stores.manifest.view import ManifestView
from tests.unit.core.stores.manifest.builders import (
    batch,
    chunk,
    create,
    create_database,
    delta,
    descriptor,
    open_store,
    publish,
    retire,
    segment,
)

db_ids = st.integers(1, 3)
small = st.integers(0, 3)
generations = st.integers(1, 4)


def each_op() -> st.SearchStrategy[ops.Op]:
    places = {"db_id": db_ids, "chunk_id": small, "generation": generations}
    segments = {"db_id": db_ids, "segment_id": small}
    states = st.sampled_from(["active", "draining", "tombstoned"])
    return st.one_of(
        st.builds(create, st.sampled_from("ab"), engine=st.sampled_from(["libsql", "append_only"])),
        st.builds(lambda i: ops.RestoreDatabase(record=descriptor(i, f"r{i}")), st.integers(1, 9)),
        st.builds(
            lambda i, parent, generation: ops.RestoreDatabase(
                record=descriptor(
                    i,
                    f"f{i}",
                    generation=generation,
                    forked_from=ForkParent(
                        tenant="acme", database="first", db_id=parent, generation=generation
                    ),
                )
            ),
            db_ids,
            db_ids,
            generations,
        ),
        st.builds(
            lambda db_id, name, generation: ops.CreateSnapshot(
                row=SnapshotRecord(
                    db_id=db_id,
                    name=name,
                    generation=generation,
                    last_lsn=1,
                    page_count=1,
                    created_at_us=1,
                )
            ),
            db_ids,
            st.sampled_from("st"),
            generations,
        ),
        st.builds(ops.DeleteSnapshot, db_id=db_ids, name=st.sampled_from("st")),
        st.builds(ops.MarkSnapshotStored, db_id=db_ids, name=st.sampled_from("st")),
        st.builds(ops.AdoptEveryChunk, db_id=db_ids),
        st.builds(ops.DeleteChunk, **places),
        st.builds(ops.DeleteChunkDelta, **places),
        st.builds(ops.SupersedeChunkDelta, superseded_at=generations, **places),
        st.builds(lambda **fields: ops.RegisterSegment(row=segment(**fields)), **segments),
        st.builds(ops.SealSegment, last_lsn=st.integers(0, 50), bytes=small, **segments),
        st.builds(ops.CoverSegment, generation=generations, **segments),
        st.builds(ops.CutSegment, visible_last=st.integers(0, 50), **segments),
        st.builds(ops.RemoveSegment, **segments),
        st.builds(
            ops.CompensateCheckpoint, db_id=db_ids, job_id=st.just("J"), cancelled_by=st.just("T")
        ),
        st.builds(
            ops.AdvanceCheckpointed, db_id=db_ids, generation=generations, lsn=st.integers(0, 20)
        ),
        st.builds(ops.SetHealth, db_id=db_ids, health=st.sampled_from(["ok", "wal_lost"])),
        st.builds(ops.RaiseFloor, db_id=db_ids, floor_lsn=st.integers(1, 60)),
        st.builds(ops.RaiseFirstLsn, db_id=db_ids, first_lsn=st.integers(1, 20)),
        st.builds(ops.SetDatabaseState, db_id=db_ids, state=states),
        st.builds(ops.SetRetention, db_id=db_ids, retention=st.builds(Retention)),
        st.builds(ops.RemoveDatabase, db_id=db_ids),
        st.builds(ops.MarkVerified, db_id=db_ids, generation=generations, verified_at_us=small),
        st.builds(ops.DeleteGeneration, db_id=db_ids, generation=generations),
        st.builds(ops.PutMeta, name=st.sampled_from("mn"), value=st.binary(max_size=3)),
        st.builds(retire, st.sampled_from("pq")),
        st.builds(ops.TrimChangeLog, history_count=small, lag_count_max=st.just(1)),
    )


checkpoints = st.tuples(db_ids, small, st.booleans())
steps = st.lists(st.one_of(checkpoints, st.lists(each_op(), min_size=1, max_size=4)), max_size=40)


def publication(view: ManifestView, db_id: int, chunk_id: int, as_delta: bool) -> list[ops.Op]:
    database = view.database(db_id)
    generation = 1 if database is None else database.generation + 1
    row = publish(
        db_id,
        generation,
        last_lsn=10 * (chunk_id + 1),
        next_chunk_id=4,
    )
    if as_delta:
        return [ops.UpsertChunkDelta(row=delta(db_id, chunk_id, generation)), row]
    span = {"first": 10 * chunk_id + 1, "last": 10 * chunk_id + 10}
    return [
        *(
            ops.SupersedeChunk(
                db_id=db_id, chunk_id=chunk_id, generation=old.generation, superseded_at=generation
            )
            for old in view.chunk_rows_of(db_id, chunk_id)
            if old.superseded_at is None
        ),
        ops.UpsertChunk(row=chunk(db_id, chunk_id, generation, visible_last=span["last"], **span)),
        row,
    ]


def indexes_of(view: ManifestView) -> dict[str, set[bytes]]:
    """What the rows say that the derived indexes hold."""
    expected: dict[str, set[bytes]] = {table.name: set() for table in DERIVED_INDEXES}
    for database in view.all_databases():
        for row in view.chunk_rows(database.db_id) + view.delta_rows(database.db_id):
            for table, key in index_entries(row):
                expected[table].add(key)
    return expected


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=steps)
def test_replay_gives_the_tables(steps: list[list[ops.Op] | tuple[int, int, bool]]) -> None:
    async def run() -> None:
        with tempfile.TemporaryDirectory() as directory:
            store = await open_store(Path(directory) / "manifest")
            await create_database(store, name="first")
            committed = 0
            for step in steps:
                if isinstance(step, tuple):
                    with store.read() as view:
                        operations = publication(view, *step)
                else:
                    operations = step
                try:
                    await store.commit(batch(*operations))
                    committed += 1
                except (BatchRefused, InvariantViolation) as refusal:
                    note(f"{refusal}")
            with store.read() as view:
                changes = view.change_log(limit=10_000)
                assert [change.sequence for change in changes] == list(
                    range(view.trimmed_through() + 1, view.last_sequence() + 1)
                )
                assert view.derived_indexes() == indexes_of(view)
                base, behind = view.change_base(), view.trimmed_through()
                assert replay(changes, base=base, behind=behind) == view.catalogue()
            note(f"{committed} committed")
            await store.aclose()

    asyncio.run(run())


async def test_a_hole_is_found(store: ManifestStore) -> None:
    for name in "abc":
        await create_database(store, name=name)
    with store.read() as view:
        changes = view.change_log()
    with pytest.raises(InvariantViolation, match="dense"):
        replay([changes[0], changes[2]])
    with pytest.raises(InvariantViolation, match="dense"):
        replay(changes[1:])
    assert replay(changes[1:], base=replay(changes[:1]), behind=1) == replay(changes)


async def test_a_change_that_is_not_in_the_log_is_found(store: ManifestStore) -> None:
    db_id = await create_database(store)
    with store.read() as view:
        changes = view.change_log()
    await store.commit(batch(ops.SetHealth(db_id=db_id, health="corrupt_wal")))
    with store.read() as view:
        assert replay(changes) != view.catalogue()
