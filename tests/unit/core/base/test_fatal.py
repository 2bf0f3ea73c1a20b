"""A FatalError is told whatever else went wrong beside it (I16)."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from app.core.base.errors import NotReady, StorageFailure
from app.core.base.tasks import both, for_each, run_beside

Step = Coroutine[Any, Any, None]


async def fails_of_its_own() -> None:
    await asyncio.sleep(0)
    raise NotReady


async def fails_fatally_when_cancelled() -> None:
    """As `uninterrupted` does whose step meets an EIO."""
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        raise StorageFailure("EIO") from None


async def each(step: Callable[[], Step]) -> None:
    await step()


@pytest.mark.parametrize(
    "beside",
    [
        lambda: both(fails_of_its_own(), fails_fatally_when_cancelled()),
        lambda: for_each([fails_of_its_own, fails_fatally_when_cancelled], each, limit=2),
        lambda: run_beside(fails_of_its_own(), fails_fatally_when_cancelled()),
        lambda: run_beside(fails_fatally_when_cancelled(), fails_of_its_own()),
    ],
    ids=["both", "for_each", "beside_main", "main"],
)
async def test_beside_an_error(beside: Callable[[], Step]) -> None:
    with pytest.raises(StorageFailure):
        await beside()


async def test_beside_a_cancellation() -> None:
    caller = asyncio.ensure_future(
        run_beside(fails_fatally_when_cancelled(), asyncio.Event().wait())  # type: ignore[arg-type]
    )
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(StorageFailure):
        await caller


async def test_without_one_the_first_error_is_told() -> None:
    async def waits() -> None:
        await asyncio.Event().wait()

    for beside in (
        run_beside(fails_of_its_own(), waits()),
        run_beside(waits(), fails_of_its_own()),
    ):
        with pytest.raises(NotReady):
            await beside

    async def gives() -> int:
        return 7

    assert await run_beside(gives(), waits()) == 7
