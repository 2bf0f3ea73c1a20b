"""A programmable HTTP proxy that makes an S3 endpoint fail in chosen ways.

    async with FaultProxy.running("127.0.0.1", seaweed.port) as proxy:
        proxy.add(Rule(method="PUT", path=r"/chunk-", action=Answer.slow_down(), times=3))
        ...                                    # the store under test talks to proxy.endpoint
        assert proxy.count("PUT", r"/chunk-") == 4

It reads requests and answers as HTTP/1.1 messages and passes them on as they came, the Host header
included, so signatures hold. A rule applies to requests whose method and path (with query) match:
the first `skip` of them pass, the next `times` meet the action (None: all). Rules are asked in the
order they were added; the first that applies decides. `requests` records every request that came
in, so that "no request while idle" can be asserted, and `seen(...)` waits for one.

It runs in the loop that opened it (`running`), or in a thread of its own for synchronous tests and
servers in other processes (`in_thread`); rules may be added from any thread.
"""

import asyncio
import contextlib
import re
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Self

PIECE_BYTES = 64 * 1024
RECEIVE_BUFFER_BYTES = 256 * 1024
HEAD_BYTES_MAX = 64 * 1024


# --- what can be done to a request ------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Delay:
    """Passes the request on after some time; the answer, too, if asked."""

    seconds: float
    answer_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Throttle:
    """Passes everything on, bodies no faster than this."""

    bytes_per_second: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Reads the request and answers it in the server's stead."""

    status: int
    code: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | None = None

    @classmethod
    def slow_down(cls) -> Self:
        return cls(status=503, code="SlowDown")

    @classmethod
    def too_many_requests(cls) -> Self:
        return cls(status=429, code="TooManyRequests")

    @classmethod
    def internal_error(cls) -> Self:
        return cls(status=500, code="InternalError")

    def encode(self) -> bytes:
        body = self.body
        if body is None:
            body = (
                f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{self.code}</Code>'
                f"<Message>injected</Message></Error>"
            ).encode()
        lines = [f"HTTP/1.1 {self.status} Injected", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        return "\r\n".join([*lines, "Content-Type: application/xml", "", ""]).encode() + body


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetRequest:
    """Takes `after_bytes` of the request's body, then resets; nothing is passed on."""

    after_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetAnswer:
    """Passes the request on, and resets after `after_bytes` of the answer's body."""

    after_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncate:
    """Passes on `after_bytes` of the answer's body, then closes in good order, too early."""

    after_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shorten:
    """Cuts the answer's body and says so in Content-Length: a whole answer of half a document."""

    to_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """Passes on `after_bytes` of the answer's body, then nothing until the client leaves."""

    after_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Blackhole:
    """Takes the request, never passes it on, never answers. Without `read` the body is left in
    the socket, so that the sender's buffers fill up.
    """

    read: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class LoseAnswer:
    """The request takes effect; the client sees the connection reset instead of the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaceAnswer:
    """The request takes effect; the client is told something else."""

    answer: Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class FlipBit:
    """One bit of the body's byte at `offset` flips, in the answer or in the request."""

    offset: int
    of: str = "answer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """Reads the whole request, waits for the event (the client may leave), then passes it on.
    A request delivered late.
    """

    until: threading.Event


Action = (
    Delay | Throttle | Answer | ResetRequest | ResetAnswer | Truncate | Shorten | Stall | Blackhole
    | LoseAnswer | ReplaceAnswer | FlipBit | Hold
)  # fmt: skip


@dataclass(slots=True, kw_only=True)
class Rule:
    action: Action
    method: str = ""
    path: str = ""
    skip: int = 0
    times: int | None = 1
    met: int = 0
    """How many requests have met the action."""
    _matched: int = 0

    def applies(self, request: "Request") -> bool:
        if self.method not in {"", request.method} or not re.search(self.path, request.path):
            return False
        self._matched += 1
        if self._matched <= self.skip or (self.times is not None and self.met >= self.times):
            return False
        self.met += 1
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]


class _ClientGone(Exception):
    pass


@dataclass(slots=True)
class _Head:
    raw: bytes
    first: str
    headers: dict[str, str]
    length: int | None = field(init=False)
    chunked: bool = field(init=False)

    def __post_init__(self) -> None:
        length = self.headers.get("content-length")
        self.length = None if length is None else int(length)
        self.chunked = self.headers.get("transfer-encoding", "").lower() == "chunked"


class FaultProxy:
    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._server_port = port
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._arrived = asyncio.Condition()
        self.requests: list[Request] = []
        self.problems: list[BaseException] = []

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, host: str, port: int) -> AsyncIterator[Self]:
        """In front of the server on host and port."""
        proxy = cls(host, port)
        await proxy._open()
        try:
            yield proxy
        finally:
            await proxy._aclose()

    @classmethod
    @contextlib.contextmanager
    def in_thread(cls, host: str, port: int) -> Iterator[Self]:
        """The same in a thread with a loop of its own."""
        proxy = cls(host, port)
        started, loop = threading.Event(), asyncio.new_event_loop()
        stop = asyncio.Event()

        async def serve() -> None:
            await proxy._open()
            started.set()
            await stop.wait()
            await proxy._aclose()

        thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
        thread.start()
        if not started.wait(10):
            raise RuntimeError("the proxy does not start")
        try:
            yield proxy
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join(10)
            loop.close()

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, rule: Rule) -> Rule:
        with self._lock:
            self._rules.append(rule)
        return rule

    def clear(self) -> None:
        """No rules, and no record of what came in."""
        with self._lock:
            self._rules.clear()
            self.requests.clear()

    def count(self, method: str = "", path: str = "") -> int:
        return sum(
            request.method in {"", method or request.method} and bool(re.search(path, request.path))
            for request in list(self.requests)
        )

    async def seen(self, count: int, method: str = "", path: str = "") -> None:
        """Waits (in the proxy's own loop) until that many requests have come in."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: self.count(method, path) >= count)

    # --- the plumbing -------------------------------------------------------------------------

    async def _open(self) -> None:
        listener = socket.socket()
        # Small, or the kernel swallows tens of MiB that nobody reads and no sender ever stalls.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        listener.bind(("127.0.0.1", 0))
        self._server = await asyncio.start_server(self._accept, sock=listener)

    async def _aclose(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in set(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client connection; each request gets a connection to the server of its own."""
        try:
            while head := await _read_head(reader):
                method, path, _ = head.first.split(" ", 2)
                request = Request(method=method, path=path, headers=head.headers)
                async with self._arrived:
                    self.requests.append(request)
                    self._arrived.notify_all()
                with self._lock:
                    rule = next((rule for rule in self._rules if rule.applies(request)), None)
                if not await self._exchange(request, head, reader, writer, rule and rule.action):
                    break
        except (ConnectionError, asyncio.IncompleteReadError, _ClientGone):
            pass
        except Exception as error:
            self.problems.append(error)
            raise
        finally:
            with contextlib.suppress(ConnectionError):
                writer.close()

    async def _exchange(
        self,
        request: Request,
        head: _Head,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        action: Action | None,
    ) -> bool:
        """False: the client's connection is used up."""
        match action:
            case Blackhole(read=read):
                if not read:
                    await asyncio.Event().wait()  # until the proxy ends
                await _drain(_body(reader, head))
                await _until_gone(reader)
                return False
            case Answer():
                await _drain(_body(reader, head))
                writer.write(action.encode())
                await writer.drain()
                return True
            case ResetRequest(after_bytes=after_bytes):
                await _drain(_limited(_body(reader, head), after_bytes))
                writer.transport.abort()
                return False
            case Hold(until=until):
                return await self._late(request, head, reader, writer, until)
            case _:
                return await self._forward(request, head, reader, writer, action)

    async def _forward(
        self,
        request: Request,
        head: _Head,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        action: Action | None,
    ) -> bool:
        up_reader, up_writer = await asyncio.open_connection(self._host, self._server_port)
        try:
            if isinstance(action, Delay):
                await asyncio.sleep(action.seconds)
            up_writer.write(head.raw)
            body = _body(reader, head)
            if isinstance(action, FlipBit) and action.of == "request":
                body = _flipped(body, action.offset)
            if isinstance(action, Throttle):
                body = _slowed(body, action.bytes_per_second)
            await _pump(body, up_writer)
            answer = await _read_head(up_reader)
            if answer is None:
                return False
            if isinstance(action, Delay):
                await asyncio.sleep(action.answer_seconds)
            return await _answer(request, answer, up_reader, writer, reader, action)
        finally:
            up_writer.transport.abort()

    async def _late(
        self,
        request: Request,
        head: _Head,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        until: threading.Event,
    ) -> bool:
        """The whole request is here; it goes on even if the client has left meanwhile."""
        whole = b"".join([piece async for piece in _body(reader, head)])
        while not until.is_set():  # noqa: ASYNC110 - a test may set it from any thread
            await asyncio.sleep(0.005)
        up_reader, up_writer = await asyncio.open_connection(self._host, self._server_port)
        try:
            up_writer.write(head.raw + whole)
            answer = await _read_head(up_reader)
            if answer is None:
                return False
            with contextlib.suppress(ConnectionError):
                return await _answer(request, answer, up_reader, writer, reader, None)
            return False
        finally:
            up_writer.transport.abort()


async def _answer(
    request: Request,
    answer: _Head,
    up_reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    reader: asyncio.StreamReader,
    action: Action | None,
) -> bool:
    empty = request.method == "HEAD" or answer.first.split(" ")[1] in {"204", "304"}
    body = _nothing() if empty else _body(up_reader, answer)
    match action:
        case LoseAnswer():
            await _drain(body)
            writer.transport.abort()
            return False
        case ReplaceAnswer(answer=other):
            await _drain(body)
            writer.write(other.encode())
            await writer.drain()
            return True
        case Shorten(to_bytes=to_bytes):
            whole = b"".join([piece async for piece in body])[:to_bytes]
            head = re.sub(
                rb"(?i)\r\n(content-length|transfer-encoding):[^\r]*", b"", answer.raw
            ).replace(b"\r\n\r\n", f"\r\nContent-Length: {len(whole)}\r\n\r\n".encode(), 1)
            writer.write(head + whole)
            await writer.drain()
            return True
        case ResetAnswer(after_bytes=after_bytes):
            writer.write(answer.raw)
            await _pump(_limited(body, after_bytes), writer)
            writer.transport.abort()
            return False
        case Truncate(after_bytes=after_bytes):
            writer.write(answer.raw)
            await _pump(_limited(body, after_bytes), writer)
            return False
        case Stall(after_bytes=after_bytes):
            writer.write(answer.raw)
            await _pump(_limited(body, after_bytes), writer)
            await _until_gone(reader)
            return False
        case FlipBit(offset=offset, of="answer"):
            body = _flipped(body, offset)
        case Throttle(bytes_per_second=bytes_per_second):
            body = _slowed(body, bytes_per_second)
    writer.write(answer.raw)
    await _pump(body, writer)
    # An answer of unknown length ends with its connection.
    return empty or answer.chunked or answer.length is not None


async def _read_head(reader: asyncio.StreamReader) -> _Head | None:
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    lines = raw.decode("latin-1").split("\r\n")
    headers = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return _Head(raw, lines[0], headers)


async def _body(reader: asyncio.StreamReader, head: _Head) -> AsyncIterator[bytes]:
    """The body's bytes as they travel, chunk framing included."""
    if head.chunked:
        while True:
            line = await reader.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            yield line + await reader.readexactly(size + 2)
            if size == 0:
                return
    left = head.length
    if left is None:
        left = 0 if not head.first.startswith("HTTP/") else 1 << 62
    while left > 0:
        piece = await reader.read(min(PIECE_BYTES, left))
        if not piece:
            if head.length is None:
                return
            raise _ClientGone
        left -= len(piece)
        yield piece


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield b""


async def _limited(body: AsyncIterator[bytes], limit: int) -> AsyncIterator[bytes]:
    left = limit
    if left <= 0:
        return
    async for piece in body:
        yield piece[:left]
        left -= len(piece)
        if left <= 0:
            return


async def _flipped(body: AsyncIterator[bytes], offset: int) -> AsyncIterator[bytes]:
    at = 0
    async for piece in body:
        if at <= offset < at + len(piece):
            damaged = bytearray(piece)
            damaged[offset - at] ^= 1
            yield bytes(damaged)
        else:
            yield piece
        at += len(piece)


async def _slowed(body: AsyncIterator[bytes], bytes_per_second: int) -> AsyncIterator[bytes]:
    async for piece in body:
        await asyncio.sleep(len(piece) / bytes_per_second)
        yield piece


async def _drain(body: AsyncIterator[bytes]) -> None:
    async for _ in body:
        pass


async def _pump(body: AsyncIterator[bytes], writer: asyncio.StreamWriter) -> None:
    async for piece in body:
        writer.write(piece)
        await writer.drain()
    await writer.drain()


async def _until_gone(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionError):
        while await reader.read(PIECE_BYTES):
            pass
