"""One request and its answer, as the edge sees it: identity, what was read, what was sent.

Invariants: a refused body leaves nothing behind (I13) and holds no memory (I11): what the service
does not want is read and thrown away for a short while, so that the client gets to see the
answer, and then the connection goes.

Concurrency: one exchange belongs to one request. Cancellation: nothing is kept open. Crash:
nothing is durable here.
"""

import asyncio
import contextlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from opentelemetry import trace
from starlette.requests import HTTPConnection
from starlette.types import Message, Receive, Scope, Send

from app.core.base.clock import Randomness

SCOPE_KEY = "bop.exchange"
BRIEF_LINGER_SECONDS = 2.0
BRIEF_LINGER_BYTES = 64 * 1024 * 1024
LINGER_IDLE_SECONDS = 5.0
LINGER_GRACE_SECONDS = 30.0
LINGER_BYTES_PER_SECOND = 1024 * 1024
UNREAD_BYTES_FREE = 64 * 1024
"""So little unread body is thrown away by the server itself; the connection can stay."""

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._~:/+=@-]{1,128}")
_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_CONTENT_LENGTH = re.compile(rb"[0-9]{1,18}")


class ClientGone(Exception):
    """The client went away; nobody is left to answer."""


class ResponseBroken(Exception):
    """The answer failed after it began: the connection must end without its last chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who asks. `tenants` None: bound to none, sees all."""

    name: str
    scopes: frozenset[str]
    tenants: frozenset[str] | None = None

    def sees(self, tenant: str) -> bool:
        return self.tenants is None or tenant in self.tenants


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """W3C trace context: the caller's trace, and this service's own span in it."""

    trace_id: str
    parent_id: str
    span_id: str
    flags: str

    def header(self) -> bytes:
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}".encode()


class Exchange:
    __slots__ = (
        "_receive",
        "_send",
        "authorization",
        "body_chunked",
        "body_declared",
        "body_encoding",
        "body_ended",
        "body_received",
        "error",
        "lingering",
        "named_by_client",
        "principal",
        "request_id",
        "started",
        "status",
        "trace",
    )

    def __init__(  # noqa: C901 - a table of headers, read once for every request
        self, scope: Scope, receive: Receive, send: Send, randomness: Randomness
    ) -> None:
        self._receive = receive
        self._send = send
        self.authorization: bytes | None = None
        self.body_declared: int | None = None
        self.body_encoding: bytes | None = None
        self.body_chunked = False
        self.body_received = 0
        self.body_ended = False
        self.error: BaseException | None = None
        self.lingering = False
        self.named_by_client = False
        self.principal: Principal | None = None
        self.request_id = ""
        self.started = False
        self.status = 0
        self.trace: Trace | None = None
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                if _REQUEST_ID.fullmatch(value):
                    self.request_id = value.decode()
                    self.named_by_client = True
            elif name == b"authorization":
                self.authorization = value
            elif name == b"content-length":
                if _CONTENT_LENGTH.fullmatch(value):
                    self.body_declared = int(value)
            elif name == b"transfer-encoding":
                self.body_chunked = True
            elif name == b"traceparent":
                self.trace = joined_trace(value, randomness)
            elif name == b"content-encoding":
                self.body_encoding = value
        if not self.request_id:
            self.request_id = new_request_id(randomness)

    def note(self, error: BaseException) -> None:
        """Remembers what failed, for the log line of this request."""
        self.error = error

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self.body_received += len(message.get("body", b""))
            self.body_ended = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self.status = message["status"]
            headers = message["headers"] = list(message.get("headers", ()))
            headers.append((b"x-request-id", self.request_id.encode()))
            if self.trace is not None:
                headers.append((b"traceparent", self.trace.header()))
            if self._unread():
                self.lingering = True
                headers.append((b"connection", b"close"))
        elif self.lingering and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)

    def _unread(self) -> bool:
        """True if so much of the body may still come that the connection cannot be kept."""
        if self.body_ended:
            return False
        if self.body_chunked:
            return True
        return (self.body_declared or 0) - self.body_received > UNREAD_BYTES_FREE

    async def _linger(self) -> None:
        """Closing with unread data resets the connection, and the client may never see the answer:
        most look for one only when all is sent. So who is known, has said how much it is and sends
        fast enough is read to the end; any other for a moment.

        See RFC 9112, section 9.6.
        """
        with contextlib.suppress(TimeoutError):
            if self.principal is None or self.body_declared is None:
                async with asyncio.timeout(BRIEF_LINGER_SECONDS):
                    await self._discard(BRIEF_LINGER_BYTES)
                return
            loop = asyncio.get_running_loop()
            began, before = loop.time(), self.body_received
            while not self.body_ended:
                seconds = loop.time() - began - LINGER_GRACE_SECONDS
                if self.body_received - before < seconds * LINGER_BYTES_PER_SECOND:
                    return
                async with asyncio.timeout(LINGER_IDLE_SECONDS):
                    await self._discard(1)

    async def _discard(self, count: int) -> None:
        """At least `count` bytes of the body, or all that comes."""
        limit = self.body_received + count
        while not self.body_ended and self.body_received < limit:
            if (await self.receive())["type"] != "http.request":
                self.body_ended = True  # the client went away


def new_request_id(randomness: Randomness) -> str:
    return f"{randomness.bits(128):032x}"


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """What the client calls its request; None where it gives no name, or one that is not taken."""
    for name, value in headers:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return value.decode()
    return None


def joined_trace(header: bytes, randomness: Randomness) -> Trace | None:
    """The caller's trace with a span of our own; None for what W3C Trace Context calls invalid."""
    found = _TRACEPARENT.fullmatch(header)
    if found is None:
        return None
    version, trace_id, parent_id, flags, rest = found.groups()
    broken = version == b"ff" or (version == b"00" and rest is not None)
    if broken or not trace_id.strip(b"0") or not parent_id.strip(b"0"):
        return None
    return Trace(
        trace_id=trace_id.decode(),
        parent_id=parent_id.decode(),
        span_id=f"{randomness.bits(64) or 1:016x}",
        flags=flags.decode(),
    )


def current_span() -> Trace | None:
    """The span that is exported for this request, if one is."""
    span = trace.get_current_span()
    context = span.get_span_context()
    if not context.is_valid:
        return None
    parent = getattr(span, "parent", None)
    return Trace(
        trace_id=f"{context.trace_id:032x}",
        parent_id="" if parent is None else f"{parent.span_id:016x}",
        span_id=f"{context.span_id:016x}",
        flags=f"{int(context.trace_flags):02x}",
    )


def exchange_of(connection: HTTPConnection) -> Exchange:
    found: Exchange = connection.scope[SCOPE_KEY]
    return found


def principal_of(connection: HTTPConnection) -> Principal:
    principal = exchange_of(connection).principal
    assert principal is not None, "the edge lets no request pass without a principal"
    return principal
