"""Everything at once for as long as one likes, and whether anything grows that should not.

Two logs and two SQLite databases of a bounded size are written, checkpointed, truncated,
snapshotted, forked, verified, scanned, collected and followed. Memory, descriptors, tasks, the
manifest, its readers, scratch and quota are read all the time; their medians early and late are
compared. At the end all that was begun ends, and nothing may be left. A long one: --seconds 28800.
"""

import argparse
import asyncio
import os
import random
import sqlite3
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import httpx

from benchmarks.load import clients
from benchmarks.load.table import Figure, exactly, told
from benchmarks.service import service

TITLE = "Soak: does anything grow"
SAMPLE_SECONDS = 0.5
WARM_RATIO = 0.3
"""The first part of the time, in which caches fill and pools grow."""
KEPT_RECORDS = 600
FORKS_MAX = 4
SETTINGS = {
    "checkpoint_interval_seconds": "2",
    "gc_grace_seconds": "2",
    "gc_interval_seconds": "1",
    "hot_cache_bytes": str(8 * 1024 * 1024),
    "page_cache_bytes": str(4 * 1024 * 1024),
    "job_history_count": "200",
    "audit_log_count": "200",
    "change_history_count": "500",
    "manifest_backups_count": "1",
    "verify_interval_seconds": "5",
    "log_level": "error",
}
LOGS = ("/tenants/acme/databases/events", "/tenants/globex/databases/events")
PAGES = ("/tenants/acme/databases/main", "/tenants/globex/databases/main")

GROWTH: dict[str, tuple[float, float]] = {
    "memory MiB": (1.15, 40),
    "descriptors": (1.0, 12),
    "threads": (1.0, 16),
    "tasks": (1.0, 8),
    "manifest MiB": (1.25, 3),  # ended jobs are pruned every five minutes
    "readers": (1.0, 4),
    "scratch files": (1.0, 8),
    "quota MiB": (1.25, 10),
    "remote objects": (1.5, 300),
}
"""What a late median may be: so many times the early one, and so much more."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)


async def run(options: argparse.Namespace, work: Path) -> list[Figure]:
    data = work / "data"
    async with (
        service(data, **SETTINGS) as (port, process),
        clients.connect(port, connections=20) as client,
    ):
        soak = Soak(client, work, random.Random(options.seed))
        await soak.create()
        samples: list[dict[str, float]] = []
        until = time.perf_counter() + options.seconds
        tasks = [
            *(soak.append(name, until) for name in LOGS),
            *(soak.replace(name, until) for name in PAGES),
            soak.meddle(until),
            _sample(client, data, process.pid, samples, until),
        ]
        await asyncio.gather(*tasks)
        await soak.take_away()
        left = await _left(client, data)
        found = await clients.findings(client)
    return [
        told("done", ", ".join(f"{count:,} {what}" for what, count in soak.done.most_common())),
        *grown(samples),
        *(exactly(f"{what} left", count) for what, count in left.items()),
        exactly("records that read wrong", soak.wrong),
        exactly("fsck findings", len(found)),
    ]


def grown(samples: list[dict[str, float]]) -> list[Figure]:
    """Each median of the last third against that of the first after warming up."""
    steady = samples[int(len(samples) * WARM_RATIO) :]
    third = max(1, len(steady) // 3)
    figures = []
    for what, (times, more) in GROWTH.items():
        early = statistics.median(sample[what] for sample in steady[:third])
        late = statistics.median(sample[what] for sample in steady[-third:])
        limit = early * times + more
        figures.append(
            Figure(
                what=what,
                figure=f"{early:,.1f} → {late:,.1f}",
                target=f"≤ {limit:,.1f}",
                met=late <= limit,
            )
        )
    return figures


class Soak:
    def __init__(self, client: httpx.AsyncClient, work: Path, source: random.Random) -> None:
        self._client = client
        self._work = work
        self._source = source
        self._names = 0
        self._snapshots: list[str] = []
        self._forks: list[str] = []
        self.done: Counter[str] = Counter()
        self.wrong = 0

    async def create(self) -> None:
        for name in LOGS:
            await clients.create(self._client, name, chunk_bytes=65536, compression="zstd")
        for name in PAGES:
            await clients.create(self._client, name, engine="libsql", chunk_bytes=65536)
        for name in (*LOGS, *PAGES):
            retention = {"keep_seconds": 3, "minimum_generations": 1}
            await self._ask("PATCH", name, json={"retention": retention})
        await self._ask("PUT", "/change-cursors/soak", json={"from": "now"})

    async def append(self, name: str, until: float) -> None:
        """What is older than the newest records is truncated; a read now and then compares."""
        held: dict[int, bytes] = {}
        appends = 0
        while time.perf_counter() < until:
            records = [self._source.randbytes(self._source.choice([20, 900])) for _ in range(12)]
            answer = await clients.append(self._client, name, records)
            if answer.status_code in clients.REFUSED:
                await clients.pause_as_told(answer, at_most=1.0)
                continue
            answer.raise_for_status()
            first = answer.json()["first_lsn"]
            held.update({first + at: record for at, record in enumerate(records)})
            self.done["appends"] += 1
            appends += 1
            if appends % 25 == 0:
                held = {lsn: held[lsn] for lsn in sorted(held)[-KEPT_RECORDS:]}
                await self._truncate(name, min(held))
                lsn = self._source.choice(sorted(held))
                answer = await self._ask("GET", f"{name}/records?from_lsn={lsn}&limit=1")
                self.wrong += answer.content[4:] != held[lsn]
            await asyncio.sleep(0.02)

    async def _truncate(self, name: str, lsn: int) -> None:
        _, _, tenant, _, database = name.split("/")
        body = {"tenant": tenant, "database": database, "direction": "head", "lsn": lsn}
        await self._ask("POST", "/truncations", json=body, ok=(202, 410, 422))
        self.done["truncations"] += 1

    async def replace(self, name: str, until: float) -> None:
        """An image of a SQLite file of which some rows changed."""
        file = self._work / name.strip("/").replace("/", "-")
        with closing(sqlite3.connect(file, isolation_level=None)) as database:
            database.execute("create table if not exists t (id integer primary key, note blob)")
            database.execute("begin")
            for row in range(600):
                database.execute("insert into t values (?, ?)", (row, self._source.randbytes(400)))
            database.execute("commit")
            while time.perf_counter() < until:
                for row in self._source.sample(range(600), 5):
                    note = self._source.randbytes(400)
                    database.execute("update t set note = ? where id = ?", (note, row))
                image = await asyncio.to_thread(file.read_bytes)
                answer = await self._ask(
                    "PUT", f"{name}/image", content=image, ok=(200, *clients.REFUSED)
                )
                if answer.status_code == 200:
                    self.done["images"] += 1
                    shown = await self._ask("GET", f"{name}/image")
                    self.wrong += shown.content != image
                await asyncio.sleep(0.1)

    async def meddle(self, until: float) -> None:
        steps: list[Callable[[str], Awaitable[None]]] = [
            self._checkpoint, self._snapshot, self._fork, self._scan, self._verify, self._download,
            self._follow, self._collect, self._back_up, self._look,
        ]  # fmt: skip
        while time.perf_counter() < until:
            step = self._source.choice(steps)
            await step(self._source.choice([*LOGS, *PAGES]))
            self.done[step.__name__.strip("_")] += 1
            await asyncio.sleep(0.05)

    async def take_away(self) -> None:
        """Forks and snapshots go, and everything that was begun ends."""
        await self._thin(self._snapshots, 0)
        await self._thin(self._forks, 0)
        await self._ask("DELETE", "/change-cursors/soak", ok=(204,))
        for name in (*LOGS, *PAGES):
            answer = await clients.trigger(self._client, name)
            await clients.ended(self._client, answer.json())
        while (await self._ask("GET", "/debug/checkpoint/active_jobs")).json()["items"]:
            await asyncio.sleep(SAMPLE_SECONDS)

    # --- one thing at a time

    async def _checkpoint(self, name: str) -> None:
        answer = await clients.trigger(self._client, name)
        await clients.ended(self._client, answer.json(), seconds=10)

    async def _snapshot(self, name: str) -> None:
        self._names += 1
        body = {"name": f"s{self._names}"}
        answer = await self._ask("POST", f"{name}/snapshots", json=body, ok=(201, 409))
        if answer.status_code == 201:
            self._snapshots.append(f"{name}/snapshots/s{self._names}")
        await self._thin(self._snapshots, FORKS_MAX)

    async def _fork(self, name: str) -> None:
        self._names += 1
        _, _, tenant, _, _ = name.split("/")
        body = {"database": f"f{self._names}"}
        answer = await self._ask("POST", f"{name}/forks", json=body, ok=(201, 409))
        if answer.status_code == 201:
            self._forks.append(f"/tenants/{tenant}/databases/f{self._names}")
        await self._thin(self._forks, FORKS_MAX)

    async def _thin(self, urls: list[str], most: int) -> None:
        while len(urls) > most:
            await self._ask("DELETE", urls.pop(0), ok=(202, 204))

    async def _scan(self, name: str) -> None:
        _, _, tenant, _, database = name.split("/")
        query = f"tenant={tenant}&database={database}"
        await self._ask("GET", f"/cold-scan?{query}", ok=(200, 409, 410))

    async def _verify(self, name: str) -> None:
        await self._generation_job("/admin/verifications", name)

    async def _download(self, name: str) -> None:
        await self._generation_job("/admin/downloads", name)

    async def _generation_job(self, url: str, name: str) -> None:
        _, _, tenant, _, database = name.split("/")
        body = {"tenant": tenant, "database": database}
        await self._ask("POST", url, json=body, ok=(202, 409, 410))

    async def _follow(self, name: str) -> None:
        del name
        page = (await self._ask("GET", "/changes?cursor=soak&limit=100")).json()
        if items := page["items"]:
            body = {"sequence": items[-1]["sequence"]}
            await self._ask("POST", "/change-cursors/soak/ack", json=body)

    async def _collect(self, name: str) -> None:
        del name
        await self._ask("POST", "/admin/gc/run", json={})

    async def _back_up(self, name: str) -> None:
        del name
        await self._ask("POST", "/admin/manifest/backup", ok=(200, 201))

    async def _look(self, name: str) -> None:
        for url in (name, f"{name}/generations", "/metrics", "/debug/wal", "/admin/audit"):
            await self._ask("GET", url)

    async def _ask(
        self, method: str, url: str, *, ok: tuple[int, ...] = (), **options: object
    ) -> httpx.Response:
        answer = await self._client.request(method, url, **options)
        if answer.status_code not in (ok or (200, 201)):
            raise RuntimeError(f"{method} {url}: {answer.status_code} {answer.text}")
        return answer


async def _sample(
    client: httpx.AsyncClient, data: Path, pid: int, samples: list[dict[str, float]], until: float
) -> None:
    while time.perf_counter() < until:
        samples.append(await sample(client, data, pid))
        await asyncio.sleep(SAMPLE_SECONDS)


async def sample(client: httpx.AsyncClient, data: Path, pid: int) -> dict[str, float]:
    status = dict(
        line.split(":", 1)
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if ":" in line
    )
    manifest = (await client.get("/debug/manifest/stats")).json()
    quota = (await client.get("/debug/storage/quota")).json()
    metrics = (await client.get("/metrics")).text.splitlines()
    tasks = next(line for line in metrics if line.startswith("event_loop_tasks "))
    return {
        "memory MiB": int(status["VmRSS"].split()[0]) / 1024,
        "descriptors": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "threads": int(status["Threads"]),
        "tasks": float(tasks.split()[1]),
        "manifest MiB": manifest["used_bytes"] / (1 << 20),
        "readers": manifest["readers"],
        "scratch files": _files(data / "checkpoint_scratch"),
        "quota MiB": quota["global"]["used_bytes"] / (1 << 20),
        "remote objects": _files(data / "remote"),
    }


async def _left(client: httpx.AsyncClient, data: Path) -> dict[str, int]:
    leases = (await client.get("/debug/checkpoint/leases")).json()["items"]
    quota = (await client.get("/debug/storage/quota")).json()
    return {
        "leases": len(leases),
        "reservations of jobs": len(quota["jobs"]),
        "scratch": _files(data / "checkpoint_scratch"),
    }


def _files(path: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(path))
