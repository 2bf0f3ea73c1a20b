"""Batches that no correct caller sends: each is refused whole, and alone."""

from collections.abc import Sequence

import msgspec
import pytest

from app.core.base.errors import InvariantViolation
from app.core.stores.manifest import ops
from app.core.stores.manifest.invariants import check_invariants
from app.core.stores.manifest.rows import CommittedRows, StagedRows
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.manifest.tables import DATABASES, number_key
from tests.unit.core.stores.manifest.builders import (
    batch,
    chunk,
    create_database,
    delta,
    publish,
)


async def violated(store: ManifestStore, *operations: ops.Op) -> None:
    with store.read() as view:
        before = view.catalogue()
    with pytest.raises(InvariantViolation):
        await store.commit(batch(*operations))
    with store.read() as view:
        assert view.catalogue() == before


def supersede(db_id: int, at: int, generation: int = 1) -> ops.SupersedeChunk:
    return ops.SupersedeChunk(db_id=db_id, chunk_id=0, generation=generation, superseded_at=at)


async def test_one_valid_row_of_a_chunk(store: ManifestStore) -> None:
    db_id = await create_database(store)
    await store.commit(batch(ops.UpsertChunk(row=chunk(db_id)), publish(db_id)))
    await violated(store, ops.UpsertChunk(row=chunk(db_id, 0, 2)), publish(db_id, 2))
    await violated(store, ops.UpsertChunk(row=chunk(db_id, 0, 2, blob=None)), publish(db_id, 2))
    await store.commit(batch(publish(db_id, 2)))
    await violated(store, ops.UpsertChunk(row=chunk(db_id, 0, 3)), supersede(db_id, 4))
    await store.commit(
        batch(ops.UpsertChunk(row=chunk(db_id, 0, 3)), supersede(db_id, 3), publish(db_id, 3))
    )
    # From both sides: an older row that reaches into a newer one.
    await violated(store, ops.UpsertChunk(row=chunk(db_id)))
    await violated(store, ops.UpsertChunk(row=chunk(db_id, 0, 2, superseded_at=3)))


async def test_a_row_is_valid_for_a_while(store: ManifestStore) -> None:
    db_id = await create_database(store)
    await store.commit(
        batch(
            ops.UpsertChunk(row=chunk(db_id)),
            ops.UpsertChunkDelta(row=delta(db_id, generation=1)),
            publish(db_id),
        )
    )
    await violated(store, supersede(db_id, 1))
    await violated(
        store,
        ops.SupersedeChunkDelta(db_id=db_id, chunk_id=0, generation=1, superseded_at=1),
    )


async def test_rows_come_with_their_generation(store: ManifestStore) -> None:
    db_id = await create_database(store)
    await violated(store, ops.UpsertChunk(row=chunk(db_id)))
    await violated(store, ops.UpsertChunkDelta(row=delta(db_id)))
    await store.commit(batch(ops.UpsertChunk(row=chunk(db_id)), publish(db_id)))
    await violated(store, supersede(db_id, 2))


async def test_one_generation_at_a_time(store: ManifestStore) -> None:
    db_id = await create_database(store)
    await violated(store, publish(db_id, 1), publish(db_id, 2))
    await store.commit(batch(publish(db_id, 1, next_chunk_id=5)))
    await violated(store, publish(db_id, 2, next_chunk_id=4))


@pytest.mark.parametrize(
    "ranges",
    [[(1, 10), (10, 20)], [(11, 20), (1, 10)], [(1, 10), (5, 6)], [(10, 3)]],
)
async def test_lsn_ranges_of_chunks_ascend(
    store: ManifestStore, ranges: Sequence[tuple[int, int]]
) -> None:
    db_id = await create_database(store, engine="append_only")
    rows = [
        chunk(db_id, chunk_id, first=first, last=last, visible_last=last)
        for chunk_id, (first, last) in enumerate(ranges)
    ]
    await violated(store, *(ops.UpsertChunk(row=row) for row in rows), publish(db_id, last_lsn=30))


async def test_lsn_ranges_against_committed_neighbours(store: ManifestStore) -> None:
    db_id = await create_database(store, engine="append_only")
    other = await create_database(store, engine="append_only", name="other")

    def rows(db: int, *spans: tuple[int, int, int], generation: int = 1) -> list[ops.Op]:
        return [
            ops.UpsertChunk(
                row=chunk(db, number, generation, first=first, last=last, visible_last=last)
            )
            for number, first, last in spans
        ]

    for db in (db_id, other):
        await store.commit(
            batch(*rows(db, (0, 1, 10), (2, 21, 30)), publish(db, last_lsn=30, next_chunk_id=3))
        )
    again = publish(db_id, 2, last_lsn=40, next_chunk_id=4)
    await violated(store, *rows(db_id, (1, 10, 20), generation=2), again)
    await violated(store, *rows(db_id, (1, 11, 21), generation=2), again)
    await violated(store, *rows(db_id, (3, 30, 40), generation=2), again)
    # A superseded neighbour is no neighbour.
    await store.commit(
        batch(
            ops.SupersedeChunk(db_id=db_id, chunk_id=2, generation=1, superseded_at=2),
            *rows(db_id, (3, 25, 40), (1, 11, 20), generation=2),
            again,
        )
    )


async def test_visible_end_lies_within_the_chunk(store: ManifestStore) -> None:
    db_id = await create_database(store, engine="append_only")
    await violated(store, ops.UpsertChunk(row=chunk(db_id, visible_last=11)), publish(db_id))
    await store.commit(batch(ops.UpsertChunk(row=chunk(db_id, visible_last=4)), publish(db_id)))


@pytest.mark.parametrize(
    "changes",
    [
        {"generation": 3},
        {"generation": 0},
        {"generation": 2},  # without its row
        {"floor_lsn": 10},
        {"first_lsn": 0},
        {"checkpointed_lsn": 4},
        {"checkpointed_lsn": 11},
        {"next_chunk_id": 0},
    ],
)
async def test_watermarks_of_a_descriptor(store: ManifestStore, changes: dict[str, int]) -> None:
    """Whatever op might do it: the descriptor as it comes out is judged."""
    db_id = await create_database(store)
    await store.commit(batch(publish(db_id, last_lsn=10)))
    await store.commit(batch(ops.AdvanceCheckpointed(db_id=db_id, generation=1, lsn=5)))
    transaction = store._environment.begin()
    rows = StagedRows(CommittedRows(transaction, store._environment.handles))
    key = number_key(db_id)
    before = rows.get(DATABASES, key)
    rows.put(DATABASES, key, msgspec.structs.replace(before, floor_lsn=12))
    check_invariants(rows)
    rows.put(DATABASES, key, msgspec.structs.replace(before, **changes))
    with pytest.raises(InvariantViolation):
        check_invariants(rows)
    transaction.abort()


async def test_keys_that_lmdb_cannot_hold(store: ManifestStore) -> None:
    for name in ("", "x" * 600):
        op = ops.DeleteIdempotency(scope_hash=name.encode())
        with pytest.raises(InvariantViolation):
            await store.commit(batch(op))


async def test_a_bug_in_a_batch_stays_in_it(store: ManifestStore) -> None:
    with pytest.raises(InvariantViolation):
        await store.commit(batch(ops.CoverSegment(db_id=-1, segment_id=1, generation=1)))
    await store.commit(batch(ops.PutMeta(name="mark", value=b"1")))
