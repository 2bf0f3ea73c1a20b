"""Reads of a libsql database: hot pages against a bare route, images, what cold pages cost."""

import asyncio
import random
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import httpx

from benchmarks.http_load import get, run_load
from benchmarks.report import Result, at_least, at_most
from benchmarks.service import free_port, running, service

MIB = 1024 * 1024
DATABASE_MIB = 256
PAGE_BYTES = 4096
PATH = "/tenants/bench/databases/app"
IMAGE_MB_PER_SECOND = 300
COLD_GETS = 2


async def page_reads(work: Path, *, seconds: float = 6.0, connections: int = 16) -> list[Result]:
    """One service: loaded, checkpointed, read hot, streamed, then read cold."""
    image = make_database_blocking(work / "source.db", size_bytes=DATABASE_MIB * MIB)
    data_dir = work / "page-reads"
    rates: dict[str, list[float]] = {"bare": [], "ours": []}
    async with service(data_dir) as (port, _):
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
            await load(client, image)
        page = get(f"{PATH}/pages/1000")
        for _ in range(2):  # both twice, in turn: the machine's mood is shared
            rates["bare"].append(await _bare_rate(page, seconds=seconds / 2, clients=connections))
            await run_load(port, page, connections=connections, seconds=1)
            ours = await run_load(port, page, connections=connections, seconds=seconds / 2)
            if ours.failures:
                raise RuntimeError(f"{ours.failures} reads failed")
            rates["ours"].append(ours.per_second)
        streamed = [
            await run_load(port, get(f"{PATH}/image"), connections=1, requests=1) for _ in range(3)
        ]
    best = max(one.body_bytes / 1e6 / one.seconds for one in streamed)
    shutil.rmtree(data_dir / "hot_cache")
    async with service(data_dir) as (port, _):
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            cold_gets = await _cold_gets(client, pages=image.stat().st_size // PAGE_BYTES)
    return [
        at_least(
            f"{connections} clients' reads of a hot page ÷ the same GET on a bare FastAPI route",
            measured=max(rates["ours"]), ceiling=max(rates["bare"]), unit="req/s", target=0.5,
        ),
        at_least(
            "an image streamed from the hot cache (zstd) ÷ 300 MB/s",
            measured=best, ceiling=IMAGE_MB_PER_SECOND, unit="MB/s", target=1.0,
        ),
        at_most(
            "ranged GETs for one cold page, nothing known of its chunk",
            measured=cold_gets, limit=COLD_GETS, unit="requests",
        ),
    ]  # fmt: skip


def make_database_blocking(path: Path, *, size_bytes: int) -> Path:
    """Rows like an application's: ids, names, times, some text."""
    source = random.Random(7)
    words = ["".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(5000)]
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        db.execute("PRAGMA journal_mode = OFF")
        db.execute("PRAGMA synchronous = OFF")
        db.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, name TEXT, at REAL, text TEXT)")
        while path.stat().st_size < size_bytes:
            db.execute("BEGIN")
            db.executemany(
                "INSERT INTO t (name, at, text) VALUES (?, ?, ?)",
                (
                    (source.choice(words), source.random(), " ".join(source.choices(words, k=30)))
                    for _ in range(50_000)
                ),
            )
            db.execute("COMMIT")
    return path


async def load(client: httpx.AsyncClient, image: Path) -> None:
    fields = {"engine": "libsql", "page_size": PAGE_BYTES}
    (await client.put(PATH, json=fields)).raise_for_status()

    async def pieces():
        with image.open("rb") as file:
            while piece := await asyncio.to_thread(file.read, MIB):
                yield piece

    (await client.put(f"{PATH}/image", content=pieces())).raise_for_status()
    started = await client.post("/checkpoints", json={"tenant": "bench", "database": "app"})
    job = started.raise_for_status().json()
    while job["state"] in {"pending", "in_flight"}:
        job = (await client.get(f"/checkpoints/{job['id']}?wait=60")).json()
    if job["state"] != "completed":
        raise RuntimeError(f"the checkpoint failed: {job['error']}")


async def _bare_rate(page: list[bytes], *, seconds: float, clients: int) -> float:
    port = free_port()
    async with running("-m", "benchmarks.bare_app", "api", str(port), port=port):
        await run_load(port, page, connections=clients, seconds=1)
        return (await run_load(port, page, connections=clients, seconds=seconds)).per_second


async def _cold_gets(client: httpx.AsyncClient, *, pages: int) -> float:
    """The most that a page of a chunk took of which nothing had been read."""
    most, per_chunk = 0.0, 64 * MIB // PAGE_BYTES
    before = await _gets(client)
    for page_no in range(per_chunk // 2, pages, per_chunk):
        answer = await client.get(f"{PATH}/pages/{page_no}")
        if answer.status_code != 200 or answer.headers["Bop-Tier"] != "remote":
            raise RuntimeError(f"page {page_no}: {answer.status_code} {answer.headers}")
        after = await _gets(client)
        most, before = max(most, after - before), after
    return most


async def _gets(client: httpx.AsyncClient) -> float:
    metrics = (await client.get("/metrics")).text
    return sum(
        float(line.rpartition(" ")[2])
        for line in metrics.splitlines()
        if line.startswith("remote_requests_total") and 'op="get' in line
    )
