"""What the scenarios do with a service."""

import asyncio
import time

import httpx

from app.core.formats.record_framing import pack_records, unpack_records

RECORDS = "application/vnd.bop.records"
REFUSED = frozenset({429, 507})


def connect(port: int, *, connections: int) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}",
        timeout=120,
        # Below the server's 5 s, or a request may meet a connection that is just being closed.
        limits=httpx.Limits(max_connections=connections, keepalive_expiry=2.0),
    )


async def create(client: httpx.AsyncClient, path: str, **fields: object) -> None:
    answer = await client.put(path, json={"engine": "append_only", **fields})
    answer.raise_for_status()


async def append(client: httpx.AsyncClient, path: str, records: list[bytes]) -> httpx.Response:
    return await client.post(
        f"{path}/records", content=pack_records(records), headers={"Content-Type": RECORDS}
    )


async def trigger(client: httpx.AsyncClient, path: str) -> httpx.Response:
    _, _, tenant, _, database = path.split("/")
    return await client.post("/checkpoints", json={"tenant": tenant, "database": database})


async def ended(client: httpx.AsyncClient, job: dict, *, seconds: float = 600) -> dict:
    until = time.perf_counter() + seconds
    while job["state"] in ("pending", "in_flight") and time.perf_counter() < until:
        answer = await client.get(f"/jobs/{job['id']}?wait=30")
        answer.raise_for_status()
        job = answer.json()
    return job


async def read_all(client: httpx.AsyncClient, path: str) -> dict[int, bytes]:
    """Every record by its LSN."""
    found: dict[int, bytes] = {}
    lsn = 1
    while True:
        answer = await client.get(f"{path}/records?from_lsn={lsn}")
        answer.raise_for_status()
        records = unpack_records(answer.content)
        if not records:
            return found
        first = int(answer.headers["Bop-First-Lsn"])
        found.update({first + at: record for at, record in enumerate(records)})
        lsn = int(answer.headers["Bop-Next-Lsn"])


async def findings(client: httpx.AsyncClient) -> list[dict]:
    answer = await client.get("/debug/manifest/fsck", timeout=600)
    answer.raise_for_status()
    return answer.json()["findings"]


async def pause_as_told(answer: httpx.Response, *, at_most: float) -> None:
    await asyncio.sleep(min(float(answer.headers["Retry-After"]), at_most))
