"""`make load`: many clients on many databases of one service, with checkpoints all the while.

Bounded in time (`--seconds`). It prints what was done and how long it took, and fails if an append
or a checkpoint failed, or if what reads back is not what was acknowledged.
"""

import argparse
import asyncio
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from app.core.formats.record_framing import pack_records, unpack_records
from benchmarks.service import peak_rss_mib, service

RECORDS = "application/vnd.bop.records"


@dataclass(slots=True)
class Tally:
    appends: int = 0
    records: int = 0
    bytes: int = 0
    refused: int = 0
    append_seconds: list[float] = field(default_factory=list)
    checkpoints: int = 0
    checkpoint_seconds: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


async def load(*, databases: int, clients: int, seconds: float, work: Path) -> Tally:
    tally = Tally()
    until = time.perf_counter() + seconds
    async with service(work / "data", log_level="error") as (port, process):
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            timeout=60,
            limits=httpx.Limits(max_connections=clients + databases + 2),
        ) as client:
            names = [f"/tenants/t{number % 7}/databases/log{number}" for number in range(databases)]
            for name in names:
                answer = await client.put(name, json={"engine": "append_only"})
                answer.raise_for_status()
            expected: dict[str, dict[int, bytes]] = {name: {} for name in names}
            await asyncio.gather(
                *(
                    _append(client, names[number % databases], expected, tally, until)
                    for number in range(clients)
                ),
                *(_checkpoint(client, name, tally, until) for name in names),
            )
            for name in names:
                await _read_back(client, name, expected[name], tally)
        rss = peak_rss_mib(process)
    _show(tally, databases=databases, clients=clients, seconds=seconds, rss_mib=rss)
    return tally


async def _append(client, path, expected, tally, until) -> None:
    payload = os.urandom(256)
    number = 0
    while time.perf_counter() < until:
        number += 1
        records = [number.to_bytes(8, "big") + payload] * 4
        body = pack_records(records)
        started = time.perf_counter()
        answer = await client.post(
            f"{path}/records", content=body, headers={"Content-Type": RECORDS}
        )
        if answer.status_code in (429, 507):
            tally.refused += 1
            await asyncio.sleep(float(answer.headers.get("Retry-After", "1")))
            continue
        if answer.status_code != 201:
            tally.problems.append(f"append: {answer.status_code} {answer.text[:200]}")
            return
        tally.append_seconds.append(time.perf_counter() - started)
        tally.appends += 1
        tally.records += len(records)
        tally.bytes += len(body)
        first = answer.json()["first_lsn"]
        expected[path].update({first + at: record for at, record in enumerate(records)})


async def _checkpoint(client, path, tally, until) -> None:
    _, _, tenant, _, database = path.split("/")
    while time.perf_counter() < until:
        started = time.perf_counter()
        answer = await client.post("/checkpoints", json={"tenant": tenant, "database": database})
        job = answer.json()
        while job.get("state") in ("pending", "in_flight"):
            job = (await client.get(f"/checkpoints/{job['id']}?wait=30")).json()
        if job.get("state") != "completed":
            tally.problems.append(f"checkpoint: {job}")
            return
        tally.checkpoints += 1
        tally.checkpoint_seconds.append(time.perf_counter() - started)
        await asyncio.sleep(0.5)


async def _read_back(client, path, expected, tally) -> None:
    lsn, found = 1, 0
    while True:
        answer = await client.get(f"{path}/records?from_lsn={lsn}")
        records = unpack_records(answer.content)
        if not records:
            break
        for at, record in enumerate(records):
            if expected.get(lsn + at) != record:
                tally.problems.append(f"{path}: LSN {lsn + at} reads back wrong")
                return
        found += len(records)
        lsn = int(answer.headers["Bop-Next-Lsn"])
    if found != len(expected):
        tally.problems.append(f"{path}: {found} of {len(expected)} records read back")


def _show(tally: Tally, *, databases: int, clients: int, seconds: float, rss_mib: float) -> None:
    table = Table(title=f"{clients} clients on {databases} databases for {seconds:.0f} s")
    table.add_column("what")
    table.add_column("figure", justify="right")
    rows = [
        ("appends acknowledged", f"{tally.appends:,}"),
        ("appends a second", f"{tally.appends / seconds:,.0f}"),
        ("refused for back-pressure", f"{tally.refused:,}"),
        ("append p50 / p99", _percentiles(tally.append_seconds)),
        ("checkpoints completed", f"{tally.checkpoints:,}"),
        ("checkpoint p50 / p99", _percentiles(tally.checkpoint_seconds)),
        ("records read back", f"{tally.records:,}"),
        ("server's peak RSS", f"{rss_mib:,.0f} MiB"),
        ("problems", f"{len(tally.problems)}"),
    ]
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    for problem in tally.problems[:10]:
        console.print(problem, style="red", markup=False)


def _percentiles(values: list[float]) -> str:
    if len(values) < 2:
        return "-"
    cuts = statistics.quantiles(values, n=100)
    return f"{cuts[49] * 1000:,.1f} / {cuts[98] * 1000:,.1f} ms"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load")
    parser.add_argument("--databases", type=int, default=10)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20.0)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="bop-bench-", dir=Path.cwd()))
    try:
        tally = asyncio.run(
            load(
                databases=arguments.databases,
                clients=arguments.clients,
                seconds=arguments.seconds,
                work=work,
            )
        )
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return 1 if tally.problems or not tally.appends else 0


if __name__ == "__main__":
    sys.exit(main())
