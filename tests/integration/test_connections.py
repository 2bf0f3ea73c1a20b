"""Connections that mean no good, on raw sockets: smuggling, slowness, size, number, forged
headers. The service answers others meanwhile, and keeps nothing.
"""

import asyncio
import hashlib
import json
import resource

import pytest

from tests.conftest import MakeServer
from tests.helpers.launch import NewInterpreter
from tests.helpers.ports import free_port
from tests.helpers.raw_http import RawConnection, Told, told
from tests.helpers.server import ServerProcess
from tests.helpers.wait import wait_until

SMUGGLED = b"GET /jobs HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED_EMPTY = b"0\r\n\r\n"
POST = b"POST /checkpoints HTTP/1.1\r\nHost: x\r\n"
HEAD_SECONDS = 1.0


@pytest.fixture
async def guarded(make_server: MakeServer) -> ServerProcess:
    """With limits that a test can reach."""
    server = make_server(
        settings={
            "BOP_HEAD_TIMEOUT_SECONDS": str(HEAD_SECONDS),
            "BOP_BODY_IDLE_TIMEOUT_SECONDS": "1",
            "BOP_MAX_JSON_BYTES": "1000",
            "BOP_CONNECTIONS_MAX": "24",
        }
    )
    await server.start()
    return server


REFUSED: dict[str, bytes] = {
    "length and chunked": POST
    + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    + CHUNKED_EMPTY
    + SMUGGLED,
    "chunked and length": POST
    + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n"
    + CHUNKED_EMPTY
    + SMUGGLED,
    "two lengths": POST + b"Content-Length: 0\r\nContent-Length: 30\r\n\r\n" + SMUGGLED,
    "two equal lengths": POST + b"Content-Length: 0\r\nContent-Length: 0\r\n\r\n" + SMUGGLED,
    "list of lengths": POST + b"Content-Length: 0, 0\r\n\r\n" + SMUGGLED,
    "signed length": POST + b"Content-Length: +5\r\n\r\n" + SMUGGLED,
    "negative length": POST + b"Content-Length: -1\r\n\r\n" + SMUGGLED,
    "hexadecimal length": POST + b"Content-Length: 0x10\r\n\r\n" + SMUGGLED,
    "huge length": POST + b"Content-Length: 99999999999999999999\r\n\r\n" + SMUGGLED,
    "space before the colon": POST + b"Content-Length : 30\r\n\r\n" + SMUGGLED,
    "folded header": POST + b"X: a\r\n Content-Length: 30\r\n\r\n" + SMUGGLED,
    "bare line feeds": b"POST /checkpoints HTTP/1.1\nHost: x\nContent-Length: 0\n\n" + SMUGGLED,
    "bare carriage return": POST + b"X: a\rContent-Length: 30\r\n\r\n" + SMUGGLED,
    "nul in a header": POST + b"X: a\x00b\r\n\r\n" + SMUGGLED,
    "chunk size that is none": POST
    + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n"
    + CHUNKED_EMPTY
    + SMUGGLED,
    "huge chunk size": POST + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n" + SMUGGLED,
    "chunked twice over": POST
    + b"Transfer-Encoding: chunked, identity\r\n\r\n"
    + CHUNKED_EMPTY
    + SMUGGLED,
    "another coding": POST + b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNKED_EMPTY + SMUGGLED,
    "two hosts": b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n" + SMUGGLED,
    "no host": b"GET /healthz HTTP/1.1\r\n\r\n" + SMUGGLED,
    "no method": b"\x16\x03\x01\x02\x00\x01\x00" + SMUGGLED,
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SMUGGLED,
    "HTTP/0.9": b"GET /healthz\r\n\r\n" + SMUGGLED,
}


async def test_what_two_parsers_could_read_differently_is_refused(guarded: ServerProcess):
    """Never two answers: nothing behind the doubtful head is taken for a request."""
    for name, data in REFUSED.items():
        heard = await told(guarded.port, data, quiet_seconds=2.5)
        assert heard.closed, name
        assert len(heard.statuses) <= 1, (name, heard.raw)  # none: broken behind its head
        assert all(400 <= status < 500 for status in heard.statuses), (name, heard.raw)
        if heard.statuses == [400]:
            assert b"content-type: application/problem+json" in heard.head, name
            assert b"retry-after" not in heard.head, name  # the same again would do no better
    assert (await guarded.client.get("/healthz")).status_code == 200


async def test_a_refusal_is_found_in_the_log_by_its_name(guarded: ServerProcess):
    heard = await told(guarded.port, b"GET / HTTP/1.1\r\nX-Request-ID: mine\r\n\r\n")
    assert json.loads(heard.raw.partition(b"\r\n\r\n")[2])["request_id"] == "mine"
    assert b"x-request-id: mine" in heard.head
    lines = [json.loads(line) for line in guarded.log_path.read_text().splitlines()]
    (line,) = [line for line in lines if line.get("request_id") == "mine"]
    assert (line["event"], line["status"], line["client"]) == ("http.refused", 400, "127.0.0.1")
    assert not [line for line in lines if "Invalid HTTP" in line.get("detail", "")]


APPEND = (
    b"POST /tenants/acme/databases/log/records HTTP/1.1\r\nHost: x\r\n"
    b"Content-Type: application/x-ndjson\r\n"
)


async def told_to_its_end(port: int, data: bytes) -> Told:
    connection = await RawConnection.open(port)
    await connection.send(data)
    connection.end()
    heard = await connection.read(quiet_seconds=5)
    await connection.aclose()
    return heard


async def test_who_ends_its_side_with_its_request_is_answered(guarded: ServerProcess):
    await guarded.client.put("/tenants/acme/databases/log", json={"engine": "append_only"})
    for data, status in (
        (APPEND + b"Content-Length: 4\r\n\r\none\n", 201),
        (APPEND + b"Transfer-Encoding: chunked\r\n\r\n4\r\ntwo\n\r\n0\r\n\r\n", 201),
        (b"GET /tenants/acme/databases/log HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"GET /jobs HTTP/1.1\r\nHost: x\r\n\r\n" + SMUGGLED, 200),
    ):
        heard = await told_to_its_end(guarded.port, data)
        assert (set(heard.statuses), heard.closed) == ({status}, True), data
    shown = (await guarded.client.get("/tenants/acme/databases/log")).json()
    assert shown["next_lsn"] == 3


BROKEN_BODIES = {
    "short": b"Content-Length: 10\r\n\r\none\n",
    "without its last chunk": b"Transfer-Encoding: chunked\r\n\r\n4\r\none\n\r\n",
    "in chunks of no size": b"Transfer-Encoding: chunked\r\n\r\n4\r\none\n\r\nzz\r\n",
}


@pytest.mark.parametrize("name", BROKEN_BODIES)
async def test_a_body_that_breaks_off_is_refused_and_kept_in_no_part(
    guarded: ServerProcess, name: str
):
    await guarded.client.put("/tenants/acme/databases/log", json={"engine": "append_only"})
    heard = await told_to_its_end(guarded.port, APPEND + BROKEN_BODIES[name])
    assert (heard.statuses, heard.closed) == ([400], True)
    assert json.loads(heard.raw.partition(b"\r\n\r\n")[2])["code"] == "malformed_records"
    other = await told_to_its_end(guarded.port, POST + BROKEN_BODIES[name])
    assert json.loads(other.raw.partition(b"\r\n\r\n")[2])["code"] == "invalid_request"
    shown = (await guarded.client.get("/tenants/acme/databases/log")).json()
    assert (shown["next_lsn"], shown["wal_bytes"]) == (1, 0)


@pytest.mark.parametrize("name", BROKEN_BODIES)
async def test_who_says_not_who_it_is_is_told_that_before_its_body_breaks(
    make_server: MakeServer, tmp_path, name: str
):
    tokens = tmp_path / "tokens.json"
    tokens.write_text('{"tokens": []}')
    server = make_server(settings={"BOP_AUTH_TOKENS_FILE": str(tokens)})
    await server.start()
    heard = await told_to_its_end(server.port, APPEND + BROKEN_BODIES[name])
    assert (heard.statuses, heard.closed) == ([401], True)


async def test_an_upgrade_ends_the_connection(guarded: ServerProcess):
    for protocol in (b"h2c", b"websocket", b"x"):
        data = (
            b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: "
            + protocol
            + b"\r\n\r\n"
            + SMUGGLED
        )
        heard = await told(guarded.port, data, quiet_seconds=2.5)
        assert heard.closed
        assert heard.statuses == [200]


async def test_a_head_that_never_ends_is_cut_off(guarded: ServerProcess):
    """Slowloris: also where every connection that the service takes is held so."""
    held = [await RawConnection.open(guarded.port) for _ in range(20)]
    for connection in held:
        await connection.send(b"GET /healthz HTTP/1.1\r\nX-A: b\r\n")

    async def dribble(connection: RawConnection) -> None:
        try:
            while True:
                await connection.send(b"X: y\r\n")
                await asyncio.sleep(0.2)
        except ConnectionError:
            return

    dribbling = [asyncio.ensure_future(dribble(connection)) for connection in held]
    try:
        heard = [await connection.read(quiet_seconds=10) for connection in held]
    finally:
        for task in dribbling:
            task.cancel()
        await asyncio.gather(*dribbling, return_exceptions=True)
    assert all(one.closed for one in heard)
    assert {status for one in heard for status in one.statuses} <= {408}
    assert any(one.statuses == [408] for one in heard)
    for connection in held:
        await connection.aclose()
    assert (await guarded.client.get("/healthz")).status_code == 200


async def test_a_connection_that_says_nothing_is_cut_off(guarded: ServerProcess):
    silent = await RawConnection.open(guarded.port)
    blank = await RawConnection.open(guarded.port)
    await blank.send(b"\r\n\r\n")
    for connection in (silent, blank):
        assert (await connection.read(quiet_seconds=10)).closed
        await connection.aclose()


async def test_heads_are_bounded(guarded: ServerProcess):
    line = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
    for data in (
        line + b"X: " + b"a" * 100_000 + b"\r\n\r\n",
        line + b"X: " + b"a" * 400_000,  # never ends
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        line + b"".join(b"X%d: y\r\n" % number for number in range(200)) + b"\r\n",
    ):
        heard = await told(guarded.port, data, quiet_seconds=5)
        assert (heard.statuses, heard.closed) == ([431], True), data[:60]
    fits = line + b"X: " + b"a" * 60_000 + b"\r\nConnection: close\r\n\r\n"
    assert (await told(guarded.port, fits, quiet_seconds=5)).statuses == [200]


async def test_an_endless_or_idle_body_is_refused(guarded: ServerProcess):
    """Fault row 54, for JSON; `test_refusals` has it for records."""
    head = POST + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    endless = await RawConnection.open(guarded.port)
    await endless.send(head)

    async def pour() -> None:
        try:
            while True:
                await endless.send(b"100\r\n" + b" " * 256 + b"\r\n")
                await asyncio.sleep(0.005)
        except ConnectionError:
            return

    pouring = asyncio.ensure_future(pour())
    heard = await endless.read(quiet_seconds=10)
    pouring.cancel()
    await asyncio.gather(pouring, return_exceptions=True)
    assert (heard.statuses, heard.closed) == ([413], True)
    await endless.aclose()
    idle = await told(guarded.port, head + b"5\r\n{", quiet_seconds=10)
    assert idle.statuses == [422]


async def test_connections_are_bounded_and_come_back(guarded: ServerProcess):
    await guarded.client.aclose()
    held = [await RawConnection.open(guarded.port) for _ in range(24)]
    for connection in held:
        await connection.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    answers_of_all = [connection.read(quiet_seconds=0.3) for connection in held]
    assert {told.statuses[0] for told in await asyncio.gather(*answers_of_all)} == {200}
    heard = await told(guarded.port, SMUGGLED, quiet_seconds=5)
    assert (heard.statuses, heard.closed) == ([503], True)
    assert b"retry-after: 1" in heard.head
    for connection in held:
        await connection.aclose()

    async def answers() -> bool:
        data = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        return (await told(guarded.port, data)).statuses == [200]

    await wait_until(answers)


async def test_a_client_that_takes_nothing_of_its_answer_is_let_go(make_server: MakeServer):
    """Fault row 48 at the connection: whatever the answer is."""
    server = make_server(settings={"BOP_ANSWER_STALL_SECONDS": "1"})
    await server.start()
    log = "/tenants/acme/databases/log"
    await server.client.put(log, json={"engine": "append_only"})
    for _ in range(3):
        answer = await server.client.post(
            f"{log}/records",
            content=bytes(14 * 1024 * 1024),
            headers={"Content-Type": "application/octet-stream"},
        )
        assert answer.status_code == 201
    crawler = await RawConnection.open(server.port)
    await crawler.send(f"GET {log}/records HTTP/1.1\r\nHost: x\r\n\r\n".encode())

    async def connections() -> float:
        lines = (await server.client.get("/metrics")).text.splitlines()
        return next(float(one.split()[1]) for one in lines if one.startswith("http_connections "))

    assert await connections() == 2

    async def let_go() -> bool:
        return await connections() == 1

    await wait_until(let_go, timeout=20)
    await crawler.aclose()


async def test_operators_have_a_port_of_their_own(make_server: MakeServer, tmp_path):
    tokens = tmp_path / "tokens.json"
    digest = hashlib.sha256(b"ann").hexdigest()
    scopes = ["read", "debug", "admin"]
    tokens.write_text(json.dumps({"tokens": [{"name": "ann", "sha256": digest, "scopes": scopes}]}))
    port = free_port()
    server = make_server(
        settings={"BOP_ADMIN_PORT": str(port), "BOP_AUTH_TOKENS_FILE": str(tokens)}
    )
    await server.start()
    client = server.client
    ann = {"Authorization": "Bearer ann"}
    for path in ("/debug/checkpoint/leases", "/admin/audit", "/debug/%6danifest/stats"):
        public = await client.get(path, headers=ann)
        assert (public.status_code, public.json()["code"]) == (404, "not_found")
        there = f"http://127.0.0.1:{port}{path}"
        assert (await client.get(there, headers=ann)).status_code == 200
        assert (await client.get(there)).status_code == 401
        assert (await client.get(path)).status_code == 401
    assert (await client.get("/jobs", headers=ann)).status_code == 200
    assert await server.terminate() == 0


@pytest.mark.parametrize(("trusted", "shown"), [("", "127.0.0.1"), ("127.0.0.1", "10.9.8.7")])
async def test_forwarded_addresses_are_believed_of_named_proxies_only(
    make_server: MakeServer, trusted: str, shown: str
):
    server = make_server(settings={"BOP_TRUSTED_PROXIES": trusted})
    await server.start()
    await server.client.get("/jobs", headers={"X-Forwarded-For": "10.9.8.7", "X-Request-ID": "me"})

    def logged() -> list[str]:
        lines = map(json.loads, server.log_path.read_text().splitlines())
        return [line["client"] for line in lines if line.get("request_id") == "me"]

    await wait_until(lambda: bool(logged()))
    assert logged() == [shown]


async def test_the_descriptor_limit_is_raised_as_far_as_it_may(make_server: MakeServer):
    limited = NewInterpreter("sh", "-c", 'ulimit -Sn 256; ulimit -Hn 2048; exec "$@"', "sh")
    server = make_server(launcher=limited)
    await server.start()
    assert resource.prlimit(server.pid, resource.RLIMIT_NOFILE) == (2048, 2048)
    assert await server.terminate() == 0
