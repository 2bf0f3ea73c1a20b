"""Cold scans over HTTP: the right bytes, past every cache, within their limits."""

import asyncio
import json
import random
import socket
import sys
import time
from http.client import HTTPResponse

import httpx
import pytest

from app.container import fsck
from app.core.formats.cold_scan import FrameDecoder, FrameType
from app.core.formats.record_framing import pack_records, unpack_records
from app.settings import Settings
from tests.conftest import MakeServer
from tests.helpers.launch import base_environment
from tests.helpers.scans import content, records, scan
from tests.helpers.seaweed import SeaweedS3
from tests.helpers.server import ServerProcess
from tests.helpers.wait import wait_until

PAGE = 4096
CHUNK_BYTES = 65536
PER_CHUNK = CHUNK_BYTES // PAGE
DATABASE = "/tenants/acme/databases/app"


def image_of(source: random.Random, pages: int) -> bytes:
    head = bytearray(PAGE)
    head[:16] = b"SQLite format 3\0"
    head[16:18] = PAGE.to_bytes(2, "big")
    head[18:24] = bytes((2, 2, 0, 64, 32, 32))
    head[24:28] = head[92:96] = (1).to_bytes(4, "big")
    head[28:32] = pages.to_bytes(4, "big")
    return bytes(head) + source.randbytes((pages - 1) * PAGE)


def changed(source: random.Random, image: bytes, pages: int) -> bytes:
    data = bytearray(image)
    for page in source.sample(range(2, len(image) // PAGE + 1), pages):
        data[(page - 1) * PAGE + 100 : (page - 1) * PAGE + 108] = source.randbytes(8)
    return bytes(data)


async def create(client: httpx.AsyncClient, engine: str = "libsql", **fields: object) -> None:
    body = {"engine": engine, "chunk_bytes": CHUNK_BYTES, **fields}
    if engine == "libsql":
        body["page_size"] = PAGE
    assert (await client.put(DATABASE, json=body)).status_code == 201


async def put(client: httpx.AsyncClient, image: bytes) -> None:
    assert (await client.put(f"{DATABASE}/image", content=image)).status_code == 200


async def append(client: httpx.AsyncClient, bodies: list[bytes]) -> None:
    answer = await client.post(
        f"{DATABASE}/records", content=pack_records(bodies),
        headers={"Content-Type": "application/vnd.bop.records"},
    )  # fmt: skip
    assert answer.status_code == 201


async def checkpoint(client: httpx.AsyncClient) -> dict:
    answer = await client.post("/checkpoints", json={"tenant": "acme", "database": "app"})
    job = (await client.get(f"/checkpoints/{answer.json()['id']}?wait=60")).json()
    assert job["state"] == "completed", job
    return job["result"]


async def image_at(client: httpx.AsyncClient, generation: int) -> bytes:
    return (await client.get(f"{DATABASE}/image", params={"generation": generation})).content


async def metric(client: httpx.AsyncClient, name: str) -> float:
    lines = (await client.get("/metrics")).text.splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


async def check_fsck(server: ServerProcess) -> None:
    await server.terminate()
    report = await fsck(Settings(data_dir=server.data_dir))
    assert report.findings == ()


async def test_cold_scan_bypasses_cache(
    make_server: MakeServer, seaweed: SeaweedS3, monkeypatch: pytest.MonkeyPatch
):
    """The plan's test: half of many chunks, throttled; the caches stay as they were."""
    for name, value in seaweed.environment().items():
        monkeypatch.setenv(name, value)
    server = make_server(
        settings={
            "BOP_REMOTE_URL": f"s3://{seaweed.bucket()}/scans",
            "BOP_S3_ENDPOINT_URL": seaweed.endpoint,
            "BOP_PAGE_CACHE_BYTES": str(1024 * 1024),
            **seaweed.environment(),
        }
    )
    await server.start()
    client, chunks = server.client, 100
    image = image_of(random.Random(1), chunks * PER_CHUNK)
    await create(client, compression="none")
    await put(client, image)
    assert len((await checkpoint(client))["chunks"]) == chunks
    for page in range(1, 50):  # something is in the page cache
        assert (await client.get(f"{DATABASE}/pages/{page}?generation=1")).status_code == 200
    before = (await client.get("/debug/cache")).json()
    assert before["page_cache"]["entries"] > 0
    assert before["hot_cache"]["entries"] == chunks
    cold, normal = (
        [f'remote_bytes_read_total{{mode="{mode}"}}' for mode in ("cold", "normal")]
    )  # fmt: skip
    cold_before, normal_before = await metric(client, cold), await metric(client, normal)

    rate, began = 2_000_000, time.monotonic()
    frames = await scan(
        client, first_chunk=0, last_chunk=chunks // 2 - 1, max_bytes_per_second=rate
    )
    seconds = time.monotonic() - began

    half = image[: len(image) // 2]
    assert content(frames) == half
    assert (await client.get("/debug/cache")).json() == before
    read = await metric(client, cold) - cold_before
    assert len(half) <= read <= 1.1 * len(half)
    assert await metric(client, normal) == normal_before
    assert read <= 1.1 * rate * max(seconds, 0.25) + 0.25 * rate  # held, with its burst
    assert await metric(client, "cold_scans_active") == 0


async def test_generations_of_pages_come_back(server: ServerProcess):
    """Bases, deltas over them, merged and rewritten ones; by pages, by chunks, and in parts."""
    client, source = server.client, random.Random(2)
    await create(client)
    image = image_of(source, 5 * PER_CHUNK + 3)
    for _ in range(5):
        await put(client, image)
        await checkpoint(client)
        image = changed(source, image, 9)
    await put(client, image)  # in the WAL: not part of a scan
    newest = await scan(client)
    assert newest[0].start().generation == 5
    assert newest[0].start().chunks == newest[-1].end().chunks == 6
    assert newest[0].start().page_size == PAGE
    for generation in range(1, 6):
        whole = await image_at(client, generation)
        frames = await scan(client, generation=generation)
        assert content(frames) == whole
        for first, last in ((1, 1), (2, 40), (17, 32), (60, 83), (83, 200)):
            part = await scan(client, generation=generation, first_page=first, last_page=last)
            assert content(part) == whole[(first - 1) * PAGE : last * PAGE]
    assert content(newest) == await image_at(client, 5)
    part = await scan(client, first_chunk=1, last_chunk=2)
    assert content(part) == (await image_at(client, 5))[CHUNK_BYTES : 3 * CHUNK_BYTES]
    assert {frame.chunk_id for frame in part if frame.is_data} == {1, 2}
    beyond = await scan(client, first_page=5 * PER_CHUNK + 4)
    assert [frame.type for frame in beyond] == [FrameType.START, FrameType.END]
    await check_fsck(server)


@pytest.mark.parametrize("compression", ["none", "zstd"])
async def test_records_come_back(server: ServerProcess, compression: str):
    client, source = server.client, random.Random(3)
    await create(client, engine="append_only", compression=compression)
    for _ in range(3):
        for _ in range(3):
            await append(client, [source.randbytes(source.randrange(9000)) for _ in range(15)])
        await checkpoint(client)
    await append(client, [b"in the WAL"])
    answer = await client.get(f"{DATABASE}/records", params={"from_lsn": 1, "to_lsn": 135})
    expected = dict(enumerate(unpack_records(answer.content), start=1))
    frames = await scan(client)
    assert records(frames) == expected
    start, end = frames[0].start(), frames[-1].end()
    assert (start.generation, start.page_size) == (3, None)
    assert start.chunks == end.chunks > 3
    assert end.bytes == len(answer.content)
    middle = await scan(client, from_lsn=20, to_lsn=99)
    assert records(middle) == {lsn: expected[lsn] for lsn in range(20, 100)}
    older = await scan(client, generation=1, from_lsn=40)
    assert records(older) == {lsn: expected[lsn] for lsn in range(40, 46)}
    assert records(await scan(client, from_lsn=136)) == {}
    await check_fsck(server)


async def test_what_cannot_be_scanned_is_said_before_the_stream(server: ServerProcess):
    client = server.client

    async def code(**params: object) -> tuple[int, str]:
        answer = await client.get(
            "/cold-scan", params={"tenant": "acme", "database": "app", **params}
        )
        assert answer.headers["content-type"] == "application/problem+json"
        return answer.status_code, answer.json()["code"]

    assert await code() == (404, "database_not_found")
    await create(client)
    assert await code() == (409, "no_generation")
    await put(client, image_of(random.Random(4), 3))
    await checkpoint(client)
    assert await code(from_lsn=1) == (409, "wrong_engine")
    assert await code(generation=2) == (404, "not_found")
    assert await code(snapshot="none") == (404, "snapshot_not_found")
    for wrong in (
        {"first_page": 0}, {"first_page": 3, "last_page": 2}, {"first_chunk": -1},
        {"max_bytes_per_second": 0}, {"priority": "high"}, {"generation": 1, "snapshot": "s"},
        {"database": "../x"}, {"first_page": "x"},
    ):  # fmt: skip
        assert await code(**wrong) == (422, "invalid_request"), wrong


async def test_damage_ends_a_scan_with_an_error_frame(server: ServerProcess):
    client = server.client
    await create(client, compression="none")
    await put(client, image_of(random.Random(5), 8 * PER_CHUNK))
    chunks = (await checkpoint(client))["chunks"]
    key = chunks[5]["blob_key"]
    blob = server.data_dir / "remote" / key
    sound = blob.read_bytes()
    data = bytearray(sound)
    data[len(data) // 2] ^= 1
    for damage in (bytes(data), None):
        blob.unlink()
        if damage is not None:
            blob.write_bytes(damage)
        frames = await scan(client)
        assert frames[-1].type is FrameType.ERROR
        problem = frames[-1].problem()
        assert (problem["code"], problem["status"], problem["key"]) == ("corrupt_blob", 500, key)
        assert all(frame.chunk_id < 5 for frame in frames if frame.is_data)
        assert content(await scan(client, last_chunk=4) ) == b"".join(
            bytes(frame.payload) for frame in frames if frame.is_data
        )  # fmt: skip
        blob.write_bytes(sound)
    assert await metric(client, "cold_scans_active") == 0
    await check_fsck(server)


class SlowReader:
    """A socket that asks for a scan and reads only when it is told to."""

    def __init__(self, server: ServerProcess, query: str = "", *, buffer_bytes: int = 4096) -> None:
        self.socket = socket.create_connection(("127.0.0.1", server.port))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        path = f"/cold-scan?tenant=acme&database=app{query}"
        self.socket.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())

    def read_all(self) -> bytes:
        answer = HTTPResponse(self.socket)
        answer.begin()
        with self.socket:
            return answer.read()


async def test_a_reader_that_vanishes_or_crawls_is_cut_off(make_server: MakeServer):
    """Fault row 48: its scan ends, and with it the pins and the reads."""
    server = make_server(settings={"BOP_BODY_IDLE_TIMEOUT_SECONDS": "0.5"})
    await server.start()
    client = server.client
    await create(client, compression="none", chunk_bytes=4 * 1024 * 1024)
    await put(client, image_of(random.Random(6), 6144))
    await checkpoint(client)

    async def none_active() -> bool:
        return await metric(client, "cold_scans_active") == 0

    async def one_active() -> bool:
        return await metric(client, "cold_scans_active") == 1

    crawling = SlowReader(server)
    await wait_until(one_active)
    await wait_until(none_active)
    crawling.socket.close()

    throttled = SlowReader(server, "&max_bytes_per_second=1000")  # nothing is sent for a while
    await wait_until(one_active)
    throttled.socket.close()
    await wait_until(none_active, timeout=5)
    read = await metric(client, 'remote_bytes_read_total{mode="cold"}')
    assert content(await scan(client)) == await image_at(client, 1)
    assert await metric(client, 'remote_bytes_read_total{mode="cold"}') >= read + 6144 * PAGE
    await check_fsck(server)


async def test_a_broken_scan_goes_on_behind_its_last_frame(server: ServerProcess):
    client, source = server.client, random.Random(7)
    await create(client)
    await put(client, image_of(source, 20 * PER_CHUNK))
    await checkpoint(client)
    expected, got, next_page = await image_at(client, 1), b"", 1
    for _ in range(4):
        decoder = FrameDecoder()
        params = {"tenant": "acme", "database": "app", "generation": 1, "first_page": next_page}
        async with client.stream("GET", "/cold-scan", params=params) as answer:
            pieces = answer.aiter_raw()
            wanted = source.randrange(2, 6)
            seen = 0
            async for piece in pieces:
                for frame in decoder.feed(piece):
                    if frame.is_data and seen < wanted:
                        seen += 1
                        got += bytes(frame.payload)
                        next_page = frame.first + frame.count
                if seen >= wanted:
                    break
    got += content(await scan(client, generation=1, first_page=next_page))
    assert got == expected


async def test_a_service_that_stops_says_so_in_the_stream(server: ServerProcess):
    client = server.client
    await create(client, compression="none")
    await put(client, image_of(random.Random(8), 4 * PER_CHUNK))
    await checkpoint(client)
    decoder, frames = FrameDecoder(), []
    params = {"tenant": "acme", "database": "app", "max_bytes_per_second": 20_000}
    async with client.stream("GET", "/cold-scan", params=params) as answer:
        ending: asyncio.Task[int] | None = None
        async for piece in answer.aiter_raw():
            frames += decoder.feed(piece)
            ending = ending or asyncio.ensure_future(server.terminate())
    decoder.finish()
    assert frames[-1].problem()["code"] == "not_ready"
    assert ending is not None
    assert await ending == 0
    report = await fsck(Settings(data_dir=server.data_dir))
    assert report.findings == ()


async def test_the_command_makes_a_database_or_records(server: ServerProcess, tmp_path):
    client = server.client
    await create(client)
    image = image_of(random.Random(9), 3 * PER_CHUNK)
    await put(client, image)
    await checkpoint(client)
    target = tmp_path / "copy.sqlite"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "app.cli.main", "--url", server.base_url, "--output", "json",
        "cold-scan", "acme/app", "-o", str(target),
        stdout=asyncio.subprocess.PIPE, env=base_environment(),
    )  # fmt: skip
    out, _ = await process.communicate()
    assert process.returncode == 0
    assert json.loads(out)["chunks"] == 3
    assert target.read_bytes() == await image_at(client, 1)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "app.cli.main", "--url", server.base_url, "--output", "json",
        "verify", "acme/app", "--wait",
        stdout=asyncio.subprocess.PIPE, env=base_environment(),
    )  # fmt: skip
    out, _ = await process.communicate()
    assert process.returncode == 0
    assert json.loads(out)["result"]["outcome"] == "verified"


async def test_snapshots_and_forks_are_scanned_like_generations(server: ServerProcess):
    client, source = server.client, random.Random(10)
    await create(client)
    image = image_of(source, 4 * PER_CHUNK)
    await put(client, image)
    await checkpoint(client)
    snapshot = await client.post("/tenants/acme/databases/app/snapshots", json={"name": "s"})
    assert snapshot.status_code == 201
    fork = await client.post("/tenants/acme/databases/app/forks", json={"database": "copy"})
    assert fork.status_code == 201
    await put(client, changed(source, image, 7))
    await checkpoint(client)
    before = await image_at(client, 1)
    assert content(await scan(client, snapshot="s")) == before
    assert content(await scan(client, database="copy")) == before
    assert content(await scan(client)) == await image_at(client, 2)


async def test_the_flag_of_a_tenant_refuses_it(server: ServerProcess):
    client = server.client
    await create(client)
    await put(client, image_of(random.Random(11), 3))
    await checkpoint(client)
    flags = "/admin/tenants/acme/feature-flags"
    assert (await client.patch(flags, json={"enable_cold_scan": False})).status_code == 200
    answer = await client.get("/cold-scan", params={"tenant": "acme", "database": "app"})
    assert (answer.status_code, answer.json()["code"]) == (409, "feature_disabled")
    assert (await client.patch(flags, json={"enable_cold_scan": True})).status_code == 200
    assert content(await scan(client)) == await image_at(client, 1)


async def test_a_generation_stays_until_its_scan_ends(make_server: MakeServer):
    """Fault row 39: the collector meets a running scan."""
    server = make_server(settings={"BOP_GC_GRACE_SECONDS": "0"})
    await server.start()
    client, source = server.client, random.Random(12)
    await create(client, compression="none", chunk_bytes=1024 * 1024)
    rule = {"retention": {"keep_generations": 1, "keep_seconds": None, "minimum_generations": 1}}
    assert (await client.patch(DATABASE, json=rule)).status_code == 200
    pages = 4096  # more than fits into the sockets' buffers: what is not read is not sent
    await put(client, image_of(source, pages))
    await checkpoint(client)
    first = await image_at(client, 1)
    reader = SlowReader(server, buffer_bytes=65536)
    await put(client, image_of(source, pages))
    await checkpoint(client)  # every chunk is rewritten: nothing else needs the first ones
    for _ in range(2):
        assert (await client.post("/admin/gc/run", json={})).status_code < 300
    assert await metric(client, "cold_scans_active") == 1
    frames = FrameDecoder().feed(await asyncio.to_thread(reader.read_all))
    assert content(frames) == first

    async def expired() -> bool:
        assert (await client.post("/admin/gc/run", json={})).status_code < 300
        params = {"tenant": "acme", "database": "app", "generation": 1}
        answer = await client.get("/cold-scan", params=params)
        return answer.status_code == 410 and answer.json()["code"] == "generation_expired"

    await wait_until(expired)
    assert content(await scan(client)) == await image_at(client, 2)
    await check_fsck(server)
