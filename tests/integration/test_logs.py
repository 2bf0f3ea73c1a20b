"""What the process tells: lines that belong to requests, traces and jobs; spans; no secrets."""

import asyncio
import hashlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.conftest import MakeServer
from tests.helpers.launch import base_environment
from tests.helpers.server import ServerProcess
from tests.helpers.wait import wait_until

LOG = "/tenants/acme/databases/log"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
JOINED = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01", "X-Request-ID": "me"}
CANARY = "canary-5d41402abc4b2a76b9719d911017c592"


def lines_of(server: ServerProcess) -> list[dict]:
    return [json.loads(line) for line in server.log_path.read_text().splitlines()]


async def checkpointed(server: ServerProcess, **headers: str) -> None:
    client = server.client
    await client.put(LOG, json={"engine": "append_only"}, headers=headers)
    await client.post(
        f"{LOG}/records",
        content=CANARY.encode(),
        headers={"Content-Type": "application/octet-stream", **headers},
    )
    asked = {"tenant": "acme", "database": "log"}
    job = await client.post("/checkpoints", json=asked, headers={**JOINED, **headers})
    assert job.headers["traceparent"].split("-")[1] == TRACE
    ended = await client.get(f"/checkpoints/{job.json()['id']}?wait=20", headers=headers)
    assert ended.json()["state"] == "completed"


async def test_a_jobs_lines_belong_to_the_trace_of_who_asked(server: ServerProcess):
    """Through the queue and into the threads of the pools."""
    await checkpointed(server)
    lines = lines_of(server)
    (answered,) = [one for one in lines if one.get("request_id") == "me" and "seconds" in one]
    assert (answered["trace_id"], answered["principal"]) == (TRACE, "local")
    of_the_job = [one for one in lines if one["event"].startswith("checkpoint.")]
    assert len(of_the_job) >= 5
    for line in of_the_job:
        assert (line["trace_id"], line["tenant"], line["database"]) == (TRACE, "acme", "log")
        assert line["job_id"]
    (created,) = [one for one in lines if one["event"] == "database.created"]
    assert created["request_id"]


async def test_scrapes_show_the_trace_beside_the_bucket(server: ServerProcess):
    await checkpointed(server)
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    scraped = await server.client.get("/metrics", headers=accept)
    assert scraped.headers["content-type"].startswith("application/openmetrics-text")
    marked = [line for line in scraped.text.splitlines() if f'trace_id="{TRACE}"' in line]
    names = {line.partition("{")[0] for line in marked}
    assert {"http_request_duration_seconds_bucket", "checkpoint_duration_seconds_bucket"} <= names
    plain = await server.client.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain")
    assert TRACE not in plain.text
    age = [one for one in plain.text.splitlines() if one.startswith("remote_position_age_seconds{")]
    assert age[0].startswith('remote_position_age_seconds{database="log",tenant="acme"} ')
    assert 'unpublished_wal_bytes{database="log",tenant="acme"} 0.0' in plain.text


class Collector:
    """Takes OTLP over HTTP and keeps the bodies."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
                assert head.startswith(b"POST /v1/traces ")
                self.bodies.append(await reader.readexactly(length))
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        except asyncio.IncompleteReadError:
            writer.close()


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    collector = Collector()
    listening = await asyncio.start_server(collector.serve, "127.0.0.1", 0)
    collector.port = listening.sockets[0].getsockname()[1]
    yield collector
    listening.close()


async def test_spans_are_sent_where_a_collector_is_named(
    make_server: MakeServer, collector: Collector
):
    server = make_server(
        settings={
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}",
            "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
            "BOP_TRACE_RATIO": "0",
        }
    )
    await server.start()
    await server.client.put(LOG, json={"engine": "append_only"})  # nobody traces it
    shown = await server.client.get(LOG, headers=JOINED)
    _, trace_id, span_id, _ = shown.headers["traceparent"].split("-")
    assert trace_id == TRACE
    assert await server.terminate() == 0
    await wait_until(lambda: bool(collector.bodies))
    sent = b"".join(collector.bodies)
    assert bytes.fromhex(TRACE) in sent
    assert bytes.fromhex(span_id) in sent
    assert sent.count(b"/tenants/{tenant}/databases/{database}") == 2  # one span: name and route
    (line,) = [one for one in lines_of(server) if one.get("request_id") == "me"]
    assert (line["trace_id"], line["span_id"], line["tenant"]) == (TRACE, span_id, "acme")


async def test_a_collector_that_is_away_holds_up_nobody(make_server: MakeServer):
    server = make_server(
        settings={"BOP_OTLP_ENDPOINT": "http://127.0.0.1:9", "BOP_TRACE_RATIO": "1"}
    )
    await server.start()
    assert (await server.client.get("/jobs")).status_code == 200
    assert await server.terminate(timeout=30) == 0


async def test_secrets_and_contents_are_in_no_line(make_server: MakeServer, tmp_path):
    tokens = tmp_path / "tokens.json"
    digest = hashlib.sha256(CANARY.encode()).hexdigest()
    scopes = ["read", "write", "checkpoint", "debug", "admin"]
    tokens.write_text(json.dumps({"tokens": [{"name": "ann", "sha256": digest, "scopes": scopes}]}))
    environment = {
        "BOP_AUTH_TOKENS_FILE": str(tokens),
        "BOP_LOG_LEVEL": "debug",
        "AWS_SECRET_ACCESS_KEY": CANARY,
        "AWS_SESSION_TOKEN": CANARY,
        "OTEL_EXPORTER_OTLP_HEADERS": f"authorization={CANARY}",
    }
    server = make_server(settings=environment)
    await server.start()
    await checkpointed(server, Authorization=f"Bearer {CANARY}")
    for bad in (f"Bearer {CANARY}", f"Basic {CANARY}", f"Bearer x{CANARY}"):
        await server.client.get("/jobs?limit=x", headers={"Authorization": bad})
    await server.client.post(
        f"{LOG}/records", content=CANARY.encode(), headers={"Authorization": f"Bearer {CANARY}"}
    )
    assert await server.terminate() == 0
    log = server.log_path.read_text()
    assert "checkpoint.published" in log
    assert CANARY not in log
    shown = await asyncio.to_thread(printed_config, environment, tmp_path)
    assert "BOP_AUTH_TOKENS_FILE" in shown
    assert CANARY not in shown


def printed_config(environment: dict[str, str], directory: Path) -> str:
    """Where an endpoint's credentials stand in the URL, too."""
    secret = {"BOP_S3_ENDPOINT_URL": f"https://key:{CANARY}@s3.example"}
    ran = subprocess.run(
        [sys.executable, "-m", "app.cli.main", "serve", "--print-config"],
        env={**base_environment(), **environment, **secret},
        capture_output=True,
        text=True,
        check=True,
        cwd=directory,
    )
    return ran.stdout + ran.stderr
