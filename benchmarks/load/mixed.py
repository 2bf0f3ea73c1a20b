"""Ten tenants of records and five of SQLite databases, all checkpointed by the timer.

At full size: --interval 300 --seconds 3600. Durations are the service's own, from claim to end.
"""

import argparse
import asyncio
import os
import sqlite3
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import httpx

from benchmarks.load import clients
from benchmarks.load.table import Figure, at_most, exactly, percentile, told
from benchmarks.service import peak_rss_mib, service

TITLE = "Mixed workload, checkpoints on a timer"
SAMPLE_SECONDS = 0.25


@dataclass(slots=True)
class Tally:
    expected: dict[str, dict[int, bytes]] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    refused: int = 0
    depths: list[float] = field(default_factory=list)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--append-only", type=int, default=10, metavar="TENANTS")
    parser.add_argument("--libsql", type=int, default=5, metavar="TENANTS")
    parser.add_argument("--interval", type=int, default=5, help="seconds between checkpoints")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--pause", type=float, default=0.05, help="seconds between writes")


async def run(options: argparse.Namespace, work: Path) -> list[Figure]:
    logs = [f"/tenants/log{number}/databases/events" for number in range(options.append_only)]
    pages = [f"/tenants/sql{number}/databases/main" for number in range(options.libsql)]
    tally = Tally(expected={name: {} for name in logs}, rows=dict.fromkeys(pages, 0))
    settings = {"checkpoint_interval_seconds": str(options.interval), "log_level": "error"}
    async with (
        service(work / "data", **settings) as (port, process),
        clients.connect(port, connections=len(logs) + len(pages) + 4) as client,
    ):
        for name in logs:
            await clients.create(client, name)
        for name in pages:
            await clients.create(client, name, engine="libsql")
        until = time.perf_counter() + options.seconds
        await asyncio.gather(
            *(_append(client, name, tally, until, options.pause) for name in logs),
            *(
                _commit(client, name, work / f"{number}.db", tally, until, options.pause)
                for number, name in enumerate(pages)
            ),
            _sample(client, tally, until),
        )
        jobs = await _quiet(client)
        lost = await _lost(client, tally, work)
        found = await clients.findings(client)
        rss = peak_rss_mib(process)
    done = [job for job in jobs if job["state"] == "completed"]
    seconds = [_seconds(job) for job in done]
    return [
        told("tenants", f"{len(logs)} append_only, {len(pages)} libsql"),
        told("records, rows", f"{sum(map(len, tally.expected.values())):,}, "
             f"{sum(tally.rows.values()):,}"),
        told("writes refused for back-pressure", f"{tally.refused:,}"),
        told("checkpoints", f"{len(done):,}, all by timer: "
             f"{all(job['reason'] == 'timer' for job in done)}"),
        told("checkpoint p50", f"{percentile(seconds, 50) * 1000:,.0f} ms"),
        at_most("checkpoint p99", percentile(seconds, 99), 60, unit="s", digits=2),
        at_most("queue depth, most", max(tally.depths, default=0), 5, digits=0),
        exactly("checkpoints that failed", len(jobs) - len(done)),
        exactly("records or rows lost", lost),
        exactly("fsck findings", len(found)),
        told("server's peak RSS", f"{rss:,.0f} MiB"),
    ]  # fmt: skip


async def _append(
    client: httpx.AsyncClient, name: str, tally: Tally, until: float, pause: float
) -> None:
    while time.perf_counter() < until:
        records = [os.urandom(1024) for _ in range(16)]
        answer = await clients.append(client, name, records)
        if answer.status_code in clients.REFUSED:
            tally.refused += 1
            await clients.pause_as_told(answer, at_most=1.0)
            continue
        answer.raise_for_status()
        first = answer.json()["first_lsn"]
        tally.expected[name].update({first + at: record for at, record in enumerate(records)})
        await asyncio.sleep(pause)


async def _commit(
    client: httpx.AsyncClient, name: str, file: Path, tally: Tally, until: float, pause: float
) -> None:
    """Commits to a real SQLite file, and sends what its log has grown by."""
    database = sqlite3.connect(file, isolation_level=None)
    try:
        database.execute("pragma journal_mode = wal")
        database.execute("pragma wal_autocheckpoint = 0")
        database.execute("create table orders (id integer primary key, note blob)")
        log = file.with_name(f"{file.name}-wal")
        offset = 0
        while time.perf_counter() < until:
            with log.open("rb") as content:
                content.seek(offset)
                body = content.read()
            answer = await client.post(f"{name}/wal?offset={offset}", content=body)
            if answer.status_code in clients.REFUSED:
                tally.refused += 1
                await clients.pause_as_told(answer, at_most=1.0)
                continue
            answer.raise_for_status()
            offset = answer.json()["accepted_offset"]
            tally.rows[name] = database.execute("select count(*) from orders").fetchone()[0]
            database.execute("begin")
            database.executemany(
                "insert into orders (note) values (?)", [(os.urandom(300),) for _ in range(20)]
            )
            database.execute("commit")
            await asyncio.sleep(pause)
    finally:
        database.close()


async def _sample(client: httpx.AsyncClient, tally: Tally, until: float) -> None:
    while time.perf_counter() < until:
        tally.depths.append((await client.get("/admin/queue")).json()["pending"])
        await asyncio.sleep(SAMPLE_SECONDS)


async def _quiet(client: httpx.AsyncClient) -> list[dict]:
    """Every checkpoint, once none is at work any more."""
    await client.post("/admin/queue/drain")
    while (await client.get("/admin/queue")).json()["state"] != "drained":
        await asyncio.sleep(SAMPLE_SECONDS)
    jobs: list[dict] = []
    address = "/checkpoints?limit=1000"
    while True:
        page = (await client.get(address)).json()
        jobs += page["items"]
        if page["next_cursor"] is None:
            return jobs
        address = f"/checkpoints?limit=1000&cursor={page['next_cursor']}"


async def _lost(client: httpx.AsyncClient, tally: Tally, work: Path) -> int:
    lost = 0
    for name, expected in tally.expected.items():
        found = await clients.read_all(client, name)
        lost += sum(found.get(lsn) != record for lsn, record in expected.items())
    restored = work / "restored.db"
    for name, rows in tally.rows.items():
        answer = await client.get(f"{name}/image")
        answer.raise_for_status()
        restored.write_bytes(answer.content)
        database = sqlite3.connect(restored)
        try:
            assert database.execute("pragma integrity_check").fetchone() == ("ok",)
            lost += max(rows - database.execute("select count(*) from orders").fetchone()[0], 0)
        finally:
            database.close()
    return lost


def _seconds(job: dict) -> float:
    started, ended = (datetime.fromisoformat(job[name]) for name in ("started_at", "finished_at"))
    return (ended - started).total_seconds()
