import asyncio
import itertools

import pytest

from app.core.coordination.bandwidth import NeverPaused
from app.core.coordination.pace import Pace
from tests.helpers.fake_clock import FakeClock


class Switch:
    open = False

    def is_open(self):
        return self.open


@pytest.fixture
def clock():
    return FakeClock()


async def run(clock, seconds):
    for _ in range(round(seconds / 0.05)):
        for _ in range(5):
            await asyncio.sleep(0)
        clock.advance(0.05)


async def test_the_pace_is_held_whatever_the_pieces(clock):
    pace, taken, waits = Pace(1000, pause=NeverPaused(), clock=clock), [], []

    async def read(piece):
        while True:
            await pace.take(piece, on_wait=lambda: waits.append(clock.monotonic()))
            taken.append(piece)

    tasks = [asyncio.ensure_future(read(piece)) for piece in (3000, 100)]
    await run(clock, 60)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert 55_000 <= sum(taken) <= 66_000
    assert max(later - now for now, later in itertools.pairwise(waits)) <= 1.1


async def test_a_pause_is_waited_for_and_told_as_no_stall(clock):
    switch, waits = Switch(), []
    switch.open = True
    pace = Pace(None, pause=switch, clock=clock)
    task = asyncio.ensure_future(pace.take(1, on_wait=lambda: waits.append(1)))
    await run(clock, 10)
    assert not task.done()
    assert len(waits) > 30
    switch.open = False
    await run(clock, 0.5)
    assert task.done()
