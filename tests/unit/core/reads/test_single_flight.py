import asyncio

import pytest

from app.core.base.tasks import TaskScope
from app.core.reads.single_flight import SingleFlight


class Fetch:
    def __init__(self):
        self.started = self.cancelled = 0
        self.gate = asyncio.Event()
        self.error = None

    async def __call__(self):
        self.started += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return self.started


@pytest.fixture
async def flights():
    async with TaskScope("test", on_error=lambda _: None) as scope:
        yield SingleFlight(scope)


async def turns(count=3):
    for _ in range(count):
        await asyncio.sleep(0)


async def test_all_who_ask_meanwhile_share_one_fetch(flights):
    fetch = Fetch()
    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(flights.run("a", fetch)) for _ in range(5)]
        await turns()
        assert "a" in flights
        fetch.gate.set()
    assert [task.result() for task in asked] == [1] * 5
    assert len(flights) == 0
    assert await flights.run("a", fetch) == 2


async def test_an_error_is_told_to_all_and_not_remembered(flights):
    fetch = Fetch()
    fetch.error = ValueError("no")
    asked = [asyncio.ensure_future(flights.run("a", fetch)) for _ in range(3)]
    await turns()
    fetch.gate.set()
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(answer) for answer in answers] == [ValueError] * 3
    fetch.error = None
    assert await flights.run("a", fetch) == 2


async def test_one_who_leaves_ends_it_for_nobody_else(flights):
    fetch = Fetch()
    asked = [asyncio.ensure_future(flights.run("a", fetch)) for _ in range(2)]
    await turns()
    asked[0].cancel()
    await turns()
    fetch.gate.set()
    assert await asked[1] == 1
    assert asked[0].cancelled()
    assert fetch.cancelled == 0


async def test_the_last_one_who_leaves_ends_the_fetch_and_the_next_begins_anew(flights):
    fetch = Fetch()
    asked = [asyncio.ensure_future(flights.run("a", fetch)) for _ in range(2)]
    await turns()
    for task in asked:
        task.cancel()
    await turns()
    assert fetch.cancelled == 1
    assert len(flights) == 0
    fetch.gate.set()
    assert await flights.run("a", fetch) == 2
