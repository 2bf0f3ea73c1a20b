"""Reads of a libsql database: hot pages against a bare route, images, what cold pages cost."""

import asyncio
import random
import shutil
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import httpx

from benchmarks.http_load import get, run_load
from benchmarks.report import Result, at_least, at_most
from benchmarks.service import service
from benchmarks.turns import Side, against_bare, bare_api, in_turn

MIB = 1024 * 1024
DATABASE_MIB = 256
PAGE_BYTES = 4096
PATH = "/tenants/bench/databases/app"
IMAGE_MB_PER_SECOND = 300
PER_CHUNK = 64 * MIB // PAGE_BYTES
COLD_GETS = 2
ROUNDS = 4


async def page_reads(work: Path, *, seconds: float = 6.0, connections: int = 16) -> list[Result]:
    """One service: loaded, checkpointed, read hot, streamed, then read cold."""
    image = make_database_blocking(work / "source.db", size_bytes=DATABASE_MIB * MIB)
    data_dir = work / "page-reads"
    async with bare_api() as bare, service(data_dir) as (port, process):
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
            await load(client, image)
        page = get(f"{PATH}/pages/1000")
        taken = await in_turn(
            {"bare": bare, "ours": Side(port=port, process=process)},
            page, connections=connections, rounds=ROUNDS, seconds=seconds / ROUNDS,
        )  # fmt: skip
        streamed = [
            await run_load(port, get(f"{PATH}/image"), connections=1, requests=1) for _ in range(3)
        ]
        patched = await asyncio.to_thread(patch_blocking, image)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
            await load(client, image)
    best = max(one.body_bytes / 1e6 / one.seconds for one in streamed)
    pages = image.stat().st_size // PAGE_BYTES
    whole = range(PER_CHUNK // 2, pages, 2 * PER_CHUNK)
    shutil.rmtree(data_dir / "hot_cache")
    cold_gets = await _most_gets(data_dir, [*whole, *patched])
    shutil.rmtree(data_dir / "hot_cache")
    shutil.rmtree(data_dir / "directories")
    bare_gets = await _most_gets(data_dir, whole)
    return [
        against_bare(
            f"{connections} clients' reads of a hot page ÷ the same GET on a bare FastAPI route",
            taken, target=0.5,
        ),
        at_least(
            "an image streamed from the hot cache (zstd) ÷ 300 MB/s",
            measured=best, ceiling=IMAGE_MB_PER_SECOND, unit="MB/s", target=1.0,
        ),
        at_most(
            "ranged GETs for one page that no cache has, patched ones among them",
            measured=cold_gets, limit=COLD_GETS, unit="requests",
        ),
        at_most(
            "ranged GETs for one page of a base, no directory on the disk either",
            measured=bare_gets, limit=COLD_GETS, unit="requests",
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


def patch_blocking(image: Path) -> list[int]:
    """Changes a few bytes of pages in every other chunk; returns one page of each of those."""
    first = PER_CHUNK + PER_CHUNK // 2
    patched = list(range(first, image.stat().st_size // PAGE_BYTES, 2 * PER_CHUNK))
    with image.open("rb+") as file:
        for page_no in patched:
            for near in range(page_no, page_no + 500):
                file.seek((near - 1) * PAGE_BYTES + PAGE_BYTES - 20)
                file.write(b"changed")
    return patched


async def _most_gets(data_dir: Path, page_nos: Iterable[int]) -> float:
    """The most that one of the pages took in a new process; each is of a chunk of its own."""
    most = 0.0
    async with (
        service(data_dir) as (port, _),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        before = await _gets(client)
        for page_no in page_nos:
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
