"""WAL back-pressure: judged per database, fair among tenants."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.coordination.wal_backlog import Backlog, BacklogLimits, WalBacklog

LIMITS = BacklogLimits(budget_bytes=1000, trigger_ratio=0.4, overdue_seconds=30)


@pytest.fixture
def backlog() -> WalBacklog:
    return WalBacklog(LIMITS)


def write(backlog: WalBacklog, entry: Backlog, size: int, now: float = 0.0) -> None:
    """An append that is taken and becomes durable."""
    assert backlog.hold(entry, size, now=now) is None
    backlog.let_go(entry, size)
    backlog.update(entry, entry.bytes + size, now=now)


def test_shares_are_even_among_tenants_and_then_among_databases(backlog):
    one, two = (backlog.add(db_id=n, tenant="many") for n in (1, 2))
    other = backlog.add(db_id=3, tenant="other")
    assert backlog.share_bytes(one) == 1000
    write(backlog, one, 10)
    assert [backlog.share_bytes(entry) for entry in (one, two, other)] == [1000, 500, 500]
    write(backlog, two, 10)
    write(backlog, other, 10)
    assert [backlog.share_bytes(entry) for entry in (one, two, other)] == [250, 250, 500]
    assert backlog.share_bytes(backlog.add(db_id=4, tenant="third")) == 333, "whole bytes"
    backlog.update(two, 0, now=1)
    assert backlog.share_bytes(one) == 500


def test_it_asks_for_a_checkpoint_below_half_of_the_share(backlog):
    entry = backlog.add(db_id=1, tenant="acme")
    write(backlog, entry, 399, now=5)
    assert (entry.dirty_since, entry.pressed_since) == (5, None)
    write(backlog, entry, 1, now=6)
    assert entry.pressed_since == 6
    write(backlog, entry, 1, now=7)
    assert (entry.dirty_since, entry.pressed_since) == (5, 6)
    backlog.update(entry, 100, now=8)
    assert (entry.dirty_since, entry.pressed_since) == (5, None)
    backlog.update(entry, 0, now=9)
    assert entry.dirty_since is None


def test_a_database_within_its_share_is_never_refused(backlog):
    flood = backlog.add(db_id=1, tenant="flood")
    quiet = backlog.add(db_id=2, tenant="quiet")
    write(backlog, flood, 1000)
    refusal = backlog.hold(flood, 1, now=0)
    assert refusal is not None
    assert (refusal.share_bytes, refusal.backlog_bytes) == (1000, 1000)
    write(backlog, quiet, 250)
    write(backlog, quiet, 250)  # its share, although the budget is used up
    assert backlog.hold(quiet, 1, now=0) is not None
    backlog.update(flood, 0, now=1)
    write(backlog, quiet, 499, now=1)


def test_beyond_its_share_it_waits_only_once_its_checkpoint_is_overdue(backlog):
    one = backlog.add(db_id=1, tenant="a")
    other = backlog.add(db_id=2, tenant="b")
    write(backlog, other, 10)
    write(backlog, one, 500, now=100)  # pressed from here on
    write(backlog, one, 100, now=129)  # beyond its share, in time
    assert backlog.hold(one, 1, now=130) is not None
    backlog.update(one, 0, now=131)
    write(backlog, one, 100, now=132)


def test_beyond_its_share_it_may_take_the_last_byte_of_the_budget(backlog):
    one, other = backlog.add(db_id=1, tenant="a"), backlog.add(db_id=2, tenant="b")
    write(backlog, other, 10)
    write(backlog, one, 500)
    write(backlog, one, 490)
    assert backlog.hold(one, 1, now=0) is not None


def test_retry_after_is_what_the_drain_rate_says(backlog):
    entry = backlog.add(db_id=1, tenant="a")
    write(backlog, entry, 1000)
    refusal = backlog.hold(entry, 100, now=0)
    assert refusal is not None
    assert refusal.retry_after_seconds == 5  # nothing drained lately
    backlog.update(entry, 700, now=0)  # 300 in 30 s of memory: 10 a second
    write(backlog, entry, 300)
    refusal = backlog.hold(entry, 100, now=0)
    assert refusal is not None
    assert refusal.retry_after_seconds == 10


def test_an_append_beyond_the_budget_passes_an_empty_log(backlog):
    entry = backlog.add(db_id=1, tenant="a")
    write(backlog, entry, 5000)
    assert backlog.hold(entry, 1, now=0) is not None


def test_holds_count_before_they_are_durable(backlog):
    entry = backlog.add(db_id=1, tenant="a")
    assert backlog.hold(entry, 600, now=0) is None
    assert backlog.hold(entry, 600, now=0) is not None
    backlog.let_go(entry, 600)
    assert backlog.hold(entry, 600, now=0) is None


def test_dirty_databases_come_oldest_first_and_go_when_removed(backlog):
    entries = [backlog.add(db_id=n, tenant="ab"[n % 2]) for n in range(4)]
    for now, entry in enumerate(reversed(entries)):
        write(backlog, entry, 1, now=now)
    assert [entry.db_id for entry in backlog.dirty()] == [3, 2, 1, 0]
    assert [entry.db_id for entry in backlog.dirty("a")] == [2, 0]
    assert [backlog.dirty_since(n) for n in (3, 0, 9)] == [0, 3, math.inf]
    assert backlog.get(2) is entries[2]
    for entry in (*entries, entries[0]):  # again is harmless
        backlog.remove(entry)
    assert (backlog.dirty(), backlog.total_bytes, backlog.get(0)) == ([], 0, None)
    assert backlog.share_bytes(backlog.add(db_id=9, tenant="z")) == 1000


def test_of_those_that_became_dirty_together_the_lowest_id_comes_first(backlog):
    for db_id in (2, 1, 3):
        write(backlog, backlog.add(db_id=db_id, tenant="a"), 1)
    assert [entry.db_id for entry in backlog.dirty()] == [1, 2, 3]


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(1, 400), st.booleans(), st.floats(0, 50)),
        max_size=60,
    )
)
def test_sums_agree_and_nobody_within_its_share_waits(steps):
    backlog = WalBacklog(LIMITS)
    entries = [backlog.add(db_id=n, tenant=f"t{n % 3}") for n in range(6)]
    now = 0.0
    for at, size, drains, seconds in steps:
        now += seconds
        entry = entries[at]
        if drains:
            backlog.update(entry, 0, now=now)
            continue
        within = entry.bytes + size <= backlog.share_bytes(entry)
        refusal = backlog.hold(entry, size, now=now)
        if refusal is None:
            backlog.let_go(entry, size)
            backlog.update(entry, entry.bytes + size, now=now)
        else:
            assert not within
            assert 1 <= refusal.retry_after_seconds <= 60
        assert backlog.total_bytes == sum(entry.bytes for entry in entries)
