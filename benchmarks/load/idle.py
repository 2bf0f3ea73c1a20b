"""A thousand databases at rest: what do they cost?

Each has taken an append and was checkpointed by the timer. Then nothing happens for a while: CPU
time of the process, and requests to its S3 store, which is a real one.
"""

import argparse
import asyncio
import os
import re
from pathlib import Path

import httpx

from benchmarks.load import clients
from benchmarks.load.table import Figure, at_most, exactly, told
from benchmarks.service import cpu_seconds, service
from tests.helpers.seaweed import SeaweedS3

TITLE = "Idle databases"
TENANTS = 20
_REQUESTS = re.compile(r"^remote_requests_total\{[^}]*\} (\S+)$", re.MULTILINE)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--databases", type=int, default=1000)
    parser.add_argument("--interval", type=int, default=10, help="seconds between checkpoints")
    parser.add_argument("--seconds", type=float, default=60.0, help="at rest")


async def run(options: argparse.Namespace, work: Path) -> list[Figure]:
    names = [
        f"/tenants/t{number % TENANTS}/databases/db{number}" for number in range(options.databases)
    ]
    with SeaweedS3.running(work / "seaweed") as seaweed:
        os.environ.update(seaweed.environment())
        settings = {
            "remote_url": f"s3://{seaweed.bucket()}/idle",
            "s3_endpoint_url": seaweed.endpoint,
            "s3_region": seaweed.region,
            "checkpoint_interval_seconds": str(options.interval),
            "log_level": "error",
        }
        async with (
            service(work / "data", **settings) as (port, process),
            clients.connect(port, connections=4) as client,
        ):
            for name in names:
                await clients.create(client, name)
                (await clients.append(client, name, [b"one"])).raise_for_status()
            await _settled(client)
            before = await _requests(client), cpu_seconds(process)
            await asyncio.sleep(options.seconds)
            after = await _requests(client), cpu_seconds(process)
    busy = 100 * (after[1] - before[1]) / options.seconds
    return [
        told("databases", f"{len(names):,}, interval {options.interval} s"),
        told("requests while they had something to publish", f"{before[0]:,.0f}"),
        at_most(f"CPU over {options.seconds:g} s", busy, 2.0, unit="% of a core", digits=2),
        exactly("requests to S3 at rest", round(after[0] - before[0])),
    ]


async def _settled(client: httpx.AsyncClient) -> None:
    """All WAL is published and gone."""
    while float(_metric(await _metrics(client), "wal_bytes")) > 0:
        await asyncio.sleep(1)


async def _metrics(client: httpx.AsyncClient) -> str:
    return (await client.get("/metrics")).text


async def _requests(client: httpx.AsyncClient) -> float:
    return sum(float(value) for value in _REQUESTS.findall(await _metrics(client)))


def _metric(text: str, name: str) -> str:
    found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    assert found is not None, name
    return found[1]
