"""A client of one append_only database whose records say which LSN they have.

With it a test of truncations needs no ledger: what is readable is a list of LSNs, and each record
is checked to be the one that was given that LSN.
"""

import shutil
from pathlib import Path
from typing import Any

import httpx

from app.container import fsck, recover
from app.core.formats.record_framing import pack_records
from app.settings import Settings
from tests.helpers.server import ServerProcess
from tests.helpers.workload import RECORDS, unframe

LOG = "/tenants/acme/databases/log"
NAMES = {"tenant": "acme", "database": "log"}


async def create(client: httpx.AsyncClient, **fields: object) -> None:
    answer = await client.put(LOG, json={"engine": "append_only", **fields})
    assert answer.status_code in {200, 201}, answer.text


async def append(client: httpx.AsyncClient, count: int, **headers: str) -> dict[str, Any]:
    """Each record is the LSN that it gets, in decimal."""
    first = (await client.get(LOG)).json()["next_lsn"]
    records = [b"%d" % lsn for lsn in range(first, first + count)]
    answer = await client.post(
        f"{LOG}/records",
        content=pack_records(records),
        headers={"Content-Type": RECORDS, **headers},
    )
    assert answer.status_code == 201, answer.text
    return answer.json()


async def readable(client: httpx.AsyncClient, path: str = LOG) -> list[int]:
    """Every readable LSN, over gaps; each record is checked to be its LSN's."""
    database = (await client.get(path)).json()
    at, end, found = database["first_lsn"], database["next_lsn"], []
    while at < end:
        answer = await client.get(f"{path}/records?from_lsn={at}")
        assert answer.status_code == 200, answer.text
        records = unframe(answer.content)
        if records:
            first = int(answer.headers["Bop-First-Lsn"])
            lsns = list(range(first, first + len(records)))
            assert records == [b"%d" % lsn for lsn in lsns]
            found += lsns
        assert int(answer.headers["Bop-Next-Lsn"]) > at
        at = int(answer.headers["Bop-Next-Lsn"])
    return found


async def checkpoint(client: httpx.AsyncClient) -> dict[str, Any]:
    answer = await client.post("/checkpoints", json=NAMES)
    assert answer.status_code == 202, answer.text
    job = await ended(client, answer.json()["id"])
    assert job["state"] == "completed", job
    return job


async def truncate(client: httpx.AsyncClient, direction: str, lsn: int, **fields: object) -> str:
    asked = {**NAMES, "direction": direction, "lsn": lsn, **fields}
    answer = await client.post("/truncations", json=asked)
    assert answer.status_code == 202, answer.text
    assert answer.headers["Location"] == f"/truncations/{answer.json()['id']}"
    return answer.json()["id"]


async def truncated(client: httpx.AsyncClient, direction: str, lsn: int) -> dict[str, Any]:
    job = await ended(client, await truncate(client, direction, lsn))
    assert job["state"] == "completed", job
    return job["result"]


async def ended(client: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
    job: dict[str, Any] = {"state": ""}
    while job["state"] not in {"completed", "failed", "cancelled"}:
        job = (await client.get(f"/jobs/{job_id}?wait=20")).json()
    return job


async def job_of(client: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
    return (await client.get(f"/jobs/{job_id}")).json()


async def changes(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    return (await client.get("/debug/manifest/change_log")).json()["items"]


def span(first: int, last: int) -> list[int]:
    return list(range(first, last + 1))


async def stop_and_check(server: ServerProcess) -> None:
    assert await server.terminate() == 0, server.log_tail()
    report = await fsck(Settings(data_dir=server.data_dir))
    assert report.findings == ()


async def rebuild_from_bucket(server: ServerProcess) -> None:
    """The node is lost; only the embedded remote store is left."""
    await server.terminate()
    kept = server.data_dir.with_name("kept")
    shutil.move(server.data_dir / "remote", kept)
    shutil.rmtree(server.data_dir)
    server.data_dir.mkdir()
    shutil.move(kept, server.data_dir / "remote")
    await recover(Settings(data_dir=server.data_dir))
    await server.start()


class Gate:
    """A failpoint's `pause:FILE` that holds only while it is closed. Closed and opened at will; it
    holds up the thread that comes by, so it belongs to steps off the event loop.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / "gate"
        self._reached = directory / "gate.reached"
        self.open()

    @property
    def action(self) -> str:
        return f"pause:{self._path}"

    @property
    def is_reached(self) -> bool:
        return self._reached.exists()

    def open(self) -> None:
        self._path.touch()

    def close(self) -> None:
        self._reached.unlink(missing_ok=True)
        self._path.unlink()
