"""Server-sent events of one source (WHATWG HTML, section 9.2).

Invariants: nothing is kept for a client that is gone or does not read (I11), and nothing more is
told to one whose token counts no longer (I12). Concurrency: events and pings are tasks of the
answer's own, and each event is one send. Cancellation: the
source is closed before the answer returns. Crash: nothing is durable here.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.core.base.clock import Clock
from app.core.base.errors import NotReady, Unauthenticated
from app.core.base.tasks import run_beside
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
        self,
        source: AsyncGenerator[ServerEvent],
        *,
        clock: Clock,
        stopping: Stopping,
        check: Callable[[], Awaitable[None]],
    ) -> None:
        """`check` raises Unauthenticated once the caller is no longer who it was."""
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._source = source
        self._clock = clock
        self._stopping = stopping
        self._check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        await send(
            {"type": "http.response.start", "status": 200, "headers": list(self.raw_headers)}
        )
        try:
            sending = run_beside(self._pump(send), self._ping(send))
            await while_connected(sending, receive=receive, stopping=self._stopping)
        except (NotReady, Unauthenticated):
            pass  # the service stops, or the token does: well-formed, without `ended`
        except ClientGone:
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pump(self, send: Send) -> None:
        async with aclosing(self._source) as source:
            number = 0
            async for event in source:
                number += 1
                await send(_chunk(event.encode(number)))

    async def _ping(self, send: Send) -> None:
        """A comment now and then keeps proxies from taking the silence for death."""
        while True:
            await self._clock.sleep(PING_SECONDS)
            await self._check()
            await send(_chunk(b": ping\n\n"))


def _chunk(body: bytes) -> dict[str, object]:
    return {"type": "http.response.body", "body": body, "more_body": True}
