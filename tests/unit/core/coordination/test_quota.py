"""StorageQuota: I9, I13; fault row 5."""

import asyncio

import pytest

from app.core.base import failpoints
from app.core.base.errors import ErrorKind, InvariantViolation, QuotaExhausted
from app.core.base.events import Events
from app.core.coordination.quota import Reclaimer, StorageQuota
from app.core.coordination.quota_levels import JobUsage, QuotaSnapshot, TenantUsage
from app.core.coordination.usage import UsageKey, UsageKind
from tests.helpers.fake_clock import FakeClock
from tests.unit.core.coordination.builders import EMPTY, at_once, link, make_quota, used


async def test_a_snapshot_tells_limits_and_who_uses_what():
    quota = make_quota(1000, drain=50)
    quota.set_tenant_limits("acme", limit_bytes=600, job_limit_bytes=None)
    account = quota.account(kind=UsageKind.WAL, owner="1", tenant="beta")
    account.charge("0001.wal", device=1, inode=1, size_bytes=10)
    await quota.reserve(tenant="acme", job_id="J1", size_bytes=300)
    assert quota.snapshot() == QuotaSnapshot(
        global_limit_bytes=1000,
        global_used_bytes=310,
        drain_limit_bytes=50,
        drain_used_bytes=0,
        tenants=(
            TenantUsage(tenant="acme", limit_bytes=600, used_bytes=300),
            TenantUsage(tenant="beta", limit_bytes=None, used_bytes=10),
        ),
        jobs=(JobUsage(job_id="J1", tenant="acme", reserved_bytes=300),),
        files_by_kind={"wal": 10, "scratch": 0, "hot_cache": 0},
    )
    nothing = make_quota(0).snapshot()
    assert (nothing.global_limit_bytes, nothing.drain_limit_bytes) == (0, 0)


async def test_hierarchical_reservation():
    quota = make_quota(1000)
    quota.set_tenant_limits("acme", limit_bytes=600, job_limit_bytes=400)

    first = await quota.reserve(tenant="acme", job_id="J1", size_bytes=300)
    await quota.reserve(tenant="acme", job_id="J2", size_bytes=200)
    await quota.reserve(tenant="other", job_id=None, size_bytes=100)
    assert used(quota) == {
        "global": 600,
        "drain": 0,
        "tenants": {"acme": 500, "other": 100},
        "jobs": {"J1": 300, "J2": 200},
    }
    quota.check()

    # One refusal for each level, which takes nothing at any other.
    before = used(quota)
    for tenant, job_id, size_bytes, level, limit, held in [
        ("acme", "J1", 101, "job", 400, 300),
        ("acme", "J3", 101, "tenant", 600, 500),
        ("acme", None, 101, "tenant", 600, 500),
        ("other", "J4", 401, "global", 1000, 600),
        ("new", None, 401, "global", 1000, 600),
    ]:
        with pytest.raises(QuotaExhausted) as refused:
            await quota.reserve(tenant=tenant, job_id=job_id, size_bytes=size_bytes)
        assert refused.value.fields == {
            "level": level,
            "limit_bytes": limit,
            "used_bytes": held,
            "requested_bytes": size_bytes,
        }
        assert used(quota) == before
        quota.check()

    await quota.reserve(tenant="acme", job_id="J1", size_bytes=100)  # exactly the job's limit
    first.shrink(to_bytes=50)
    assert used(quota)["jobs"] == {"J1": 150, "J2": 200}
    first.shrink(to_bytes=80)  # never grows
    assert first.size_bytes == 50
    assert quota.release_job("J1") == 150
    assert quota.release_job("J1") == 0
    assert used(quota)["tenants"] == {"acme": 200, "other": 100}
    quota.check()


async def test_reservation_release_on_failure():
    quota = make_quota(1000)

    async def fail_with(error: BaseException) -> None:
        with await quota.reserve(tenant="acme", job_id="J1", size_bytes=1000):
            assert used(quota)["global"] == 1000
            raise error

    for error in (RuntimeError("staging"), asyncio.CancelledError()):
        with pytest.raises(type(error)):
            await fail_with(error)
        assert used(quota) == EMPTY
        quota.check()

    reservation = await quota.reserve(tenant="acme", job_id="J1", size_bytes=600)
    reservation.release()
    reservation.release()  # again is harmless
    assert quota.release_job("J1") == 0
    assert used(quota) == EMPTY
    with await quota.reserve(tenant="acme", job_id="J1", size_bytes=1000):
        pass
    quota.check()


async def test_release_that_was_interrupted_can_be_repeated(monkeypatch):
    quota = make_quota(1000)
    reservation = await quota.reserve(tenant="acme", job_id="J1", size_bytes=600)

    def interrupt(name: str) -> None:
        assert name == "quota.before_release"
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(failpoints, "fp", interrupt)
        with pytest.raises(KeyboardInterrupt):
            reservation.release()
    quota.check()
    assert used(quota)["global"] == 600
    reservation.release()
    assert used(quota) == EMPTY


async def test_quota_exhaustion_backpressure():
    """The loser is told at once, with what it can act on; room that comes back can be taken."""
    clock = FakeClock()
    quota = make_quota(1000, clock=clock)
    held = await quota.reserve(tenant="acme", job_id="J1", size_bytes=900)
    with pytest.raises(QuotaExhausted) as refused:
        await quota.reserve(tenant="acme", job_id="J2", size_bytes=200)
    assert refused.value.kind is ErrorKind.EXHAUSTED
    assert refused.value.code == "quota_exhausted"
    assert refused.value.retry_after_seconds == 5  # nothing was freed lately: the honest guess
    quota.check()

    with pytest.raises(QuotaExhausted) as refused:
        await quota.reserve(tenant="acme", job_id="J2", size_bytes=1000)
    assert refused.value.retry_after_seconds == 5, "it fits once the rest has gone"
    held.shrink(to_bytes=600)  # 300 in the last moment: 10 bytes a second of memory
    with pytest.raises(QuotaExhausted) as refused:
        await quota.reserve(tenant="acme", job_id="J2", size_bytes=500)
    assert refused.value.retry_after_seconds == 10  # 100 are missing
    clock.advance(30)
    with pytest.raises(QuotaExhausted) as refused:
        await quota.reserve(tenant="acme", job_id="J2", size_bytes=500)
    assert refused.value.retry_after_seconds == 28  # the memory fades by e in 30 s

    with pytest.raises(QuotaExhausted, match="alone is larger") as refused:
        await quota.reserve(tenant="acme", job_id="J2", size_bytes=1001)
    assert refused.value.retry_after_seconds == 60

    held.release()
    with await quota.reserve(tenant="acme", job_id="J2", size_bytes=1000):
        quota.check()


async def test_fifty_tasks_reserve_at_once():
    quota = make_quota(1000)
    quota.set_tenant_limits("t0", limit_bytes=150, job_limit_bytes=None)
    start = asyncio.Event()
    peak = 0
    retry_after: list[int | None] = []
    refused = 0
    served = 0

    async def job(number: int) -> None:
        nonlocal peak, refused, served
        await start.wait()
        for round_ in range(20):
            try:
                reservation = await quota.reserve(
                    tenant=f"t{number % 5}", job_id=f"J{number}", size_bytes=30 + number % 7
                )
            except QuotaExhausted as error:
                refused += 1
                retry_after.append(error.retry_after_seconds)
                await asyncio.sleep(0)
                continue
            with reservation:
                served += 1
                seen = quota.snapshot()
                peak = max(peak, seen.global_used_bytes)
                assert seen.global_used_bytes <= 1000
                assert all(t.used_bytes <= 150 for t in seen.tenants if t.tenant == "t0")
                for _ in range(round_ % 4):
                    await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        for number in range(50):
            group.create_task(job(number))
        start.set()
    assert served + refused == 1000
    assert refused > 0
    assert all(retry_after)
    assert 900 < peak <= 1000
    quota.check()
    assert used(quota) == {**EMPTY, "tenants": {"t0": 0}}


async def test_limits_change_live():
    quota = make_quota(1000)
    held = await quota.reserve(tenant="acme", job_id="J1", size_bytes=800)
    quota.set_global_limit(500)
    quota.check()
    with pytest.raises(QuotaExhausted):
        await quota.reserve(tenant="acme", job_id=None, size_bytes=1)
    held.shrink(to_bytes=400)
    quota.check()
    await quota.reserve(tenant="acme", job_id=None, size_bytes=100)

    quota.set_tenant_limits("acme", limit_bytes=450, job_limit_bytes=100)
    with pytest.raises(QuotaExhausted) as refused:
        await quota.reserve(tenant="acme", job_id="J1", size_bytes=1)
    assert refused.value.fields["level"] == "job"
    with pytest.raises(QuotaExhausted) as refused:
        await quota.reserve(tenant="acme", job_id=None, size_bytes=1)
    assert refused.value.fields["level"] == "tenant"
    quota.set_tenant_limits("acme", limit_bytes=None, job_limit_bytes=None)
    quota.set_global_limit(501)
    await quota.reserve(tenant="acme", job_id="J1", size_bytes=1)
    quota.check()


async def test_what_is_spent_is_not_freed():
    """The rate behind Retry-After counts bytes that went, not those that became files."""
    clock = FakeClock()
    quota = make_quota(1000, clock=clock)
    account = quota.account(kind=UsageKind.WAL, owner="1", tenant="acme")
    for number in range(9):
        held = quota.reserve_now(tenant="acme", job_id=None, size_bytes=100)
        assert held is not None
        account.charge(f"{number}", device=1, inode=number, size_bytes=100)
        held.spend(100)
        assert (held.size_bytes, used(quota)["global"]) == (0, 100 * (number + 1))
    assert quota.reserve_now(tenant="acme", job_id=None, size_bytes=101) is None
    with pytest.raises(QuotaExhausted) as refused:
        await quota.make_room(tenant="acme", size_bytes=101)
    assert refused.value.retry_after_seconds == 5  # nothing was freed
    account.forget()
    assert used(quota) == {**EMPTY, "tenants": {}}
    quota.check()


class Cache:
    """A reclaimer that frees after a turn of the loop, as a real one does."""

    def __init__(self, quota: StorageQuota, sizes: list[int], *, device: int = 9) -> None:
        self.account = quota.account(kind=UsageKind.HOT_CACHE, owner=f"{device}", tenant=None)
        self.device = device
        self.sizes = sizes
        self.asked: list[int] = []
        for number, size in enumerate(sizes):
            self.account.charge(f"f{number}", device=device, inode=number, size_bytes=size)

    async def reclaim(self, size_bytes: int) -> int:
        self.asked.append(size_bytes)
        freed = 0
        for number, size in enumerate(self.sizes):
            if freed >= size_bytes:
                break
            if size:
                self.sizes[number] = 0
                await asyncio.sleep(0)
                self.account.discharge(f"f{number}", device=self.device, inode=number)
                freed += size
        return freed


async def test_reclaimers_are_asked_before_refusing():
    quota = make_quota(1000)
    cache = Cache(quota, [300, 300, 300])
    reclaimer: Reclaimer = cache
    quota.add_reclaimer(reclaimer)
    quota.set_tenant_limits("small", limit_bytes=50, job_limit_bytes=None)

    with pytest.raises(QuotaExhausted):
        await quota.reserve(tenant="small", job_id=None, size_bytes=60)
    assert cache.asked == []  # dropping cache would not have helped its tenant

    await quota.reserve(tenant="acme", job_id=None, size_bytes=100)
    assert cache.asked == []
    await quota.reserve(tenant="acme", job_id=None, size_bytes=200)
    assert cache.asked == [200]
    assert used(quota)["global"] == 900
    with pytest.raises(QuotaExhausted) as refused:
        await quota.reserve(tenant="acme", job_id=None, size_bytes=701)
    assert refused.value.fields["used_bytes"] == 300  # all cache went, and still no room
    quota.check()


async def test_reclaimers_are_asked_in_turn_for_what_is_still_missing():
    quota = make_quota(300)
    caches = [Cache(quota, [100], device=number) for number in range(3)]
    for cache in caches:
        quota.add_reclaimer(cache)
    await quota.reserve(tenant="acme", job_id=None, size_bytes=150)
    assert [cache.asked for cache in caches] == [[150], [50], []]
    quota.check()


async def test_no_more_is_reclaimed_than_was_missing():
    quota = make_quota(200)
    caches = [Cache(quota, [100], device=number) for number in range(2)]
    for cache in caches:
        quota.add_reclaimer(cache)
    await quota.reserve(tenant="acme", job_id=None, size_bytes=100)
    assert [cache.asked for cache in caches] == [[100], []]


async def test_a_single_byte_that_was_reclaimed_is_worth_trying_again():
    quota = make_quota(100)
    quota.add_reclaimer(Cache(quota, [1]))
    await quota.reserve(tenant="acme", job_id=None, size_bytes=100)


async def test_two_who_are_short_do_not_take_the_same_room():
    quota = make_quota(1000)
    cache = Cache(quota, [250, 250, 250, 250])
    quota.add_reclaimer(cache)
    async with asyncio.TaskGroup() as group:
        for number in range(4):
            group.create_task(quota.reserve(tenant=f"t{number}", job_id=None, size_bytes=250))
    assert used(quota)["global"] == 1000
    assert cache.sizes == [0, 0, 0, 0]
    quota.check()


async def test_what_one_reclaimed_serves_the_next_who_waited():
    quota = make_quota(1000)
    cache = Cache(quota, [500, 500])
    quota.add_reclaimer(cache)
    async with asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(quota.reserve(tenant="acme", job_id=None, size_bytes=250))
    assert cache.sizes == [0, 500]
    quota.check()


async def test_cancelled_while_reclaiming_takes_nothing():
    quota = make_quota(100)
    entered = asyncio.Event()

    class Stuck:
        async def reclaim(self, size_bytes: int) -> int:
            entered.set()
            return await asyncio.get_running_loop().create_future()

    quota.add_reclaimer(Stuck())
    held = await quota.reserve(tenant="acme", job_id=None, size_bytes=100)
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(quota.reserve(tenant="acme", job_id="J1", size_bytes=1))
        await entered.wait()
        assert at_once(quota.trim()) == 0, "it has nothing to free"
        waiting.cancel()
    held.release()
    assert used(quota) == EMPTY


async def test_trim_drops_cache_down_to_a_lowered_limit():
    quota = make_quota(600)
    cache = Cache(quota, [300, 300])
    quota.add_reclaimer(cache)
    assert await quota.trim() == 0
    assert cache.asked == []
    quota.set_global_limit(599)
    assert await quota.trim() == 300
    quota.set_global_limit(0)
    assert await quota.trim() == 300
    assert (cache.asked, used(quota)) == ([1, 300], EMPTY)


async def test_room_is_made_for_what_cannot_wait():
    quota = make_quota(1000)
    cache = Cache(quota, [600])
    quota.add_reclaimer(cache)
    quota.set_tenant_limits("small", limit_bytes=50, job_limit_bytes=None)
    assert quota.reserve_now(tenant="acme", job_id=None, size_bytes=500) is None
    assert (cache.account.missing_bytes(500), cache.account.missing_bytes(400)) == (100, 0)
    with pytest.raises(QuotaExhausted) as refused:
        await quota.make_room(tenant="small", size_bytes=500)
    assert refused.value.fields["level"] == "tenant"
    assert cache.asked == []
    await quota.make_room(tenant="acme", size_bytes=500)
    assert cache.asked == [100]
    assert quota.reserve_now(tenant="acme", job_id="J1", size_bytes=500) is not None
    assert quota.holders() == ("J1",)


async def test_refusals_and_overruns_are_told():
    told: list[tuple[str, dict]] = []
    events = Events()
    events.subscribe(lambda name, level, fields: told.append((name, dict(fields))))
    quota = StorageQuota(
        global_limit_bytes=10, drain_limit_bytes=50, clock=FakeClock(), events=events
    )
    with pytest.raises(QuotaExhausted):
        await quota.reserve(tenant="acme", job_id="J1", size_bytes=11)
    await quota.reserve(tenant="acme", job_id="J1", size_bytes=51, drain_since=0.0)
    assert told == [
        ("quota.exhausted", {"level": "global", "tenant": "acme", "requested_bytes": 11}),
        ("quota.drain_overrun", {"job_id": "J1", "bytes": 51}),
    ]
    with pytest.raises(QuotaExhausted):
        await quota.make_room(tenant="beta", size_bytes=12)
    assert told[-1][1] == {"level": "global", "tenant": "beta", "requested_bytes": 12}
    with pytest.raises(QuotaExhausted):
        await quota.reserve(tenant="beta", job_id="J2", size_bytes=20, drain_since=0.0)
    assert told[-1][1] == {"level": "drain", "tenant": "beta", "requested_bytes": 20}


async def test_an_account_charges_by_name():
    quota = make_quota(1000)
    cache = quota.account(kind=UsageKind.HOT_CACHE, tenant=None)
    scratch = quota.account(kind=UsageKind.SCRATCH, owner="J1", tenant="acme")
    for name in ("one", "two"):  # of the same file
        cache.charge(name, device=1, inode=1, size_bytes=100)
    scratch.charge("chunk-0", device=1, inode=2, size_bytes=30)
    cache.discharge("one", device=1, inode=1)
    assert used(quota) == {**EMPTY, "global": 130, "tenants": {"acme": 30}}
    quota.forget_scratch("J1")
    assert used(quota) == {**EMPTY, "global": 100}
    quota.forget(kind=UsageKind.HOT_CACHE, owner="")
    assert used(quota) == EMPTY


async def test_an_inode_is_charged_once_and_passed_on():
    quota = make_quota(1000)
    inode = UsageKey(device=1, inode=7)
    wal = link(UsageKind.WAL, "3", "0001.wal", "acme")
    scratch = link(UsageKind.SCRATCH, "J1", "chunk-0", "acme")
    cached = link(UsageKind.HOT_CACHE, "", "ab" * 32, None)

    quota.charge(inode, wal, size_bytes=100)
    quota.charge(inode, wal, size_bytes=250)  # the segment grew
    quota.charge(inode, scratch, size_bytes=250)
    quota.charge(inode, cached, size_bytes=250)
    assert used(quota) == {**EMPTY, "global": 250, "tenants": {"acme": 250}}

    quota.discharge(inode, scratch)
    quota.discharge(inode, scratch)  # again is harmless
    assert used(quota)["tenants"] == {"acme": 250}
    quota.discharge(inode, wal)
    assert used(quota) == {**EMPTY, "global": 250}  # passed on to the cache
    assert quota.snapshot().files_by_kind == {"wal": 0, "scratch": 0, "hot_cache": 250}
    quota.check()
    quota.discharge(inode, cached)
    assert used(quota) == EMPTY
    quota.check()


async def test_late_discharge_does_not_hit_the_inode_numbers_next_file():
    quota = make_quota(1000)
    inode = UsageKey(device=1, inode=7)
    old = link(UsageKind.WAL, "3", "0001.wal", "acme")
    new = link(UsageKind.WAL, "3", "0002.wal", "acme")
    quota.charge(inode, old, size_bytes=100)
    quota.charge(inode, new, size_bytes=10)
    quota.discharge(inode, old)
    assert used(quota)["tenants"] == {"acme": 10}


async def test_charges_above_a_limit_refuse_reservations_until_use_falls():
    quota = make_quota(1000)
    quota.set_tenant_limits("acme", limit_bytes=100, job_limit_bytes=None)
    account = quota.account(kind=UsageKind.WAL, owner="3", tenant="acme")
    account.charge("0001.wal", device=1, inode=1, size_bytes=150)
    with pytest.raises(QuotaExhausted) as refused:
        await quota.reserve(tenant="acme", job_id=None, size_bytes=1)
    assert refused.value.fields["used_bytes"] == 150
    await quota.reserve(tenant="acme", job_id=None, size_bytes=0)  # nothing always fits
    quota.forget(kind=UsageKind.WAL, owner="3")
    await quota.reserve(tenant="acme", job_id=None, size_bytes=100)
    quota.check()


async def test_bugs_are_told():
    quota = make_quota(1000)
    with pytest.raises(InvariantViolation):
        await quota.reserve(tenant="acme", job_id=None, size_bytes=-1)
    held = await quota.reserve(tenant="acme", job_id="J1", size_bytes=1)
    with pytest.raises(InvariantViolation):
        await quota.reserve(tenant="other", job_id="J1", size_bytes=1)
    with pytest.raises(InvariantViolation):
        held.shrink(to_bytes=-1)
    quota.check()
    held._size_bytes = 2
    with pytest.raises(InvariantViolation):
        quota.check()


async def test_confined_to_one_thread():
    quota = make_quota(1000)
    with pytest.raises(AssertionError, match="confined"):
        await asyncio.to_thread(quota.snapshot)
