import asyncio
from contextlib import aclosing

import pytest

from app.core.reads.in_order import in_order


async def numbers(count):
    for number in range(count):
        yield number


class Work:
    """Ends each item when told to."""

    def __init__(self):
        self.begun: list[int] = []
        self.ended: list[int] = []
        self.go = asyncio.Event()
        self.failing: set[int] = set()

    async def __call__(self, item):
        self.begun.append(item)
        try:
            if item:
                await self.go.wait()
            if item in self.failing:
                raise ValueError(item)
        finally:
            self.ended.append(item)
        return item * 10


def run(work, count, *, budget, weigh=lambda _: 1):
    return aclosing(in_order(numbers(count), work, weigh=weigh, budget=budget, name="test"))


async def test_results_come_in_order_and_no_more_is_begun_than_the_budget():
    work = Work()
    async with run(work, 20, budget=4) as results:
        assert await anext(results) == 0
        task = asyncio.ensure_future(anext(results))
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(work.begun) <= 5
        work.go.set()
        assert await task == 10
        assert [one async for one in results] == [number * 10 for number in range(2, 20)]


async def test_an_item_heavier_than_the_budget_is_taken_alone():
    work = Work()
    work.go.set()
    async with run(work, 5, budget=10, weigh=lambda item: 100 if item == 2 else 1) as results:
        assert [one async for one in results] == [0, 10, 20, 30, 40]


async def test_an_error_is_raised_where_its_result_is_due_and_ends_the_others():
    work = Work()
    work.failing = {2}
    work.go.set()
    async with run(work, 20, budget=4) as results:
        assert [await anext(results), await anext(results)] == [0, 10]
        with pytest.raises(ValueError, match="2"):
            await anext(results)
    assert sorted(work.begun) == sorted(work.ended)


async def test_closing_it_ends_what_was_begun():
    work = Work()
    async with run(work, 20, budget=4) as results:
        await anext(results)
    assert sorted(work.begun) == sorted(work.ended)
