"""Durable appends: large ones against disk and bare drain, small ones against a bare route."""

import os
import time
from pathlib import Path

import httpx

from app.core.formats.record_framing import pack_records
from benchmarks.http_load import post, run_load
from benchmarks.report import Result, at_least
from benchmarks.service import free_port, running, service
from benchmarks.turns import Side, against_bare, bare_api, in_turn

MIB = 1024 * 1024
RECORDS = "application/vnd.bop.records"
PATH = "/tenants/bench/databases/log/records"
ROUNDS = 4


async def large(work: Path, *, appends: int = 160, connections: int = 4) -> Result:
    """16 MiB appends of 4 KiB records; more than 2 GiB in all, so that the disk's burst is past."""
    record = os.urandom(4092)
    body = pack_records([record] * (16 * MIB // 4096))
    request = post(PATH, body, content_type=RECORDS)
    total_mib = appends * len(body) / MIB
    raw = _raw_write(work / "raw", body, appends)
    port = free_port()
    async with running("-m", "benchmarks.bare_app", "drain", str(port), port=port):
        drained = await run_load(port, request, connections=connections, requests=appends)
    async with service(work / "large", wal_budget_bytes=str(16 << 30)) as (port, _):
        await _create(port)
        ours = await run_load(port, request, connections=connections, requests=appends)
    if ours.failures:
        raise RuntimeError(f"{ours.failures} appends failed")
    ceiling = min(total_mib / drained.seconds, raw)
    return at_least(
        "durable 16 MiB appends ÷ min(bare ASGI drain, raw write + fdatasync)",
        measured=total_mib / ours.seconds, ceiling=ceiling, unit="MiB/s", target=0.7,
    )  # fmt: skip


async def small(work: Path, *, seconds: float = 6.0, connections: int = 64) -> Result:
    """200-byte records, one a request, one database."""
    body = pack_records([os.urandom(200)])
    request = post(PATH, body, content_type=RECORDS)
    async with bare_api() as bare, service(work / "small") as (port, process):
        await _create(port)
        taken = await in_turn(
            {"bare": bare, "ours": Side(port=port, process=process)},
            request, connections=connections, rounds=ROUNDS, seconds=seconds / ROUNDS,
        )  # fmt: skip
    return against_bare(
        "64 clients' small durable appends ÷ the same POST on a bare FastAPI route",
        taken, target=0.5,
    )  # fmt: skip


async def _create(port: int) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        answer = await client.put("/tenants/bench/databases/log", json={"engine": "append_only"})
        answer.raise_for_status()


def _raw_write(path: Path, body: bytes, count: int) -> float:
    """MiB/s of write + fdatasync of the same bodies into files of a chunk each."""
    path.mkdir(parents=True)
    started = time.perf_counter()
    fd = -1
    for number in range(count):
        if number % 4 == 0:
            if fd >= 0:
                os.close(fd)
            fd = os.open(path / f"{number}", os.O_WRONLY | os.O_CREAT, 0o600)
        os.write(fd, body)
        os.fdatasync(fd)
    os.close(fd)
    return count * len(body) / MIB / (time.perf_counter() - started)
