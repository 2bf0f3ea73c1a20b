"""A load generator that costs little: prepared requests over keep-alive connections.

An ordinary client library would be the bottleneck on two cores and hide the server's cost.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class LoadOutcome:
    requests: int = 0
    failures: int = 0
    body_bytes: int = 0
    """Of the answers."""
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)

    @property
    def per_second(self) -> float:
        return self.requests / self.seconds


class _Connection(asyncio.Protocol):
    """Sends the next request as soon as the answer to the last one is complete."""

    def __init__(self, next_request: Callable[[], list[bytes] | None], outcome: LoadOutcome):
        self._next = next_request
        self._outcome = outcome
        self._head = b""
        self._missing = -1
        self._status = 0
        self._sent = 0.0
        self._pieces: list[bytes] = []
        self._paused = False
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport):
        self._transport = transport
        self._send()

    def pause_writing(self):
        self._paused = True

    def resume_writing(self):
        self._paused = False
        self._pump()

    def _send(self):
        request = self._next()
        if request is None:
            self._transport.close()
            if not self.done.done():
                self.done.set_result(None)
            return
        self._sent = time.perf_counter()
        self._pieces = list(request)
        self._pump()

    def _pump(self):
        while self._pieces and not self._paused:
            self._transport.write(self._pieces.pop(0))

    def data_received(self, data):
        if self._missing < 0:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            head, data = self._head[:end].lower(), self._head[end + 4 :]
            self._head = b""
            self._status = int(head[9:12])
            at = head.index(b"content-length:") + 15
            self._missing = int(head[at : head.find(b"\r\n", at) if b"\r\n" in head[at:] else None])
        self._missing -= len(data)  # counted, not kept: bodies may be large
        self._outcome.body_bytes += len(data)
        if self._missing <= 0:
            self._outcome.requests += 1
            self._outcome.failures += self._status >= 300
            self._outcome.latencies.append(time.perf_counter() - self._sent)
            self._missing = -1
            self._send()

    def connection_lost(self, error):
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("the server closed the connection"))


def post(path: str, body: bytes, *, content_type: str, **headers: str) -> list[bytes]:
    """A request in pieces that a socket takes one by one. `headers` as in `get`."""
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    head = (
        f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: {content_type}\r\n"
        f"{lines}Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    view = memoryview(body)
    step = 256 * 1024
    pieces = [bytes(view[at : at + step]) for at in range(0, len(body), step)]
    return [head + (pieces[0] if pieces else b""), *pieces[1:]]


def get(path: str, **headers: str) -> list[bytes]:
    """`headers` with underscores for hyphens."""
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return [f"GET {path} HTTP/1.1\r\nHost: bench\r\n{lines}\r\n".encode()]


async def run_load(
    port: int,
    request: list[bytes],
    *,
    connections: int,
    seconds: float | None = None,
    requests: int | None = None,
) -> LoadOutcome:
    """`connections` clients at once, for a time or for a number of requests in all."""
    outcome = LoadOutcome()
    started = time.perf_counter()
    remaining = requests

    def next_request() -> list[bytes] | None:
        nonlocal remaining
        if seconds is not None and time.perf_counter() - started >= seconds:
            return None
        if remaining is not None:
            if remaining == 0:
                return None
            remaining -= 1
        return request

    loop = asyncio.get_running_loop()
    opened = [
        await loop.create_connection(lambda: _Connection(next_request, outcome), "127.0.0.1", port)
        for _ in range(connections)
    ]
    await asyncio.gather(*(connection.done for _, connection in opened))
    outcome.seconds = time.perf_counter() - started
    return outcome
