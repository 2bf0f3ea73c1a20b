"""A client's connection within limits that uvicorn does not have.

Invariants: I11: a request's head is bounded in bytes, fields and time; connections are bounded in
number; an answer that nobody reads is not held for ever. Whatever is no HTTP is answered once, as a
problem, and the connection goes, so that nothing behind it is taken for a request. Problem and log
line name the request alike, as they do for what the application answers. A body that breaks off or
is framed wrongly is never taken for a whole one (I13).

Concurrency: confined to the event loop; `OrderlyServer` looks at every connection once a second.
"""

import asyncio
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.utils import get_remote_addr

from app.core.base.clock import Randomness
from app.core.base.errors import InvalidRequest, MalformedRecords, NotReady
from app.core.base.events import Events
from app.routers.exchange import new_request_id, request_id_of
from app.routers.problems import MEDIA_TYPE, problem_members

RETRY_AFTER_SECONDS = 1
GONE_SECONDS = 2.0
"""A client that has ended its side and gets no answer within that time is taken for gone."""
VERSIONS = frozenset({"1.0", "1.1"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    connections_max: int
    head_bytes_max: int
    head_fields_max: int
    head_timeout_seconds: float
    """From a connection's opening, or a request's first byte, to the end of its head."""
    answer_stall_seconds: float
    """A client that takes nothing of an answer for so long is let go."""


class _Refused(Exception):
    """Ends the parsing of this connection."""


class GuardedProtocol(HttpToolsProtocol):
    def __init__(
        self,
        *arguments: Any,
        limits: ConnectionLimits,
        events: Events,
        randomness: Randomness,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self._limits = limits
        self._events = events
        self._randomness = randomness
        self._head_since: float | None = None
        """When the head that is being read began; None while there is none."""
        self._head_bytes = 0
        self._is_turned_away = False
        self._refusal: tuple[HTTPStatus, str] | None = None
        self._ended_since: float | None = None
        """When the client ended its side, its request being whole."""
        self._stalled_since: float | None = None
        self._stalled_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.connections) >= self._limits.connections_max:
            self._is_turned_away = True
            self.transport = transport
            self.client = get_remote_addr(transport)
            transport.write(
                self._answer(
                    HTTPStatus.SERVICE_UNAVAILABLE,
                    code=NotReady.code,
                    title="Too many connections",
                    detail="The service has as many connections as it takes. Try again.",
                )
            )
            transport.close()
            return
        super().connection_made(transport)
        self._head_since = self.loop.time()

    def data_received(self, data: bytes) -> None:
        if self._is_turned_away:
            return
        if self._head_since is None and self._is_between_requests():
            self._head_since = self.loop.time()
        if self._head_since is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._head_since is not None and self._head_bytes > self._limits.head_bytes_max:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, self._too_large())

    def on_headers_complete(self) -> None:
        limits = self._limits
        if len(self.headers) > limits.head_fields_max or (
            self._head_bytes > limits.head_bytes_max
            and self._size_of_head() > limits.head_bytes_max
        ):
            self._refusal = (HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, self._too_large())
            raise _Refused
        version = self.parser.get_http_version()
        if version not in VERSIONS:
            self._refusal = (HTTPStatus.BAD_REQUEST, "This takes HTTP/1.1 and HTTP/1.0.")
            raise _Refused
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (hosts == 0 and version != "1.0"):  # RFC 9112, section 3.2
            self._refusal = (HTTPStatus.BAD_REQUEST, "A request has one Host.")
            raise _Refused
        self._head_since = None
        self._head_bytes = 0
        super().on_headers_complete()
        if self.parser.should_upgrade():
            self.cycle.keep_alive = False  # what follows is read by no parser

    def eof_received(self) -> bool:  # type: ignore[override]
        """A client may end its side with its request, and wait for the answer. One that went away
        looks the same, and is found out by `look`.
        """
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is None or cycle.response_started:
            return False
        if cycle.more_body:
            self._refuse(HTTPStatus.BAD_REQUEST, "The body breaks off.")
            return not self.transport.is_closing()
        self._ended_since = self.loop.time()
        cycle.keep_alive = bool(self.pipeline)
        return True

    def send_400_response(self, msg: str) -> None:
        """Uvicorn's way out wherever the parser gives up."""
        status, detail = self._refusal or (HTTPStatus.BAD_REQUEST, msg)
        self._refuse(status, detail)

    def look(self, now: float) -> None:
        """Lets go of a client that is too slow."""
        if self._is_turned_away or self.transport.is_closing():
            return
        limits = self._limits
        if self._head_since is not None and now - self._head_since > limits.head_timeout_seconds:
            self._refuse(
                HTTPStatus.REQUEST_TIMEOUT,
                f"No whole request head came within {limits.head_timeout_seconds:g} seconds.",
            )
        elif self._is_stalled(now):
            self.transport.abort()
        elif (
            self._ended_since is not None
            and now - self._ended_since > GONE_SECONDS
            and not self.cycle.response_started
        ):
            self.transport.close()

    def _is_stalled(self, now: float) -> bool:
        """True once nothing of the answer has left for too long."""
        waiting = self.transport.get_write_buffer_size()
        if not waiting or waiting != self._stalled_bytes or self._stalled_since is None:
            self._stalled_since, self._stalled_bytes = now, waiting
            return False
        return now - self._stalled_since > self._limits.answer_stall_seconds

    def _refuse(self, status: HTTPStatus, detail: str) -> None:
        if self.transport.is_closing():
            return
        if self._is_between_requests():
            self._refuse_as(InvalidRequest.code, status, detail)
        elif self._waits_for_its_body():
            self.transport.pause_reading()
            self.loop.call_soon(self._refuse_body, status, detail)  # whom it lacks comes first: 401
            return
        else:  # An answer that is under way is not mixed with another: the connection just ends.
            self._log(None, detail=detail)
        self.transport.close()

    def _answer(self, status: HTTPStatus, *, code: str, title: str, detail: str) -> bytes:
        has_head = self._refusal is not None or self._waits_for_its_body()
        named = request_id_of(self.headers) if has_head else None
        request_id = named or new_request_id(self._randomness)
        self._log(status, detail=detail, request_id=request_id)
        return answer_bytes(status, code=code, title=title, detail=detail, request_id=request_id)

    def _log(self, status: HTTPStatus | None, **fields: str) -> None:
        """As the edge does for requests that reach it."""
        tell = self._events.warning if status is not None and status >= 500 else self._events.info
        client = self.client[0] if self.client else None
        tell("http.refused", status=status and int(status), client=client, **fields)

    def _is_between_requests(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is None or cycle.response_complete

    def _refuse_body(self, status: HTTPStatus, detail: str) -> None:
        cycle: RequestResponseCycle = self.cycle
        if cycle.response_started:
            cycle.keep_alive = False  # the answer goes out whole, and the connection with it
            if not cycle.response_complete:
                return
        elif not self.transport.is_closing():
            takes_records = self.scope["path"].endswith("/records")
            self._refuse_as(
                MalformedRecords.code if takes_records else InvalidRequest.code, status, detail
            )
            cycle.disconnected = True  # whatever the application says is not said any more
            cycle.message_event.set()
        self.transport.close()

    def _refuse_as(self, code: str, status: HTTPStatus, detail: str) -> None:
        self.transport.write(self._answer(status, code=code, title=status.phrase, detail=detail))

    def _waits_for_its_body(self) -> bool:
        """The newest request does, and no answer to it or to one before it has begun."""
        cycle: RequestResponseCycle | None = self.cycle
        return (
            cycle is not None
            and cycle.more_body
            and not cycle.response_started
            and not self.pipeline
        )

    def _size_of_head(self) -> int:
        return len(self.url) + sum(len(name) + len(value) for name, value in self.headers)

    def _too_large(self) -> str:
        limits = self._limits
        return (
            f"The request's head is larger than {limits.head_bytes_max} bytes, "
            f"or has more than {limits.head_fields_max} fields."
        )


def answer_bytes(
    status: HTTPStatus, *, code: str, title: str, detail: str, request_id: str
) -> bytes:
    """A problem that no application had a part in."""
    members = problem_members(
        code=code, title=title, status=int(status), detail=detail, extras={"request_id": request_id}
    )
    body = msgspec.json.encode(members)
    may_pass = status == HTTPStatus.SERVICE_UNAVAILABLE
    wait = f"retry-after: {RETRY_AFTER_SECONDS}\r\n" if may_pass else ""
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\n"
        f"content-type: {MEDIA_TYPE}\r\n"
        f"content-length: {len(body)}\r\n"
        f"x-request-id: {request_id}\r\n"
        f"{wait}connection: close\r\n\r\n"
    )
    return head.encode() + body
