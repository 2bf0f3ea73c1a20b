"""Server-sent events of one source (WHATWG HTML, section 9.2).

Invariants: nothing is kept for a client that is gone or does not read (I11). Concurrency: pump
and ping are tasks of the answer's own scope, and each event is one send. Cancellation: the
source is closed before the answer returns. Crash: nothing is durable here.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.core.base.clock import Clock
from app.core.base.errors import NotReady
from app.core.base.tasks import TaskScope
from app.routers.exchange import ClientGone
from app.routers.waiting import Stopping, while_connected

PING_SECONDS = 15.0


class ServerEvent(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    data: bytes
    """JSON without newlines."""
    number: int | None = None
    """Its id; None: its place in the stream."""

    def encode(self, number: int) -> bytes:
        shown = number if self.number is None else self.number
        return b"id: %d\nevent: %s\ndata: %s\n\n" % (shown, self.name.encode(), self.data)


class EventStream(Response):
    media_type = "text/event-stream"

    def __init__(
        self, source: AsyncGenerator[ServerEvent], *, clock: Clock, stopping: Stopping
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._source = source
        self._clock = clock
        self._stopping = stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        await send(
            {"type": "http.response.start", "status": 200, "headers": list(self.raw_headers)}
        )
        try:
            await while_connected(self._pump(send), receive=receive, stopping=self._stopping)
        except NotReady:
            pass  # the service stops: the stream ends well-formed, without `ended`
        except ClientGone:
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pump(self, send: Send) -> None:
        async with (
            aclosing(self._source) as source,
            TaskScope("events", on_error=_told_by_send) as tasks,
        ):
            tasks.start(self._ping(send), name="ping")
            number = 0
            async for event in source:
                number += 1
                await send(_chunk(event.encode(number)))

    async def _ping(self, send: Send) -> None:
        """A comment now and then keeps proxies from taking the silence for death."""
        while True:
            await self._clock.sleep(PING_SECONDS)
            await send(_chunk(b": ping\n\n"))


def _chunk(body: bytes) -> dict[str, object]:
    return {"type": "http.response.body", "body": body, "more_body": True}


def _told_by_send(error: BaseException) -> None:
    """A ping that cannot be sent means that the client is gone, which the pump sees itself."""
    del error
