import pytest

from app.core.base.events import Events
from app.core.coordination.breaker import SAMPLES_MIN, WINDOW_SECONDS, ForegroundBreaker
from tests.helpers.fake_clock import FakeClock


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def told():
    return []


@pytest.fixture
def breaker(clock, told):
    events = Events()
    breaker = ForegroundBreaker(limit_seconds=0.1, clock=clock, events=events)
    events.subscribe(breaker)
    events.subscribe(lambda name, level, fields: told.append(name))
    breaker.tell = events.debug
    return breaker


def observe(breaker, clock, *seconds):
    for one in seconds:
        breaker.tell("page.read", seconds=one)
    clock.advance(1)


def test_slow_foreground_reads_open_it(breaker, clock, told):
    observe(breaker, clock, *[0.01] * 100)
    assert not breaker.is_open()
    observe(breaker, clock, *[0.3] * 5)
    assert breaker.is_open()
    assert "cold_scan.paused" in told


def test_it_closes_only_well_below_what_opened_it(breaker, clock, told):
    observe(breaker, clock, *[0.3] * 20)
    assert breaker.is_open()
    clock.advance(WINDOW_SECONDS)
    observe(breaker, clock, *[0.09] * 20)
    assert breaker.is_open()
    clock.advance(WINDOW_SECONDS)
    observe(breaker, clock, *[0.06] * 20)
    assert not breaker.is_open()
    assert told.count("cold_scan.paused") == told.count("cold_scan.resumed") == 1


def test_it_closes_when_nobody_reads_any_more(breaker, clock):
    observe(breaker, clock, *[0.3] * 20)
    assert breaker.is_open()
    clock.advance(WINDOW_SECONDS)
    assert not breaker.is_open()


def test_a_few_slow_reads_say_nothing(breaker, clock):
    observe(breaker, clock, *[5.0] * (SAMPLES_MIN - 1))
    assert breaker.p99_seconds() is None
    assert not breaker.is_open()


def test_one_slow_read_of_a_thousand_is_below_the_percentile(breaker, clock):
    observe(breaker, clock, *[0.01] * 999, 5.0)
    assert not breaker.is_open()


def test_other_events_are_not_foreground_reads(breaker, clock):
    for _ in range(100):
        breaker.tell("read.served", seconds=9.0)
    clock.advance(1)
    assert not breaker.is_open()
