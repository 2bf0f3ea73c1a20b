"""Cold scans of a generation on SeaweedFS against raw ranged GETs of the same bytes, and what a
long scan does to the server's memory.

`BOP_BENCH_SCAN_MIB` is the database's size (512), `BOP_BENCH_SCANNED_MIB` how much is scanned in
all while memory is watched (1,024; 10,240 at full size).
"""

import asyncio
import os
import time
from contextlib import AsyncExitStack
from pathlib import Path

import httpx

from app.core.base.tasks import for_each
from app.core.stores.remote.s3_client import S3Options, open_client
from benchmarks.bucket import objects
from benchmarks.report import Result, at_least, at_most
from benchmarks.service import service
from tests.helpers.seaweed import SeaweedS3

MIB = 1024 * 1024
PAGE = 4096
GETS_AT_ONCE = 8
RSS_GROWTH_MIB = 32.0
PATH = "/tenants/bench/databases/app"
SCAN = "/cold-scan?tenant=bench&database=app"


async def cold_scans(work: Path) -> list[Result]:
    size = int(os.environ.get("BOP_BENCH_SCAN_MIB", "512")) * MIB
    scanned = int(os.environ.get("BOP_BENCH_SCANNED_MIB", "1024")) * MIB
    with SeaweedS3.running(work / "seaweed") as seaweed:
        os.environ.update(seaweed.environment())
        bucket = seaweed.bucket()
        settings = {
            "remote_url": f"s3://{bucket}/scans",
            "s3_endpoint_url": seaweed.endpoint,
            "s3_region": seaweed.region,
            "cold_scan_bytes_per_second": "0",
            "hot_cache_bytes": "0",
        }
        async with service(work / "service", **settings) as (port, process):
            await publish(port, size)
            keys = {
                key: bytes_ for (key, _), bytes_ in (await objects(seaweed, bucket)).items()
                if key.endswith(".blob")
            }  # fmt: skip
            raw, ours = [], []
            for _ in range(2):  # both twice, in turn: the store's mood is shared
                raw.append(await _raw_gets(seaweed, bucket, keys))
                ours.append(await read_scan(port, SCAN, at_least=size))
            rss = [resident_mib(process.pid)]
            done = 0
            while done < scanned:
                sampler = asyncio.ensure_future(_sample(process.pid, rss))
                await read_scan(port, SCAN, at_least=size)
                sampler.cancel()
                done += size
    mib = size / MIB
    return [
        at_least(
            f"a cold scan of {mib:,.0f} MiB ÷ raw aiobotocore ranged GETs of the same bytes",
            measured=mib / min(ours), ceiling=mib / min(raw), unit="MiB/s", target=0.6,
        ),
        at_most(
            f"growth of the server's RSS while {done / MIB:,.0f} MiB are scanned",
            measured=max(rss) - rss[0], limit=RSS_GROWTH_MIB, unit="MiB",
        ),
    ]  # fmt: skip


async def publish(port: int, size: int, **fields: object) -> None:
    """A libsql database whose pages are random, so that stored bytes are its bytes."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
        body = {"engine": "libsql", "page_size": PAGE, "compression": "none", **fields}
        (await client.put(PATH, json=body)).raise_for_status()
        (await client.put(f"{PATH}/image", content=_image(size))).raise_for_status()
        answer = await client.post("/checkpoints", json={"tenant": "bench", "database": "app"})
        job = answer.raise_for_status().json()
        while job["state"] in {"pending", "in_flight"}:
            job = (await client.get(f"/checkpoints/{job['id']}?wait=60")).json()
        if job["state"] != "completed":
            raise RuntimeError(f"the checkpoint failed: {job['error']}")


async def _image(size: int):
    head = bytearray(PAGE)
    head[:16] = b"SQLite format 3\0"
    head[16:18] = PAGE.to_bytes(2, "big")
    head[18:24] = bytes((2, 2, 0, 64, 32, 32))
    head[24:28] = head[92:96] = (1).to_bytes(4, "big")
    head[28:32] = (size // PAGE).to_bytes(4, "big")
    yield bytes(head)
    for at in range(PAGE, size, MIB):
        yield os.urandom(min(MIB, size - at))


async def read_scan(port: int, path: str, *, at_least: int) -> float:
    """Seconds until the whole answer was read, by a client that only counts."""
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4 * MIB)
    request = f"GET {path} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n"
    writer.write(request.encode())
    read, tail = 0, b""
    while piece := await reader.read(MIB):
        read += len(piece)
        tail = (tail + piece[-256:])[-256:]
    writer.close()
    if read < at_least or b'"chunks"' not in tail:
        raise RuntimeError(f"{read} bytes of a scan, which ends in {tail!r}")
    return time.perf_counter() - began


async def _raw_gets(seaweed: SeaweedS3, bucket: str, keys: dict[str, int]) -> float:
    ranges = [
        (key, first, min(MIB, size - first))
        for key, size in sorted(keys.items())
        for first in range(0, size, MIB)
    ]
    async with AsyncExitStack() as stack:
        client = await open_client(
            stack,
            S3Options(bucket=bucket, endpoint_url=seaweed.endpoint, region=seaweed.region),
        )

        async def read(one: tuple[str, int, int]) -> int:
            key, first, length = one
            answer = await client.get_object(
                Bucket=bucket, Key=key, Range=f"bytes={first}-{first + length - 1}"
            )
            async with answer["Body"] as body:
                return len(await body.read())

        began = time.perf_counter()
        got = await for_each(ranges, read, limit=GETS_AT_ONCE)
        seconds = time.perf_counter() - began
    if sum(got) != sum(keys.values()):
        raise RuntimeError("raw GETs gave other bytes than the listing says")
    return seconds


async def _sample(pid: int, rss: list[float]) -> None:
    while True:
        rss.append(resident_mib(pid))
        await asyncio.sleep(0.05)


def resident_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS")
