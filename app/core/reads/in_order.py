"""Work ahead of a reader, bounded, with results in order."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from app.core.base.tasks import TaskScope

S = TypeVar("S")
T = TypeVar("T")


async def in_order(
    source: AsyncIterator[S],
    function: Callable[[S], Coroutine[Any, Any, T]],
    *,
    weigh: Callable[[S], int],
    budget: int,
    name: str,
) -> AsyncGenerator[T, None]:
    """What `function` makes of each item, in the order of `source`. Items are begun ahead as long
    as those begun and not yet handed out weigh less than `budget`: one that is heavier by itself
    is still taken, alone. An error is raised where its result is due. Close it if it is not read
    to its end: what was begun is ended then.
    """
    scope = TaskScope(name, on_error=lambda _: None)  # told where a result is awaited
    ahead: deque[tuple[int, asyncio.Task[T]]] = deque()
    weight, exhausted = 0, False
    try:
        while True:
            while not exhausted and weight < budget and not (ahead and ahead[0][1].done()):
                try:
                    item = await anext(source)
                except StopAsyncIteration:
                    exhausted = True
                    break
                mine = weigh(item)
                weight += mine
                ahead.append((mine, scope.start(function(item), name="item")))
            if not ahead:
                return
            mine, task = ahead.popleft()
            result = await task
            yield result
            weight -= mine
    finally:
        await scope.aclose()
