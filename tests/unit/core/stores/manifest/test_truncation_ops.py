"""What truncations change: cut segments, and the conditions they commit under."""

import pytest

from app.core.stores.manifest import conditions, ops
from app.core.stores.manifest.errors import LeaseConflict, LeaseLost, WrongState
from tests.unit.core.stores.manifest.builders import (
    batch,
    create_database,
    lease,
    leases_of,
    open_store,
    segment,
)


def seal(db_id: int, segment_id: int, last_lsn: int) -> ops.SealSegment:
    return ops.SealSegment(db_id=db_id, segment_id=segment_id, last_lsn=last_lsn, bytes=9)


@pytest.fixture
async def db_id(store) -> int:
    db_id = await create_database(store, engine="append_only")
    rows = [segment(db_id, first, first_lsn=first) for first in (1, 11)]
    await store.commit(batch(*(ops.RegisterSegment(row=row) for row in rows), db_id=db_id))
    await store.commit(batch(seal(db_id, 1, 10)))
    return db_id


async def cut(store, db_id: int, visible_last: int, segment_id: int = 1):
    operation = ops.CutSegment(db_id=db_id, segment_id=segment_id, visible_last=visible_last)
    await store.commit(batch(operation))
    with store.read() as view:
        row = next(row for row in view.segments(db_id) if row.segment_id == segment_id)
    return row.state, row.visible_last


async def test_a_cut_keeps_what_lies_before_it(store, db_id):
    assert await cut(store, db_id, 6) == ("sealed", 6)


async def test_a_cut_never_gives_anything_back(store, db_id):
    await cut(store, db_id, 6)
    assert await cut(store, db_id, 8) == ("sealed", 6)
    assert await cut(store, db_id, 99) == ("sealed", 6)


async def test_a_segment_of_which_nothing_is_left_is_dropped(store, db_id):
    assert await cut(store, db_id, 0) == ("dropped", 0)


async def test_an_open_segment_cannot_be_cut(store, db_id):
    with pytest.raises(WrongState):
        await cut(store, db_id, 12, segment_id=11)


async def test_a_dropped_segment_cannot_be_published(store, db_id):
    await cut(store, db_id, 0)
    with pytest.raises(WrongState):
        await store.commit(batch(ops.CoverSegment(db_id=db_id, segment_id=1, generation=1)))


async def test_sealing_again_leaves_a_cut_as_it_is(store, db_id):
    await cut(store, db_id, 6)
    await store.commit(batch(seal(db_id, 1, 10)))
    assert await cut(store, db_id, 10) == ("sealed", 6)


async def test_a_live_lease_of_the_database_refuses(store, clock):
    db_id = await create_database(store)
    none = batch(expect=[conditions.ExpectNoLeases(db_id=db_id)])
    await store.commit(none)
    await store.commit(batch(lease("J1", chunk_id=5)))
    with pytest.raises(LeaseConflict) as refused:
        await store.commit(none)
    assert refused.value.fields["holder"] == "J1"
    await store.commit(batch(expect=[conditions.ExpectNoLeases(db_id=db_id + 1)]))
    clock.monotonic_seconds += 60
    await store.commit(none)


async def test_a_released_lease_refuses_no_more(store):
    db_id = await create_database(store)
    await store.commit(batch(lease("J1")))
    await store.commit(batch(ops.ReleaseLeases(job_id="J1")))
    await store.commit(batch(expect=[conditions.ExpectNoLeases(db_id=db_id)]))


async def test_reaping_takes_the_expired_and_leaves_the_live(store, clock):
    await create_database(store)
    await store.commit(batch(lease("J1", chunk_id=0, ttl_seconds=10), lease("J2", chunk_id=1)))
    clock.monotonic_seconds += 10
    reaped = (await store.commit(batch(ops.ReapLeases()))).results[0]
    assert [(one.job_id, one.chunk_id) for one in reaped] == [("J1", 0)]
    with store.read() as view:
        assert [one.job_id for one in view.leases()] == ["J2"]
        assert leases_of(view, "J1") == []


async def test_reaping_takes_those_of_dead_processes(tmp_path):
    store = await open_store(tmp_path / "manifest", process_id="dead")
    await create_database(store)
    await store.commit(batch(lease("J1", ttl_seconds=1e9)))
    await store.aclose()
    store = await open_store(tmp_path / "manifest", process_id="alive")
    try:
        assert len((await store.commit(batch(ops.ReapLeases()))).results[0]) == 1
    finally:
        await store.aclose()


async def test_a_missing_lease_is_noticed_at_the_next_renewal(store):
    await create_database(store)
    await store.commit(batch(lease("J1", chunk_id=0), lease("J1", chunk_id=1)))
    renewal = batch(ops.RenewLeases(job_id="J1", ttl_seconds=60, count_min=2))
    await store.commit(renewal)
    await store.commit(batch(ops.ReleaseLease(db_id=1, chunk_id=1)))
    with pytest.raises(LeaseLost):
        await store.commit(renewal)
