"""Waiting for a condition, never for a time."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

POLL_SECONDS = 0.01


class WaitedTooLong(AssertionError):
    pass


async def wait_until(
    condition: Callable[[], T | Awaitable[T]],
    *,
    timeout: float = 10.0,
    describe: str | Callable[[], str] = "",
) -> T:
    """The first true value of `condition`, asked every 10 ms. `describe` says what was awaited."""
    deadline = time.monotonic() + timeout
    while True:
        answer = condition()
        value: T = await answer if inspect.isawaitable(answer) else answer
        if value:
            return value
        if time.monotonic() > deadline:
            what = describe() if callable(describe) else describe
            name = getattr(condition, "__qualname__", repr(condition))
            raise WaitedTooLong(f"not within {timeout:g} s: {what or name} (last value {value!r})")
        await asyncio.sleep(POLL_SECONDS)
