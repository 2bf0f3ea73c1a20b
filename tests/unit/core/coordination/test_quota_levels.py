"""One budget, and what a refusal says of it."""

import pytest

from app.core.base.errors import InvariantViolation
from app.core.coordination.quota_levels import FreedRate, Level, LevelName


def test_what_is_held_beyond_what_was_ever_allowed_is_a_bug():
    level = Level(LevelName.DRAIN, limit_bytes=10)
    level.set_limit(20)
    level.take(20)
    level.set_limit(5)  # what is held stays allowed
    level.check(20, 0)
    level.give_back(12, now=None)
    level._reserved_bytes = 9  # what went may not come back beyond the limit
    with pytest.raises(InvariantViolation):
        level.check(9, 0)
    level._reserved_bytes = 0
    level.take_alone(30)
    level.check(30, 0)
    level._reserved_bytes = 31
    with pytest.raises(InvariantViolation):
        level.check(31, 0)
    changed = Level(LevelName.TENANT, limit_bytes=None)
    changed.set_limit(20)
    for level in (changed, Level(LevelName.TENANT, limit_bytes=20)):
        level._reserved_bytes = 21
        with pytest.raises(InvariantViolation):
            level.check(21, 0)


def test_only_what_goes_counts_as_freed():
    level = Level(LevelName.GLOBAL, limit_bytes=1000)
    level.charge(600, now=0)
    assert level.freed.per_second(0) == 0
    level.charge(-60, now=0)
    assert level.freed.per_second(0) == 2
    level.take(300)
    level.give_back(100, now=None)
    assert level.freed.per_second(0) == 2
    level.give_back(60, now=0)
    assert level.freed.per_second(0) == 4


@pytest.mark.parametrize(("missing", "seconds"), [(0, 1), (1, 1), (21, 3), (599, 60), (601, 60)])
def test_a_retry_after_stays_within_a_minute(missing, seconds):
    freed = FreedRate()
    assert freed.seconds_until(missing, now=0) == 5, "nothing was freed: a guess"
    freed.add(300, now=0)  # ten a second
    assert freed.seconds_until(missing, now=0) == seconds


def test_a_trickle_is_waited_for_until_it_is_forgotten():
    freed = FreedRate()
    freed.add(1, now=0)
    assert freed.seconds_until(1, now=15) == 50
    assert freed.seconds_until(1, now=30) == 5


@pytest.mark.parametrize(
    "make",
    [
        lambda: Level(LevelName.JOB, limit_bytes=-1),
        lambda: Level(LevelName.JOB, limit_bytes=0).set_limit(-1),
    ],
)
def test_a_limit_is_not_negative(make):
    with pytest.raises(InvariantViolation):
        make()
