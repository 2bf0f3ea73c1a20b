"""Many clients on many databases of one service, with checkpoints all the while.

Bounded in time (`--seconds`). It prints what was done and how long it took, and fails if an append
or a checkpoint failed, or if what reads back is not what was acknowledged.
"""

import argparse
import asyncio
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.load import clients
from benchmarks.load.table import Figure, exactly, percentile, told
from benchmarks.service import peak_rss_mib, service

TITLE = "Clients and databases of one service"


@dataclass(slots=True)
class Tally:
    appends: int = 0
    refused: int = 0
    append_seconds: list[float] = field(default_factory=list)
    checkpoints: int = 0
    checkpoint_seconds: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--databases", type=int, default=10)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20.0)


async def run(options: argparse.Namespace, work: Path) -> list[Figure]:
    tally = Tally()
    names = [f"/tenants/t{number % 7}/databases/log{number}" for number in range(options.databases)]
    expected: dict[str, dict[int, bytes]] = {name: {} for name in names}
    async with (
        service(work / "data", log_level="error") as (port, process),
        clients.connect(port, connections=options.clients + len(names) + 2) as client,
    ):
        for name in names:
            await clients.create(client, name)
        until = time.perf_counter() + options.seconds
        await asyncio.gather(
            *(
                _append(client, names[number % len(names)], expected, tally, until)
                for number in range(options.clients)
            ),
            *(_checkpoint(client, name, tally, until) for name in names),
        )
        wrong = 0
        for name in names:
            wrong += await clients.read_all(client, name) != expected[name]
        rss = peak_rss_mib(process)
    return [
        told("clients, databases", f"{options.clients} on {len(names)} for {options.seconds:g} s"),
        told("appends acknowledged", f"{tally.appends:,}"),
        told("appends a second", f"{tally.appends / options.seconds:,.0f}"),
        told("refused for back-pressure", f"{tally.refused:,}"),
        told("append p50 / p99", _percentiles(tally.append_seconds)),
        told("checkpoints completed", f"{tally.checkpoints:,}"),
        told("checkpoint p50 / p99", _percentiles(tally.checkpoint_seconds)),
        told("server's peak RSS", f"{rss:,.0f} MiB"),
        exactly("databases that read back wrong", wrong),
        exactly("problems", len(tally.problems)),
        *(told("problem", problem[:80]) for problem in tally.problems[:5]),
    ]


async def _append(
    client: httpx.AsyncClient,
    path: str,
    expected: dict[str, dict[int, bytes]],
    tally: Tally,
    until: float,
) -> None:
    payload = os.urandom(256)
    number = 0
    while time.perf_counter() < until:
        number += 1
        records = [number.to_bytes(8, "big") + payload] * 4
        started = time.perf_counter()
        answer = await clients.append(client, path, records)
        if answer.status_code in clients.REFUSED:
            tally.refused += 1
            await clients.pause_as_told(answer, at_most=5.0)
            continue
        if answer.status_code != 201:
            tally.problems.append(f"append: {answer.status_code} {answer.text}")
            return
        tally.append_seconds.append(time.perf_counter() - started)
        tally.appends += 1
        first = answer.json()["first_lsn"]
        expected[path].update({first + at: record for at, record in enumerate(records)})


async def _checkpoint(client: httpx.AsyncClient, path: str, tally: Tally, until: float) -> None:
    while time.perf_counter() < until:
        started = time.perf_counter()
        answer = await clients.trigger(client, path)
        job = await clients.ended(client, answer.json())
        if job["state"] != "completed":
            tally.problems.append(f"checkpoint: {job}")
            return
        tally.checkpoints += 1
        tally.checkpoint_seconds.append(time.perf_counter() - started)
        await asyncio.sleep(0.5)


def _percentiles(values: list[float]) -> str:
    return f"{percentile(values, 50) * 1000:,.1f} / {percentile(values, 99) * 1000:,.1f} ms"
