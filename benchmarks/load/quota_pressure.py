"""Fifty checkpoints at once against a quota that cannot hold them, while appends go on.

The quota is a fraction of what was written, so appends are refused (507, 429) and checkpoints
compete for what is left and for the drain reserve. Nothing may break: every acknowledged record
reads back, every checkpoint ends, and at the end the books agree with the disk to the byte.
"""

import argparse
import asyncio
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.load import clients
from benchmarks.load.table import Figure, at_most, exactly, percentile, told
from benchmarks.service import service

TITLE = "Concurrent checkpoints against too small a quota"
KIB, MIB = 1024, 1024 * 1024
TENANTS = 5
PATIENCE_SECONDS = 300.0


@dataclass(slots=True)
class Tally:
    expected: dict[str, dict[int, bytes]] = field(default_factory=dict)
    refused: dict[int, int] = field(default_factory=dict)
    retry_after: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--databases", type=int, default=50)
    parser.add_argument("--database-kib", type=int, default=1024, help="written to each")
    parser.add_argument("--quota-share", type=float, default=0.25, help="of all that is written")


async def run(options: argparse.Namespace, work: Path) -> list[Figure]:
    names = [
        f"/tenants/t{number % TENANTS}/databases/log{number}" for number in range(options.databases)
    ]
    total = options.databases * options.database_kib * KIB
    settings = {
        "quota_global_bytes": str(max(int(total * options.quota_share), MIB)),
        "drain_reserve_bytes": str(4 * MIB),
        "job_concurrency": "8",
        "job_backoff_base_seconds": "0.1",
        "job_backoff_cap_seconds": "2",
        "log_level": "error",
    }
    tally = Tally(expected={name: {} for name in names})
    async with (
        service(work / "data", **settings) as (port, process),
        clients.connect(port, connections=2 * options.databases + 2) as client,
    ):
        for name in names:
            await clients.create(client, name, compression="zstd", chunk_bytes=MIB)
        began = time.perf_counter()
        await asyncio.gather(*(_fill(client, name, options.database_kib, tally) for name in names))
        await asyncio.gather(*(_checkpoint(client, name, tally) for name in names))
        seconds = time.perf_counter() - began
        lost = await _lost(client, tally)
        report = (await client.post("/admin/janitor/run")).json()
        quota = (await client.get("/debug/storage/quota")).json()
        cached = (await client.get("/debug/cache")).json()["hot_cache"]["used_bytes"]
        wal = sum(path.stat().st_size for path in (work / "data" / "wal").rglob("*.wal"))
        found = await clients.findings(client)
        crashed = process.returncode is not None
    return [
        told("databases, quota", f"{len(names)}, {int(settings['quota_global_bytes']) >> 20} MiB"),
        told("written", f"{total / MIB:,.0f} MiB in {seconds:,.1f} s"),
        told("appends refused", ", ".join(f"{n:,} × {code}" for code, n in tally.refused.items())),
        told("Retry-After p50 / p99", f"{percentile(tally.retry_after, 50):.0f} / "
             f"{percentile(tally.retry_after, 99):.0f} s"),
        at_most("checkpoint p99", percentile(tally.seconds, 99), 60, unit="s"),
        exactly("crashes", int(crashed)),
        exactly("checkpoints that failed", len(tally.failed)),
        exactly("acknowledged records lost or wrong", lost),
        exactly("jobs that still hold room", len(quota["jobs"])),
        exactly("bytes used beyond files on disk", quota["global"]["used_bytes"] - wal - cached),
        exactly("quota corrected by reconciliation", report["quota_corrected"]),
        exactly("fsck findings", len(found)),
    ]  # fmt: skip


async def _fill(client: httpx.AsyncClient, name: str, kib: int, tally: Tally) -> None:
    """Appends until all is taken; a refusal is waited out, with checkpoints on the way."""
    left = kib
    until = time.perf_counter() + PATIENCE_SECONDS
    while left > 0 and time.perf_counter() < until:
        records = [os.urandom(16 * KIB) for _ in range(min(left, 64) // 16 or 1)]
        answer = await clients.append(client, name, records)
        if answer.status_code in clients.REFUSED:
            tally.refused[answer.status_code] = tally.refused.get(answer.status_code, 0) + 1
            tally.retry_after.append(float(answer.headers["Retry-After"]))
            await clients.pause_as_told(answer, at_most=1.0)
            continue
        answer.raise_for_status()
        first = answer.json()["first_lsn"]
        tally.expected[name].update({first + at: record for at, record in enumerate(records)})
        left -= 16 * len(records)
    if left > 0:
        tally.failed.append(f"{name}: {left} KiB were never taken")


async def _checkpoint(client: httpx.AsyncClient, name: str, tally: Tally) -> None:
    started = time.perf_counter()
    answer = await clients.trigger(client, name)
    while answer.status_code in clients.REFUSED:
        await clients.pause_as_told(answer, at_most=1.0)
        answer = await clients.trigger(client, name)
    job = await clients.ended(client, answer.json(), seconds=PATIENCE_SECONDS)
    tally.seconds.append(time.perf_counter() - started)
    if job["state"] != "completed":
        tally.failed.append(f"{name}: {job['state']} {job['error']}")


async def _lost(client: httpx.AsyncClient, tally: Tally) -> int:
    lost = 0
    for name, expected in tally.expected.items():
        found = await clients.read_all(client, name)
        lost += sum(found.get(lsn) != record for lsn, record in expected.items())
        lost += len(found.keys() - expected.keys())
    return lost
