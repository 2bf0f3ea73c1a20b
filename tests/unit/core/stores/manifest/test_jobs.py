"""The job queue's rows and their indexes."""

import pytest

from app.core.base.errors import InvariantViolation
from app.core.stores.manifest import ops
from app.core.stores.manifest.errors import MissingRow, RowExists
from app.core.stores.manifest.store import ManifestStore
from tests.unit.core.stores.manifest.builders import batch, job


def change(job_id: str, **changes: object) -> ops.UpdateJob:
    return ops.UpdateJob(job_id=job_id, changes=changes)


async def test_pending_index_follows_the_state(store: ManifestStore) -> None:
    ended = job("J3", state="completed")
    await store.commit(batch(ops.EnqueueJob(job=job("J1")), ops.EnqueueJob(job=job("J2"))))
    with pytest.raises(RowExists):
        await store.commit(batch(ops.EnqueueJob(job=job("J1"))))

    def pending() -> list[str]:
        with store.read() as view:
            return [row.job_id for row in view.pending_jobs(1, "create_checkpoint")]

    def unfinished() -> list[str]:
        with store.read() as view:
            return [row.job_id for row in view.unfinished_jobs()]

    assert pending() == unfinished() == ["J1", "J2"]
    with store.read() as view:
        assert view.pending_jobs(1, "create_checkpoint")[-1].job_id == "J2"
        assert view.pending_jobs(1, "prune_checkpoint") == []
        assert view.pending_jobs(2, "create_checkpoint") == []
    await store.commit(batch(change("J1", state="in_flight", run=1)))
    assert (pending(), unfinished()) == (["J2"], ["J1", "J2"])
    await store.commit(batch(change("J1", state="pending")))
    assert pending() == ["J1", "J2"]
    await store.commit(batch(change("J1", state="in_flight"), change("J1", state="completed")))
    assert (pending(), unfinished()) == (["J2"], ["J2"])
    await store.commit(batch(change("J1", stage="staging"), ops.EnqueueJob(job=ended)))
    assert unfinished() == ["J2"], "what has ended stays out of the index"
    await store.commit(batch(ops.DeleteJob(job_id="J2"), ops.DeleteJob(job_id="J1")))
    assert (pending(), unfinished()) == ([], [])
    with store.read() as view:
        assert view.job("J1") is None
        counts = view.counts()
    assert (counts["job_pending_index"], counts["job_unfinished_index"]) == (0, 0)


async def test_update_replaces_fields_only(store: ManifestStore) -> None:
    await store.commit(batch(ops.EnqueueJob(job=job("J1", params={"a": 1}))))
    await store.commit(batch(change("J1", plan=b"plan", stage="staging")))
    with store.read() as view:
        assert view.job("J1") == job("J1", params={"a": 1}, plan=b"plan", stage="staging")


@pytest.mark.parametrize(
    "changes", [{"job_id": "J2"}, {"no_such_field": 1}, {"attempts": "three"}, {"plan": object()}]
)
async def test_an_update_that_could_not_be_read_back_is_refused(
    store: ManifestStore, changes: dict[str, object]
) -> None:
    await store.commit(batch(ops.EnqueueJob(job=job("J1"))))
    with pytest.raises(InvariantViolation):
        await store.commit(batch(ops.UpdateJob(job_id="J1", changes=changes)))
    with store.read() as view:
        assert view.job("J1") == job("J1")


async def test_missing_jobs(store: ManifestStore) -> None:
    for op in (change("J1", attempts=1), ops.DeleteJob(job_id="J1")):
        with pytest.raises(MissingRow):
            await store.commit(batch(op))


async def test_listing_newest_first(store: ManifestStore) -> None:
    await store.commit(
        batch(
            ops.EnqueueJob(job=job("J1", state="completed")),
            ops.EnqueueJob(job=job("J2", tenant="beta")),
            ops.EnqueueJob(job=job("J3", kind="prune_checkpoint")),
            ops.EnqueueJob(job=job("J4", database="other")),
        )
    )
    with store.read() as view:

        def ids(**filters: object) -> list[str]:
            return [row.job_id for row in view.jobs(**filters)]

        assert ids() == ["J4", "J3", "J2", "J1"]
        assert ids(limit=2) == ["J4", "J3"]
        assert ids(after="J3") == ["J2", "J1"]
        assert ids(kinds={"create_checkpoint"}) == ["J4", "J2", "J1"]
        assert ids(tenant="acme", database="db") == ["J3", "J1"]
        assert ids(tenants={"beta"}) == ["J2"]
        assert ids(states=("completed",), limit=1) == ["J1"]
