"""A checkpoint of 16 × 64 MiB to SeaweedFS against raw PUTs of the same files, and its memory."""

import asyncio
import os
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx

from app.core.base.tasks import BlockingPool
from app.core.formats.crc64 import crc64, encode_crc64
from app.core.formats.record_framing import pack_records
from app.core.stores.remote.s3_body import FileStream
from app.core.stores.remote.s3_client import S3Options, open_client
from benchmarks.http_load import post, run_load
from benchmarks.report import Result, at_least, at_most
from benchmarks.service import cpu_seconds, peak_rss_mib, service
from tests.helpers.seaweed import SeaweedS3

MIB = 1024 * 1024
CHUNKS = 16
UPLOADS = 4
ROUNDS = 3
RSS_LIMIT_MIB = 250.0


async def sixteen_chunks(work: Path) -> list[Result]:
    with SeaweedS3.running(work / "seaweed") as seaweed:
        bucket = seaweed.bucket()
        files = [_chunk_file(work / f"raw-{number}", number) for number in range(CHUNKS)]
        raw, ours, rss = [], [], 0.0
        for round_ in range(ROUNDS):  # in turn: the store's mood is shared
            raw.append(await _raw_puts(seaweed, bucket, files, round_=round_))
            taken, peak = await _service_checkpoint(work / f"round-{round_}", seaweed, bucket)
            ours.append(taken)
            rss = max(rss, peak)
    size = CHUNKS * 64
    cpu = [min(taken.cpu_seconds for taken in side) for side in (ours, raw)]
    return [
        at_least(
            "checkpoint of 16 × 64 MiB ÷ raw aiobotocore PUTs of the same size",
            measured=size / min(taken.seconds for taken in ours),
            ceiling=size / min(taken.seconds for taken in raw), unit="MiB/s", target=0.85,
            notes=(f"{cpu[0]:.1f} s CPU", f"{cpu[1]:.1f} s CPU"),
        ),
        at_most(
            "peak RSS of the server while checkpointing 16 chunks",
            measured=rss, limit=RSS_LIMIT_MIB, unit="MiB",
        ),
    ]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Taken:
    """For all chunks; the CPU time is that of the process that uploads."""

    seconds: float
    cpu_seconds: float


async def _service_checkpoint(work: Path, seaweed: SeaweedS3, bucket: str) -> tuple[_Taken, float]:
    """From the job's start to its end, and the server's peak RSS in MiB."""
    settings = {
        "remote_url": f"s3://{bucket}/{work.name}",
        "s3_endpoint_url": seaweed.endpoint,
        "s3_region": seaweed.region,
        "wal_budget_bytes": str(16 << 30),
        "upload_concurrency": str(UPLOADS),
    }
    os.environ.update(seaweed.environment())
    async with service(work / "service", **settings) as (port, process):
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            (await client.put("/tenants/bench/databases/log", json={"engine": "append_only"}))
            for number in range(CHUNKS * 4):
                body = pack_records([os.urandom(4092)] * (16 * MIB // 4096 - 8))
                outcome = await run_load(
                    port,
                    post(
                        "/tenants/bench/databases/log/records", body,
                        content_type="application/vnd.bop.records",
                    ),
                    connections=1, requests=1,
                )  # fmt: skip
                if outcome.failures:
                    raise RuntimeError(f"append {number} failed")
            started, cpu = time.perf_counter(), cpu_seconds(process)
            answer = await client.post("/checkpoints", json={"tenant": "bench", "database": "log"})
            job = answer.json()
            while job["state"] in ("pending", "in_flight"):
                job = (await client.get(f"/checkpoints/{job['id']}?wait=30")).json()
            seconds, cpu = time.perf_counter() - started, cpu_seconds(process) - cpu
            if job["state"] != "completed":
                raise RuntimeError(f"the checkpoint ended as {job['state']}: {job['error']}")
            uploaded = job["result"]["bytes_uploaded"]
            if uploaded < (CHUNKS - 1) * 64 * MIB:
                raise RuntimeError(f"only {uploaded} bytes were uploaded")
            share = CHUNKS * 64 * MIB / uploaded
            taken = _Taken(seconds=seconds * share, cpu_seconds=cpu * share)
            return taken, peak_rss_mib(process)


def _chunk_file(path: Path, number: int) -> Path:
    path.write_bytes(os.urandom(MIB) * 63 + bytes([number]) * MIB)
    return path


async def _raw_puts(seaweed: SeaweedS3, bucket: str, files: list[Path], *, round_: int) -> _Taken:
    """aiobotocore alone: the same body object and checksum header, as many at once."""
    gate = asyncio.Semaphore(UPLOADS)
    os.environ.update(seaweed.environment())
    pool = BlockingPool("bench", threads=UPLOADS)
    async with AsyncExitStack() as stack:
        stack.callback(pool.close_blocking)
        client = await open_client(
            stack,
            S3Options(bucket=bucket, endpoint_url=seaweed.endpoint, region=seaweed.region),
        )
        checksums = {path: crc64(path.read_bytes()) for path in files}

        async def put(path: Path) -> None:
            async with gate:
                fd = os.open(path, os.O_RDONLY)
                try:
                    size = path.stat().st_size
                    await client.put_object(
                        Bucket=bucket,
                        Key=f"raw-{round_}/{path.name}",
                        Body=FileStream(fd, first=0, length=size, pool=pool, progress=()),
                        ContentLength=size,
                        ChecksumCRC64NVME=encode_crc64(checksums[path]),
                    )
                finally:
                    os.close(fd)

        started, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(put(path) for path in files))
        return _Taken(seconds=time.perf_counter() - started, cpu_seconds=time.process_time() - cpu)
