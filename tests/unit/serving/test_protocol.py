"""What is refused below the application, on a transport in memory: `tests/integration/
test_connections.py` has it on sockets.
"""

import asyncio
import json
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from app.core.base.clock import SeededRandomness
from app.core.base.events import Events
from app.serving.protocol import ConnectionLimits, GuardedProtocol

LIMITS = ConnectionLimits(
    connections_max=2,
    head_bytes_max=1_000,
    head_fields_max=10,
    head_timeout_seconds=1.0,
    answer_stall_seconds=10.0,
)


class Transport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__({"peername": ("192.0.2.7", 4711)})
        self.written = b""
        self.closing = False

    def write(self, data: bytes) -> None:  # type: ignore[override]
        self.written += data

    def close(self) -> None:
        self.closing = True

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def is_closing(self) -> bool:
        return self.closing


class House:
    """A server's protocols, without the server."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.answers = asyncio.Event()
        self.logged: list[tuple[str, str, dict[str, Any]]] = []
        self.events = Events(
            lambda name, level, fields: self.logged.append((name, level, dict(fields)))
        )
        self.randomness = SeededRandomness(7)
        self.state = ServerState()
        self.config = uvicorn.Config(self.app, interface="asgi3", ws="none", log_config=None)

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        self.heard.append(scope["path"])
        while (message := await receive())["type"] != "http.disconnect" and message["more_body"]:
            pass
        if message["type"] == "http.disconnect":
            self.heard.append("gone")
            return
        await self.answers.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"yes"})

    def connect(self) -> tuple[GuardedProtocol, Transport]:
        protocol = GuardedProtocol(
            self.config, self.state, {}, limits=LIMITS, events=self.events,
            randomness=self.randomness,
        )  # fmt: skip
        transport = Transport()
        protocol.connection_made(transport)
        return protocol, transport

    def refusal(self, transport: Transport) -> tuple[int, str]:
        """The problem's status and its request's name, the same one wherever it stands."""
        head, _, body = transport.written.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
        problem = json.loads(body)
        (line,) = [fields for name, _, fields in self.logged if name == "http.refused"]
        assert problem["request_id"] == headers["x-request-id"] == line["request_id"]
        assert problem["status"] == line["status"] == int(head.split()[1])
        assert problem["detail"] == line["detail"]
        assert line["client"] == "192.0.2.7"
        assert transport.closing
        return problem["status"], problem["request_id"]


@pytest.fixture
async def house() -> House:
    return House()


HEAD = b"GET /healthz HTTP/1.1\r\n"
REFUSED = {
    "malformed": (b"\x16\x03\x01\x02\x00", 400),
    "no host": (HEAD + b"X: y\r\n\r\n", 400),
    "two hosts": (HEAD + b"Host: a\r\nHost: b\r\n\r\n", 400),
    "another version": (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 400),
    "a large head": (HEAD + b"Host: a\r\nX: " + b"y" * 2_000 + b"\r\n\r\n", 431),
    "a head without an end": (HEAD + b"Host: a\r\nX: " + b"y" * 2_000, 431),
    "many fields": (HEAD + b"Host: a\r\n" + b"X: y\r\n" * 20 + b"\r\n", 431),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_a_refusal_has_a_name_of_the_usual_form(house: House, name: str):
    data, status = REFUSED[name]
    protocol, transport = house.connect()
    protocol.data_received(data)
    assert house.refusal(transport) == (status, f"{SeededRandomness(7).bits(128):032x}")


async def test_a_head_that_comes_too_slowly_has_a_name(house: House):
    protocol, transport = house.connect()
    protocol.data_received(HEAD)
    protocol.look(asyncio.get_running_loop().time() + 2)
    assert house.refusal(transport)[0] == 408


async def test_one_connection_too_many_has_a_name_and_a_warning(house: House):
    kept = [house.connect() for _ in range(2)]
    _, transport = house.connect()
    assert house.refusal(transport)[0] == 503
    assert [level for name, level, _ in house.logged if name == "http.refused"] == ["warning"]
    assert not any(transport.written for _, transport in kept)


async def test_the_clients_own_name_is_kept_where_the_head_came_whole(house: House):
    protocol, transport = house.connect()
    protocol.data_received(HEAD + b"X-Request-ID: mine\r\n\r\n")
    assert house.refusal(transport) == (400, "mine")


@pytest.mark.parametrize("named", [b"a b", b"\xff", b"x" * 129])
async def test_a_name_that_is_no_name_is_not_repeated(house: House, named: bytes):
    protocol, transport = house.connect()
    protocol.data_received(HEAD + b"X-Request-ID: " + named + b"\r\n\r\n")
    assert len(house.refusal(transport)[1]) == 32


async def test_what_breaks_behind_a_request_under_way_is_told_in_the_log_alone(house: House):
    protocol, transport = house.connect()
    protocol.data_received(HEAD + b"Host: a\r\n\r\n" + b"\x00")
    assert transport.written == b""
    assert transport.closing
    (line,) = [fields for name, _, fields in house.logged if name == "http.refused"]
    assert line["status"] is None
    protocol.connection_lost(None)
    for task in tuple(house.state.tasks):
        task.cancel()


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_who_ends_its_side_gets_its_answer_and_no_more(house: House):
    protocol, transport = house.connect()
    protocol.data_received(HEAD + b"Host: a\r\n\r\n")
    assert protocol.eof_received()
    protocol.look(asyncio.get_running_loop().time() + 1)
    assert not transport.closing
    house.answers.set()
    await settled()
    assert transport.written.startswith(b"HTTP/1.1 200 OK\r\n")
    assert transport.closing


async def test_who_ends_its_side_and_gets_no_answer_is_taken_for_gone(house: House):
    protocol, transport = house.connect()
    protocol.data_received(HEAD + b"Host: a\r\n\r\n")
    assert protocol.eof_received()
    await settled()
    protocol.look(asyncio.get_running_loop().time() + 3)
    assert (transport.closing, transport.written) == (True, b"")
    protocol.connection_lost(None)
    for task in tuple(house.state.tasks):
        task.cancel()


async def test_between_requests_the_end_of_one_side_is_the_end(house: House):
    protocol, transport = house.connect()
    assert not protocol.eof_received()
    house.answers.set()
    protocol.data_received(HEAD + b"Host: a\r\n\r\n")
    await settled()
    assert transport.written
    assert not protocol.eof_received()


@pytest.mark.parametrize("path", ["/checkpoints", "/tenants/a/databases/b/records"])
async def test_a_body_that_breaks_off_is_answered_and_the_application_told(house: House, path: str):
    protocol, transport = house.connect()
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nX-Request-ID: mine\r\n".encode()
    protocol.data_received(head + b"Content-Length: 10\r\n\r\nabc")
    assert protocol.eof_received()
    await settled()
    assert house.refusal(transport) == (400, "mine")
    code = b"malformed_records" if path.endswith("/records") else b"invalid_request"
    assert b'"code":"' + code + b'"' in transport.written
    assert house.heard == [path, "gone"]


async def test_what_breaks_behind_one_that_is_not_answered_yet_is_not_answered(house: House):
    protocol, transport = house.connect()
    protocol.data_received(HEAD + b"Host: a\r\n\r\n")
    protocol.data_received(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc")
    assert not protocol.eof_received()
    assert (transport.closing, transport.written) == (True, b"")
    protocol.connection_lost(None)
    for task in tuple(house.state.tasks):
        task.cancel()
