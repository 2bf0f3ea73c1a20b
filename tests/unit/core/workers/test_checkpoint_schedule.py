"""Timers of dirty databases: spread, stable, and free of cost for the others."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.workers.checkpoint_schedule import CheckpointSchedule, next_due, phase_of


@given(st.integers(0, 2**63), st.integers(1, 86_400), st.floats(0, 1e9))
def test_due_within_an_interval_and_at_the_databases_place(db_id, interval, now):
    due = next_due(db_id, interval_seconds=interval, now=now)
    assert now < due <= now + interval + 1e-3
    assert 0 <= phase_of(db_id) < 1
    assert (due - phase_of(db_id) * interval) / interval == pytest.approx(
        round((due - phase_of(db_id) * interval) / interval), abs=1e-3
    )


def test_rounding_makes_no_moment_due_that_has_come_already():
    now = float.fromhex("0x1.2960288e69d5bp+8")  # the place of 833, of which a sum falls short
    assert next_due(833, interval_seconds=0.7, now=now) == pytest.approx(now + 0.7)


@pytest.mark.parametrize("first_id", [1, 17, 1000])
def test_a_thousand_that_became_dirty_together_lie_evenly_apart(first_id):
    due = [next_due(n, interval_seconds=60, now=500.0) for n in range(first_id, first_id + 1000)]
    assert len({int(one * 10) for one in due}) > 550  # of 600 tenths of a second
    for second in range(60):
        assert 10 <= sum(second <= (one - 500.0) % 60 < second + 1 for one in due) <= 24


def test_the_earliest_come_first_and_only_once():
    schedule = CheckpointSchedule()
    assert schedule.next_due() is None
    schedule.arm(1, due=30)
    schedule.arm(2, due=10)
    schedule.arm(3, due=20)
    schedule.arm(2, due=25)  # anew
    schedule.disarm(3)
    schedule.disarm(9)
    assert (len(schedule), 3 in schedule) == (2, False)
    assert schedule.next_due() == 25
    assert schedule.take_due(24.9) == []
    assert schedule.take_due(30) == [2, 1]
    assert (schedule.next_due(), len(schedule)) == (None, 0)
