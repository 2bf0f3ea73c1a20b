"""Every condition, met and not met; a refused batch leaves nothing."""

import pytest

from app.core.stores.manifest import conditions, ops
from app.core.stores.manifest.errors import (
    BatchRefused,
    CancelRequested,
    EpochSuperseded,
    GenerationMoved,
    IdempotencyExists,
    KeyDoomed,
    LeaseConflict,
    LeaseLost,
    MissingRow,
    RunSuperseded,
    WrongState,
)
from app.core.stores.manifest.records import IdempotencyRecord
from app.core.stores.manifest.store import ManifestStore
from tests.unit.core.stores.manifest.builders import (
    FakeClock,
    batch,
    create_database,
    job,
    lease,
    leases_of,
    open_store,
    publish,
    retire,
    segment,
)

S = 1_000_000
MARK = ops.PutMeta(name="mark", value=b"1")


async def refused(
    store: ManifestStore, kind: type[BatchRefused], *expect: conditions.Precondition
) -> None:
    with pytest.raises(kind) as caught:
        await store.commit(batch(MARK, expect=expect))
    assert type(caught.value) is kind
    with store.read() as view:
        assert view.meta("mark") is None


async def met(store: ManifestStore, *expect: conditions.Precondition) -> None:
    await store.commit(batch(MARK, expect=expect))
    with store.read() as view:
        assert view.meta("mark") == b"1"


async def test_expect_generation(store: ManifestStore) -> None:
    db_id = await create_database(store)
    await store.commit(batch(publish(db_id)))
    await refused(store, GenerationMoved, conditions.ExpectGeneration(db_id=db_id, generation=0))
    await refused(store, MissingRow, conditions.ExpectGeneration(db_id=99, generation=0))
    await met(store, conditions.ExpectGeneration(db_id=db_id, generation=1))


async def test_expect_run(store: ManifestStore) -> None:
    await store.commit(batch(ops.EnqueueJob(job=job(state="in_flight", run=2))))
    await refused(store, RunSuperseded, conditions.ExpectRun(job_id="J1", run=1))
    await refused(store, RunSuperseded, conditions.ExpectRun(job_id="J9", run=2))
    await store.commit(batch(ops.UpdateJob(job_id="J1", changes={"cancel_requested": True})))
    await refused(store, CancelRequested, conditions.ExpectRun(job_id="J1", run=2))
    await store.commit(batch(ops.UpdateJob(job_id="J1", changes={"state": "pending"})))
    await refused(
        store, RunSuperseded, conditions.ExpectRun(job_id="J1", run=2, allow_cancelled=True)
    )
    await store.commit(batch(ops.UpdateJob(job_id="J1", changes={"state": "in_flight"})))
    await met(store, conditions.ExpectRun(job_id="J1", run=2, allow_cancelled=True))


async def test_expect_job_state(store: ManifestStore) -> None:
    await store.commit(batch(ops.EnqueueJob(job=job())))
    await refused(store, WrongState, conditions.ExpectJobState(job_id="J1", states=("in_flight",)))
    await refused(store, MissingRow, conditions.ExpectJobState(job_id="J9", states=("pending",)))
    await met(store, conditions.ExpectJobState(job_id="J1", states=("in_flight", "pending")))


async def test_expect_not_doomed(store: ManifestStore) -> None:
    await store.commit(batch(retire("a"), retire("b"), ops.DoomBlob(key="a")))
    await refused(store, KeyDoomed, conditions.ExpectNotDoomed(keys=("b", "a")))
    await met(store, conditions.ExpectNotDoomed(keys=("b", "c")))


async def test_expect_epoch(store: ManifestStore) -> None:
    store.set_epoch(4)
    await refused(store, EpochSuperseded, conditions.ExpectEpoch(epoch=3))
    await met(store, conditions.ExpectEpoch(epoch=4))


async def test_expect_segment_state(store: ManifestStore) -> None:
    db_id = await create_database(store)
    await store.commit(batch(ops.RegisterSegment(row=segment(db_id))))
    expected = conditions.ExpectSegmentState(db_id=db_id, segment_id=1, state="sealed")
    await refused(store, WrongState, expected)
    await refused(
        store, MissingRow, conditions.ExpectSegmentState(db_id=db_id, segment_id=2, state="sealed")
    )
    await store.commit(batch(ops.SealSegment(db_id=db_id, segment_id=1, last_lsn=3, bytes=9)))
    await met(store, expected)


async def test_expect_no_idempotency(store: ManifestStore) -> None:
    record = IdempotencyRecord(
        scope_hash=b"s" * 32, body_hash=b"b", created_at_us=1, status=201, headers={}, body=b"{}"
    )
    expected = conditions.ExpectNoIdempotency(scope_hash=record.scope_hash)
    await store.commit(batch(ops.PutIdempotency(record=record), expect=[expected]))
    await refused(store, IdempotencyExists, expected)
    with store.read() as view:
        assert view.idempotency(record.scope_hash) == record
        assert view.idempotency_rows() == [record]
    await store.commit(batch(ops.DeleteIdempotency(scope_hash=record.scope_hash)))
    await met(store, expected)


async def test_expect_leases_wants_exactly_the_live_ones(
    store: ManifestStore, clock: FakeClock
) -> None:
    receipt = await store.commit(batch(lease(chunk_id=0), lease(chunk_id=1)))
    first, second = receipt.results
    assert second > first

    def expected(*tokens: tuple[int, int]) -> conditions.ExpectLeases:
        return conditions.ExpectLeases(db_id=1, job_id="J1", tokens=tokens)

    both = expected((0, first), (1, second))
    for wrong in (expected((0, first)), expected((0, first), (1, first)), expected()):
        await refused(store, LeaseLost, wrong)
    clock.monotonic_seconds += 60.0
    await refused(store, LeaseLost, both)
    clock.monotonic_seconds -= 0.001
    await met(store, both)


async def test_an_earlier_run_is_fenced_by_the_later_ones_token(store: ManifestStore) -> None:
    old = (await store.commit(batch(lease()))).results[0]
    new = (await store.commit(batch(lease()))).results[0]
    await refused(
        store, LeaseLost, conditions.ExpectLeases(db_id=1, job_id="J1", tokens=((0, old),))
    )
    await met(store, conditions.ExpectLeases(db_id=1, job_id="J1", tokens=((0, new),)))


async def test_lease_conflict_names_the_holder(store: ManifestStore, clock: FakeClock) -> None:
    await store.commit(batch(lease("J1")))
    with pytest.raises(LeaseConflict) as caught:
        await store.commit(batch(lease("J2")))
    expires_at_us = clock.wall_ns() // 1000 + 60 * S
    assert caught.value.fields == {
        "holder": "J1", "db_id": 1, "chunk_id": 0, "expires_at_us": expires_at_us,
    }  # fmt: skip
    clock.monotonic_seconds += 60.0
    await store.commit(batch(lease("J2")))
    with store.read() as view:
        assert view.lease(1, 0).job_id == "J2"
        assert leases_of(view, "J1") == []
        assert [held.chunk_id for held in leases_of(view, "J2")] == [0]


async def test_a_batch_may_hand_a_lease_over(store: ManifestStore) -> None:
    await store.commit(batch(lease("J1")))
    await store.commit(batch(ops.ReleaseLeases(job_id="J1"), lease("J2")))
    with store.read() as view:
        assert [held.job_id for held in view.leases()] == ["J2"]


async def test_renewing(store: ManifestStore, clock: FakeClock) -> None:
    renew = ops.RenewLeases(job_id="J1", ttl_seconds=60.0)
    assert (await store.commit(batch(renew))).results == (0,)
    await store.commit(batch(lease(chunk_id=0), lease(chunk_id=1, ttl_seconds=100.0)))
    clock.monotonic_seconds += 59.0
    clock.wall_seconds += 59.0
    assert (await store.commit(batch(renew))).results == (2,)
    with store.read() as view:
        assert {held.expires_at_monotonic for held in leases_of(view, "J1")} == {1119.0}
        assert {held.expires_at_us for held in leases_of(view, "J1")} == {
            clock.wall_ns() // 1000 + 60 * S
        }
    clock.monotonic_seconds += 60.0
    with pytest.raises(LeaseLost) as lost:
        await store.commit(batch(renew))
    assert lost.value.fields == {"job_id": "J1", "db_id": 1, "chunk_id": 0}


async def test_clock_jump_never_moves_a_lease(store: ManifestStore, clock: FakeClock) -> None:
    await store.commit(batch(lease()))
    for jump in (3600.0, -7200.0):
        clock.wall_seconds += jump
        with pytest.raises(LeaseConflict):
            await store.commit(batch(lease("J2")))
    await store.commit(batch(ops.RenewLeases(job_id="J1", ttl_seconds=60.0)))
    clock.monotonic_seconds += 60.0
    with pytest.raises(LeaseLost):
        await store.commit(batch(ops.RenewLeases(job_id="J1", ttl_seconds=60.0)))


async def test_release_of_one_lease_tells_whether_it_was_held(store: ManifestStore) -> None:
    await store.commit(batch(lease(chunk_id=0), lease(chunk_id=1), lease("J2", chunk_id=2)))
    release = ops.ReleaseLease(db_id=1, chunk_id=0)
    assert (await store.commit(batch(release))).results == (True,)
    assert (await store.commit(batch(release))).results == (False,)
    with store.read() as view:
        assert [held.chunk_id for held in view.leases()] == [1, 2]
    await store.commit(batch(ops.ReleaseLeases(job_id="J1")))
    await store.commit(batch(ops.ReleaseLeases(job_id="J1")))
    with store.read() as view:
        assert [held.job_id for held in view.leases()] == ["J2"]
        assert view.counts()["chunk_lease_job_index"] == 1


async def test_a_release_by_token_leaves_the_lease_of_another_run(store: ManifestStore) -> None:
    (old,) = (await store.commit(batch(lease()))).results
    (new,) = (await store.commit(batch(lease()))).results

    def release(token: int) -> ops.ManifestBatch:
        return batch(ops.ReleaseLease(db_id=1, chunk_id=0, token=token))

    with pytest.raises(MissingRow) as refusal:
        await store.commit(release(old))
    assert refusal.value.fields == {"db_id": 1, "chunk_id": 0}
    assert (await store.commit(release(new))).results == (True,)
    with pytest.raises(MissingRow):
        await store.commit(release(new))
    (later,) = (await store.commit(batch(lease("J2")))).results
    assert later > new + 1, "the release took a token of its own: the holder is fenced"


async def test_a_renewal_after_the_publication_has_missed_nothing(store: ManifestStore) -> None:
    renewal = batch(ops.RenewLeases(job_id="J1", ttl_seconds=60.0, count_min=1))
    await store.commit(batch(ops.EnqueueJob(job=job("J1"))))
    with pytest.raises(LeaseLost) as lost:
        await store.commit(renewal)
    assert lost.value.fields == {"job_id": "J1", "held": 0, "expected": 1}
    await store.commit(batch(ops.UpdateJob(job_id="J1", changes={"published_generation": 1})))
    assert (await store.commit(renewal)).results == (0,)


async def test_leases_of_an_earlier_process_are_dead(tmp_path) -> None:
    store = await open_store(tmp_path / "manifest", process_id="old")
    token = (await store.commit(batch(lease(ttl_seconds=1e9)))).results[0]
    await store.aclose()
    store = await open_store(tmp_path / "manifest", process_id="new")
    await refused(
        store, LeaseLost, conditions.ExpectLeases(db_id=1, job_id="J1", tokens=((0, token),))
    )
    with pytest.raises(LeaseLost):
        await store.commit(batch(ops.RenewLeases(job_id="J1", ttl_seconds=1.0)))
    await store.commit(batch(lease("J2", chunk_id=1)))
    assert (await store.commit(batch(ops.DropForeignLeases()))).results == (1,)
    with store.read() as view:
        assert [held.job_id for held in view.leases()] == ["J2"]
    assert (await store.commit(batch(lease("J3")))).results[0] > token
    await store.aclose()
