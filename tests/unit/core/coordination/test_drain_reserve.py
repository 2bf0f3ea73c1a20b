"""The drain reserve of StorageQuota: checkpoints that free WAL always run."""

import pytest

from app.core.base.errors import QuotaExhausted
from app.core.coordination.reservation import Reservation
from tests.helpers.fake_clock import FakeClock
from tests.unit.core.coordination.builders import make_quota, used


async def test_drain_reserve_serves_a_checkpoint_when_all_else_is_full():
    quota = make_quota(100, drain=50)
    quota.set_tenant_limits("acme", limit_bytes=100, job_limit_bytes=10)
    full = await quota.reserve(tenant="acme", job_id=None, size_bytes=100)
    with pytest.raises(QuotaExhausted):
        await quota.reserve(tenant="acme", job_id="J1", size_bytes=40)
    drained = await quota.reserve(tenant="acme", job_id="J1", size_bytes=40, drain_since=0.0)
    assert drained.drained
    quota.check()
    assert used(quota) == {
        "global": 100, "drain": 40, "tenants": {"acme": 100}, "jobs": {"J1": 40},
    }  # fmt: skip
    with pytest.raises(QuotaExhausted) as refused:
        await quota.reserve(tenant="other", job_id="J2", size_bytes=11, drain_since=0.0)
    assert refused.value.fields["level"] == "drain"
    assert quota.release_job("J1") == 40
    full.release()
    ordinary = await quota.reserve(tenant="acme", job_id="J1", size_bytes=10, drain_since=0.0)
    assert not ordinary.drained  # the drain reserve is the last resort
    quota.check()


async def test_the_drain_reserve_serves_the_oldest_wal_first():
    clock = FakeClock()
    quota = make_quota(10, drain=100, clock=clock)

    async def drain(job_id: str, size: int, since: float) -> Reservation:
        return await quota.reserve(tenant="acme", job_id=job_id, size_bytes=size, drain_since=since)

    held = await drain("J1", 80, since=1)
    for job_id, size, since in [("old", 60, 2), ("young", 50, 3)]:
        with pytest.raises(QuotaExhausted):
            await drain(job_id, size, since)
    held.release()
    with pytest.raises(QuotaExhausted):
        await drain("young", 50, since=3)  # there is room, but it is the older one's
    small = await drain("small", 40, since=2.5)  # both fit
    old = await drain("old", 60, since=2)
    small.release()
    with pytest.raises(QuotaExhausted):
        await drain("young", 50, since=3)
    with pytest.raises(QuotaExhausted):
        await drain("gone", 60, since=1)
    old.release()
    with pytest.raises(QuotaExhausted):
        await drain("young", 50, since=3)
    clock.advance(91)  # the other has not come back: it was cancelled
    await drain("young", 50, since=3)
    quota.check()


async def test_nobody_waits_for_itself_nor_for_who_was_served():
    quota = make_quota(10, drain=100)

    async def drain(job_id: str, size: int, since: float) -> Reservation:
        return await quota.reserve(tenant="acme", job_id=job_id, size_bytes=size, drain_since=since)

    held = await drain("J1", 100, since=1)
    with pytest.raises(QuotaExhausted):
        await drain("J2", 60, since=2)
    held.release()
    # Its oldest WAL went in the meantime: what it waited with is older than what it has now.
    (await drain("J2", 60, since=3)).release()
    await drain("J3", 60, since=4)
    quota.check()


async def test_one_larger_than_the_drain_reserve_has_it_alone():
    quota = make_quota(10, drain=50)
    large = await quota.reserve(tenant="a", job_id="J1", size_bytes=200, drain_since=0.0)
    assert large.drained
    quota.check()
    with pytest.raises(QuotaExhausted):
        await quota.reserve(tenant="a", job_id="J2", size_bytes=20, drain_since=0.0)
    large.release()
    quota.check()
    await quota.reserve(tenant="a", job_id="J2", size_bytes=20, drain_since=0.0)
    with pytest.raises(QuotaExhausted):
        await quota.reserve(tenant="a", job_id="J1", size_bytes=200, drain_since=0.0)
    none = make_quota(10)
    with pytest.raises(QuotaExhausted):
        await none.reserve(tenant="a", job_id="J1", size_bytes=11, drain_since=0.0)
