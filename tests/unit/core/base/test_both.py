import asyncio

import pytest

from app.core.base.tasks import both


async def test_both_run_at_once_and_each_gives_its_own():
    met = asyncio.Barrier(2)

    async def side(result):
        await met.wait()
        return result

    assert await both(side(1), side("two")) == (1, "two")


async def test_an_error_ends_the_other_and_is_raised_as_it_is():
    ended = asyncio.Event()

    async def waits():
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def fails():
        raise KeyError("no")

    with pytest.raises(KeyError):
        await both(waits(), fails())
    assert ended.is_set()
