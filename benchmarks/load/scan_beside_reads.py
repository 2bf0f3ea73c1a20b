"""A throttled cold scan over many chunks while pages are read: does anyone notice?

Foreground clients read pages of a warm set, first alone and then beside the scan. The scan keeps to
its ceiling, the caches stay as they are, and the readers' 99th percentile at most doubles.
At full size: --chunks 1000 --chunk-mib 10 --rate-mib 400 --seconds 30.
"""

import argparse
import asyncio
import os
import random
import re
import time
from collections.abc import Awaitable
from pathlib import Path

import httpx

from benchmarks.cold_scans import PAGE, PATH, SCAN, publish, read_scan
from benchmarks.load import clients
from benchmarks.load.table import Figure, at_most, exactly, percentile, told
from benchmarks.service import service
from tests.helpers.seaweed import SeaweedS3

TITLE = "A cold scan beside foreground reads"
MIB = 1024 * 1024
WARM_PAGES = 2000
_COLD = re.compile(r'^remote_bytes_read_total\{mode="cold"\} (\S+)$', re.MULTILINE)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chunks", type=int, default=1000)
    parser.add_argument("--chunk-mib", type=float, default=0.0625, help="a power of two")
    parser.add_argument("--rate-mib", type=float, default=4.0, help="the scan's ceiling, a second")
    parser.add_argument("--readers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=8.0, help="of reading without a scan")


async def run(options: argparse.Namespace, work: Path) -> list[Figure]:
    chunk_bytes, rate = int(options.chunk_mib * MIB), int(options.rate_mib * MIB)
    size = options.chunks * chunk_bytes
    with SeaweedS3.running(work / "seaweed") as seaweed:
        os.environ.update(seaweed.environment())
        settings = {
            "remote_url": f"s3://{seaweed.bucket()}/load",
            "s3_endpoint_url": seaweed.endpoint,
            "s3_region": seaweed.region,
            "log_level": "error",
        }
        async with (
            service(work / "data", **settings) as (port, _),
            clients.connect(port, connections=options.readers + 2) as client,
        ):
            await publish(port, size, chunk_bytes=chunk_bytes)
            warm = random.Random(5).sample(range(1, size // PAGE), min(WARM_PAGES, size // PAGE))
            for page in warm:
                await _read(client, page)
            alone = await _foreground(client, warm, options.readers, asyncio.sleep(options.seconds))
            caches, cold = await _caches(client), await _cold_bytes(client)
            scan = asyncio.ensure_future(
                read_scan(port, f"{SCAN}&max_bytes_per_second={rate}", at_least=size)
            )
            beside = await _foreground(client, warm, options.readers, scan)
            seconds, read = scan.result(), await _cold_bytes(client) - cold
            changed = sum(a != b for a, b in zip(caches, await _caches(client), strict=True))
    p99 = [percentile(latencies, 99) for latencies in (alone, beside)]
    return [
        told("scanned", f"{options.chunks:,} chunks, {size / MIB:,.0f} MiB in {seconds:,.1f} s"),
        told("page reads without and with the scan", f"{len(alone):,}, {len(beside):,}"),
        told("p99 without and with it", f"{p99[0] * 1000:,.1f}, {p99[1] * 1000:,.1f} ms"),
        at_most("bytes a second ÷ the ceiling", read / seconds / rate, 1.1, digits=3),
        at_most("the ceiling ÷ bytes a second", rate / (read / seconds), 1.1, digits=3),
        exactly("figures of the caches that the scan changed", changed),
        at_most("p99 with the scan ÷ without", p99[1] / p99[0], 2.0, digits=2),
    ]


async def _foreground(
    client: httpx.AsyncClient, pages: list[int], readers: int, until: Awaitable[object]
) -> list[float]:
    """Latencies of reads that go on until something else ends."""
    latencies: list[float] = []

    async def read(seed: int) -> None:
        source = random.Random(seed)
        while True:
            began = time.perf_counter()
            await _read(client, source.choice(pages))
            latencies.append(time.perf_counter() - began)

    tasks = [asyncio.ensure_future(read(seed)) for seed in range(readers)]
    await until
    for task in tasks:
        task.cancel()
    for ended in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(ended, Exception):
            raise ended
    return latencies


async def _read(client: httpx.AsyncClient, page: int) -> None:
    (await client.get(f"{PATH}/pages/{page}?generation=1")).raise_for_status()


async def _caches(client: httpx.AsyncClient) -> list[int]:
    """What a scan must not change, while foreground reads count up hits."""
    report = (await client.get("/debug/cache")).json()
    return [
        report[cache][figure]
        for cache in ("page_cache", "hot_cache")
        for figure in ("used_bytes", "entries", "misses")
    ]


async def _cold_bytes(client: httpx.AsyncClient) -> float:
    found = _COLD.search((await client.get("/metrics")).text)
    return float(found[1]) if found else 0.0
