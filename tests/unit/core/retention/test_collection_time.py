"""Time as the collector sees it: never ahead of what has passed, paused after a jump (row 42)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.retention.collection_time import (
    DOWNTIME_US_MAX,
    JUMP_US_MAX,
    CollectionTime,
    StoredTime,
    started,
)

HOUR = 3600 * 1_000_000
NOON = 1_700_000_000_000_000


def at(time_us: int = NOON, wall_us: int = NOON) -> CollectionTime:
    return CollectionTime(time_us=time_us, wall_us=wall_us, monotonic=100.0)


def test_it_follows_the_wall_while_that_runs_evenly() -> None:
    time = at().advanced(wall_us=NOON + HOUR + 1500, monotonic=3700.0)
    assert (time.time_us, time.now_us, time.paused) == (
        NOON + HOUR + 1500,
        NOON + HOUR + 1500,
        False,
    )


@pytest.mark.parametrize("step", [60 * 1_000_000, -60 * 1_000_000])
def test_a_step_brings_nothing_down_early(step: int) -> None:
    time = at().advanced(wall_us=NOON + HOUR + step, monotonic=3700.0)
    assert not time.paused
    assert time.time_us == NOON + HOUR
    assert time.now_us == min(NOON + HOUR, NOON + HOUR + step)
    later = time.advanced(wall_us=NOON + 2 * HOUR + step, monotonic=7300.0)
    assert later.time_us == NOON + 2 * HOUR


@pytest.mark.parametrize("jump", [HOUR, -HOUR])
def test_a_jump_pauses_until_someone_accepts_the_clock(jump: int) -> None:
    time = at().advanced(wall_us=NOON + jump, monotonic=100.0)
    assert time.paused
    time = time.advanced(wall_us=NOON + jump + 1_000_000, monotonic=101.0)
    assert time.paused
    assert started(time.stored, wall_us=time.wall_us, monotonic=0.0).paused
    time = time.accepted()
    assert (time.paused, time.time_us) == (False, NOON + jump + 1_000_000)


def test_downtime_counts_up_to_a_cap() -> None:
    stored = StoredTime(time_us=NOON, wall_us=NOON)
    assert started(stored, wall_us=NOON + HOUR, monotonic=0.0).time_us == NOON + HOUR
    long = started(stored, wall_us=NOON + 90 * DOWNTIME_US_MAX, monotonic=0.0)
    assert long.now_us == NOON + DOWNTIME_US_MAX
    back = started(stored, wall_us=NOON - HOUR, monotonic=0.0)
    assert (back.time_us, back.now_us) == (NOON, NOON - HOUR)
    behind = StoredTime(time_us=NOON - HOUR, wall_us=NOON)
    assert started(behind, wall_us=NOON + HOUR, monotonic=0.0).time_us == NOON
    assert started(None, wall_us=NOON, monotonic=0.0).time_us == NOON


@given(st.lists(st.tuples(st.floats(0, 7200), st.integers(-JUMP_US_MAX, JUMP_US_MAX)), max_size=20))
def test_it_never_runs_ahead_of_what_has_passed(moves: list[tuple[float, int]]) -> None:
    """But by what a time server may slew at once."""
    time, passed, wall = at(), 0.0, NOON
    for seconds, step in moves:
        passed += seconds
        wall += int(seconds * 1_000_000) + step
        time = time.advanced(wall_us=wall, monotonic=100.0 + passed)
        assert time.now_us <= wall
        assert time.time_us <= NOON + passed * 1_000_000 + 2_000_000 * len(moves)
