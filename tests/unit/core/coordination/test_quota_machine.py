"""StorageQuota under random sequences: I9, I13."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from app.core.base.errors import QuotaExhausted
from app.core.coordination.reservation import Reservation
from app.core.coordination.usage import UsageKey, UsageKind, UsageLink
from tests.helpers.fake_clock import FakeClock
from tests.unit.core.coordination.builders import EMPTY, at_once, link, make_quota, used


class QuotaMachine(RuleBasedStateMachine):
    """Never above a limit by reserving; sums always agree; all released is nothing used."""

    reservations = Bundle("reservations")
    files = Bundle("files")

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.quota = make_quota(100, drain=20, clock=self.clock)
        self.live: list[Reservation] = []
        self.inodes: dict[tuple[int, UsageLink], None] = {}

    @rule(
        target=reservations,
        tenant=st.sampled_from("ab"),
        job=st.sampled_from(["1", "2", None]),
        size=st.integers(0, 60),
        since=st.none() | st.floats(0, 100),
    )
    def reserve(self, tenant, job, size, since):
        job_id = None if job is None else tenant + job
        before = self.quota.snapshot()
        limits = {entry.tenant: entry.limit_bytes for entry in before.tenants}
        refusal = reservation = None
        try:
            reservation = at_once(
                self.quota.reserve(tenant=tenant, job_id=job_id, size_bytes=size, drain_since=since)
            )
        except QuotaExhausted as error:
            refusal = error
        if refusal is not None:
            assert self.quota.snapshot() == before
            asked = refusal.fields["requested_bytes"]  # beside what older WAL waits for
            assert asked >= size
            assert refusal.fields["used_bytes"] + asked > refusal.fields["limit_bytes"]
            assert 1 <= refusal.retry_after_seconds <= 60
            return None
        after = self.quota.snapshot()
        self.live.append(reservation)
        if size and reservation.drained:
            alone = after.drain_used_bytes == size
            assert alone or after.drain_used_bytes <= after.drain_limit_bytes
        elif size:
            assert after.global_used_bytes <= after.global_limit_bytes
            mine = next(entry for entry in after.tenants if entry.tenant == tenant)
            assert limits.get(tenant) is None or mine.used_bytes <= limits[tenant]
        return reservation

    @rule(reservation=reservations, size=st.integers(0, 60))
    def shrink(self, reservation, size):
        if reservation is not None:
            reservation.shrink(to_bytes=size)

    @rule(reservation=reservations)
    def release(self, reservation):
        if reservation is not None:
            reservation.release()
            assert reservation.size_bytes == 0

    @rule(job_id=st.sampled_from(["a1", "a2", "b1", "b2"]))
    def release_job(self, job_id):
        self.quota.release_job(job_id)
        assert job_id not in self.quota.holders()

    @rule(
        tenant=st.sampled_from("ab"),
        limit=st.none() | st.integers(0, 100),
        job_limit=st.none() | st.integers(0, 50),
    )
    def limit_tenant(self, tenant, limit, job_limit):
        self.quota.set_tenant_limits(tenant, limit_bytes=limit, job_limit_bytes=job_limit)

    @rule(limit=st.integers(0, 150))
    def limit_global(self, limit):
        self.quota.set_global_limit(limit)

    @rule(
        target=files,
        inode=st.integers(0, 3),
        kind=st.sampled_from(UsageKind),
        tenant=st.sampled_from(["a", "b", None]),
        size=st.integers(0, 40),
    )
    def charge(self, inode, kind, tenant, size):
        place = link(kind, f"{tenant}", "file", tenant)
        self.quota.charge(UsageKey(device=0, inode=inode), place, size_bytes=size)
        self.inodes[inode, place] = None
        return inode, place

    @rule(file=consumes(files))
    def discharge(self, file):
        inode, place = file
        self.quota.discharge(UsageKey(device=0, inode=inode), place)
        self.inodes.pop(file, None)

    @rule(seconds=st.floats(0, 100))
    def wait(self, seconds):
        self.clock.advance(seconds)

    @invariant()
    def sums_agree(self):
        self.quota.check()

    def teardown(self):
        for reservation in self.live:
            reservation.release()
        for inode, place in self.inodes:
            self.quota.discharge(UsageKey(device=0, inode=inode), place)
        for tenant in "ab":
            self.quota.set_tenant_limits(tenant, limit_bytes=None, job_limit_bytes=None)
        self.quota.check()
        assert used(self.quota) == EMPTY


TestQuotaMachine = QuotaMachine.TestCase
TestQuotaMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
