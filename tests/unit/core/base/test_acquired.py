import asyncio

import pytest

from app.core.base.tasks import acquired


async def test_what_was_opened_is_the_callers():
    closed: list[int] = []

    async def step() -> int:
        return 7

    assert await acquired(step(), give_back=closed.append) == 7
    assert closed == []


async def test_what_was_opened_for_a_caller_that_left_is_given_back():
    go, begun, closed = asyncio.Event(), asyncio.Event(), list[int]()

    async def step() -> int:
        begun.set()
        await go.wait()
        return 7

    caller = asyncio.ensure_future(acquired(step(), give_back=closed.append))
    await begun.wait()
    caller.cancel()
    await asyncio.sleep(0)
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert closed == [7]


async def test_what_could_not_be_opened_is_not_given_back():
    async def step() -> int:
        raise OSError("no such file")

    with pytest.raises(OSError, match="no such file"):
        await acquired(step(), give_back=lambda _: pytest.fail("nothing was opened"))
