import asyncio

import pytest

from app.core.base.errors import StorageFailure
from app.core.base.tasks import uninterrupted


async def test_returns_and_raises_as_the_step_does():
    async def step(error: BaseException | None) -> int:
        if error is not None:
            raise error
        return 7

    assert await uninterrupted(step(None)) == 7
    with pytest.raises(ValueError, match="bug"):
        await uninterrupted(step(ValueError("bug")))
    with pytest.raises(asyncio.CancelledError):
        await uninterrupted(step(asyncio.CancelledError()))


@pytest.mark.parametrize("error", [None, ValueError("lost to the cancellation")])
async def test_a_cancelled_caller_leaves_only_after_the_step_has_ended(error):
    go, begun = asyncio.Event(), asyncio.Event()
    steps: list[str] = []

    async def step() -> None:
        steps.append("begun")
        begun.set()
        await go.wait()
        steps.append("ended")
        if error is not None:
            raise error

    async with asyncio.TaskGroup() as group:
        caller = group.create_task(uninterrupted(step()))
        await begun.wait()
        for _ in range(3):  # however often
            caller.cancel()
            await asyncio.sleep(0)
            assert not caller.done()
        go.set()
    assert steps == ["begun", "ended"]
    assert caller.cancelled()


async def test_a_cancellation_hides_no_fatal_error():
    go, begun = asyncio.Event(), asyncio.Event()

    async def step() -> None:
        begun.set()
        await go.wait()
        raise StorageFailure("EIO")

    caller = asyncio.ensure_future(uninterrupted(step()))
    await begun.wait()
    caller.cancel()
    await asyncio.sleep(0)
    go.set()
    with pytest.raises(StorageFailure):
        await caller


async def test_a_caller_cancelled_at_once_still_runs_the_step():
    ran = asyncio.Event()

    async def step() -> None:
        ran.set()

    async with asyncio.TaskGroup() as group:
        caller = group.create_task(uninterrupted(step()))
        await asyncio.sleep(0)
        caller.cancel()
    assert ran.is_set()
