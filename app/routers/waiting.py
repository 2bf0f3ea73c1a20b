"""Long answers look: for a client that left, and for a service that stops.

Invariants: a handler that waits holds nothing for a client that is gone (I11). Concurrency: the
work runs in a task that the call owns. Cancellation: the work is cancelled and joined before the
call returns. Crash: nothing is durable here.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from app.core.base.errors import NotReady
from app.core.base.tasks import TaskScope
from app.routers.exchange import ClientGone

T = TypeVar("T")


class Stopping(asyncio.Event):
    """Set once the service begins to stop: long polls and event streams end then."""


async def disconnected(receive: Receive) -> None:
    """Returns once the client has left. What is left of a body is thrown away."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(
    work: Coroutine[Any, Any, T], *, receive: Receive, stopping: Stopping
) -> T:
    """The work's result. Raises ClientGone if the client leaves first, NotReady if the service
    stops first.
    """
    async with TaskScope("request", on_error=_told_by_result) as scope:
        main = scope.start(work, name="work")
        left = scope.start(disconnected(receive), name="disconnected")
        stop = scope.start(_wait(stopping), name="stopping")
        await asyncio.wait({main, left, stop}, return_when=asyncio.FIRST_COMPLETED)
        if main.done():
            return main.result()
        if left.done():
            raise ClientGone
        raise NotReady("The service is stopping.")


async def _wait(stopping: Stopping) -> None:
    await stopping.wait()


def _told_by_result(error: BaseException) -> None:
    """The caller takes the task's result, and with it its error."""
    del error
