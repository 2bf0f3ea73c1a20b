"""Deleting databases: the name is free at once, the blobs go, nothing else does."""

from typing import Any

import httpx

from app.container import fsck
from app.core.formats.record_framing import pack_records
from app.settings import Settings
from tests.conftest import MakeServer
from tests.helpers.server import ServerProcess
from tests.helpers.workload import RECORDS, unframe

LOG = "/tenants/acme/databases/log"


async def create(client: httpx.AsyncClient, path: str = LOG) -> dict[str, Any]:
    answer = await client.put(path, json={"engine": "append_only", "chunk_bytes": 65536})
    assert answer.status_code == 201, answer.text
    return answer.json()


async def append(client: httpx.AsyncClient, *records: bytes, path: str = LOG) -> None:
    answer = await client.post(
        f"{path}/records", content=pack_records(records), headers={"Content-Type": RECORDS}
    )
    assert answer.status_code == 201, answer.text


async def checkpoint(client: httpx.AsyncClient, database: str = "log") -> dict[str, Any]:
    answer = await client.post("/checkpoints", json={"tenant": "acme", "database": database})
    return await ended(client, answer.json()["id"])


async def ended(client: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
    job = (await client.get(f"/jobs/{job_id}?wait=60")).json()
    assert job["state"] == "completed", job
    return job


async def collect(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    answer = await client.post("/admin/gc/run", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def objects(server: ServerProcess, prefix: str = "") -> set[str]:
    root = server.data_dir / "remote"
    found = {
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }
    return {
        key for key in found if key.startswith(("checkpoints/", "generations/")) and prefix in key
    }


async def test_delete_frees_the_name_and_then_the_blobs(make_server: MakeServer) -> None:
    server = make_server(settings={"BOP_GC_GRACE_SECONDS": "0"})
    await server.start()
    client = server.client
    first = await create(client)
    await create(client, "/tenants/acme/databases/other")
    await append(client, *[bytes([number]) * 30_000 for number in range(9)])
    await append(client, b"kept", path="/tenants/acme/databases/other")
    job = await checkpoint(client)
    await checkpoint(client, "other")
    others = objects(server, "/other/")
    key = job["result"]["chunks"][0]["blob_key"]
    explained = (await client.get("/debug/blobs/explain", params={"key": key})).json()
    assert explained["state"] == "kept"
    assert {reason["kind"] for reason in explained["reasons"]} == {"chunk_row", "newest_generation"}

    answer = await client.delete(LOG)
    assert answer.status_code == 202, answer.text
    assert answer.json()["kind"] == "prune_checkpoint"
    assert answer.headers["Location"] == f"/jobs/{answer.json()['id']}"
    assert (await client.get(LOG)).status_code == 404
    assert (await client.get(f"{LOG}/records?from_lsn=1")).status_code == 404
    assert (await client.delete(LOG)).status_code == 404
    again = await create(client)
    assert again["db_id"] > first["db_id"]
    assert again["next_lsn"] == 1
    await append(client, b"new")
    await checkpoint(client)
    fresh = await ended(client, answer.json()["id"])
    assert fresh["result"]["retired_blobs"] >= len(job["result"]["chunks"]) + 1
    report = await collect(client)
    assert (report["waiting_blobs"], report["failed_blobs"]) == (0, 0)
    explained = (await client.get("/debug/blobs/explain", params={"key": key})).json()
    assert explained["state"] == "unknown"

    assert objects(server, "/other/") == others
    left = objects(server, "/log/")
    assert len(left) == 2  # the new database's chunk and document
    assert not any(f"/{first['db_id']}/" in one for one in left)
    assert not (server.data_dir / "wal" / str(first["db_id"])).exists()
    records = await client.get(f"{LOG}/records?from_lsn=1")
    assert unframe(records.content) == [b"new"]
    assert await server.terminate() == 0, server.log_tail()
    assert (await fsck(Settings(data_dir=server.data_dir))).findings == ()


async def test_what_is_being_read_goes_only_afterwards(make_server: MakeServer) -> None:
    """Row 39: a running reader of a deleted database reads to the end."""
    server = make_server(settings={"BOP_GC_GRACE_SECONDS": "0", "BOP_HOT_CACHE_BYTES": "0"})
    await server.start()
    client = server.client
    await create(client)
    records = [bytes([number]) * 60_000 for number in range(250)] * 2
    for start in range(0, len(records), 20):
        await append(client, *records[start : start + 20])
    await checkpoint(client)
    await server.restart()  # nothing of it is in memory, its WAL is gone
    client = server.client
    url = f"{LOG}/records?from_lsn=1"
    async with client.stream("GET", url) as stream:
        pieces = stream.aiter_raw(65_536)
        body = await anext(pieces)
        deleted = await client.delete(LOG)
        assert deleted.status_code == 202
        job = await ended(client, deleted.json()["id"])
        report = await collect(client)
        assert objects(server)
        async for piece in pieces:
            body += piece
    assert unframe(body) == records
    assert job["result"]["rows"] == 0
    del report
    done = await collect(client)
    assert done["removed_rows"] > 0
    assert objects(server) == set()
    assert await server.terminate() == 0, server.log_tail()
    assert (await fsck(Settings(data_dir=server.data_dir))).findings == ()


async def test_orphans_are_told_and_deleted_when_asked(make_server: MakeServer) -> None:
    server = make_server(settings={"BOP_GC_GRACE_SECONDS": "0", "BOP_GC_ORPHAN_AGE_SECONDS": "0"})
    await server.start()
    client = server.client
    await create(client)
    await append(client, b"one")
    job = await checkpoint(client)
    key = job["result"]["chunks"][0]["blob_key"]
    orphan = key.replace("/chunk-0-", "/chunk-7-")
    path = server.data_dir / "remote"
    (path / orphan).write_bytes((path / key).read_bytes())
    known = objects(server) - {orphan}
    assert (await collect(client))["orphans"] is None
    told = (await collect(client, orphans="report"))["orphans"]
    assert ([one["key"] for one in told["items"]], told["queued"]) == ([orphan], 0)
    assert orphan in objects(server)
    gone = await collect(client, orphans="delete")
    assert (gone["orphans"]["queued"], gone["deleted_blobs"]) == (1, 1)
    assert objects(server) == known
    assert (await collect(client, orphans="report"))["orphans"]["count"] == 0
    refused = await client.post("/admin/gc/run", json={"orphans": "all"})
    assert refused.status_code == 422
