"""A client by hand, for what an HTTP library does not let one do: leave, dawdle, lie."""

import asyncio
from typing import Any

import msgspec


class RawExchange:
    """One ASGI request that a test drives message by message."""

    def __init__(
        self, method: str, path: str, *, headers: dict[str, str] | None = None, query: str = ""
    ) -> None:
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "scheme": "http",
            "headers": [
                (name.lower().encode(), value.encode()) for name, value in (headers or {}).items()
            ],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
            "state": {},
        }
        self.incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.sent: list[dict[str, Any]] = []
        self.first_read = asyncio.Event()
        self.started = asyncio.Event()
        self.reads = 0

    def body(self, piece: bytes, *, more: bool = False) -> "RawExchange":
        self.incoming.put_nowait({"type": "http.request", "body": piece, "more_body": more})
        return self

    def leave(self) -> None:
        self.incoming.put_nowait({"type": "http.disconnect"})

    async def receive(self) -> dict[str, Any]:
        self.reads += 1
        self.first_read.set()
        return await self.incoming.get()

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        if message["type"] == "http.response.start":
            self.started.set()

    async def run(self, app: Any) -> None:
        async with asyncio.timeout(10):
            await app(self.scope, self.receive, self.send)

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def content(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.content)

    @property
    def complete(self) -> bool:
        return bool(self.sent) and not self.sent[-1].get("more_body", True)
