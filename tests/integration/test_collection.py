"""Retention, snapshots, forks and deletion on a real S3: what can be read stays, nothing else."""

import random
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
from aiobotocore.session import get_session

from tests.conftest import MakeServer
from tests.helpers.seaweed import SeaweedS3
from tests.helpers.server import ServerProcess

TENANT = "/tenants/acme/databases"
APP = f"{TENANT}/app"


class Application:
    """A SQLite database whose whole file is sent after each change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._random = random.Random(7)
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA page_size = 4096")
            connection.execute("CREATE TABLE row (id INTEGER PRIMARY KEY, body)")
            rows = [(self._random.randbytes(3000),) for _ in range(120)]
            connection.executemany("INSERT INTO row (body) VALUES (?)", rows)
            connection.commit()

    def change(self, count: int) -> bytes:
        with closing(sqlite3.connect(self._path)) as connection:
            for _ in range(count):
                place = self._random.randrange(1, 121)
                body = self._random.randbytes(3000)
                connection.execute("UPDATE row SET body = ? WHERE id = ?", (body, place))
            connection.commit()
        return self._path.read_bytes()


async def ok(answer: httpx.Response, status: int = 200) -> Any:
    assert answer.status_code == status, answer.text
    return answer.json() if answer.content else None


async def publish(client: httpx.AsyncClient, image: bytes, database: str = "app") -> int:
    await ok(await client.put(f"{TENANT}/{database}/image", content=image))
    body = {"tenant": "acme", "database": database}
    job = await ok(await client.post("/checkpoints", json=body), 202)
    job = await ok(await client.get(f"/jobs/{job['id']}?wait=60"))
    assert job["state"] == "completed", job
    generation: int = job["result"]["generation"]
    return generation


async def image(client: httpx.AsyncClient, path: str = APP, **selector: Any) -> bytes:
    answer = await client.get(f"{path}/image", params=selector)
    assert answer.status_code == 200, answer.text
    return answer.content


async def generations(client: httpx.AsyncClient) -> list[int]:
    found = await ok(await client.get(f"{APP}/generations"))
    return [one["generation"] for one in found["items"]]


async def collect(client: httpx.AsyncClient, **body: Any) -> Any:
    return await ok(await client.post("/admin/gc/run", json=body))


async def delete(client: httpx.AsyncClient, path: str, **query: str) -> None:
    job = await ok(await client.delete(path, params=query), 202)
    job = await ok(await client.get(f"/jobs/{job['id']}?wait=60"))
    assert job["state"] == "completed", job


class Bucket:
    def __init__(self, seaweed: SeaweedS3) -> None:
        self.name = seaweed.bucket()
        self._seaweed = seaweed

    @property
    def settings(self) -> dict[str, str]:
        return {
            "BOP_REMOTE_URL": f"s3://{self.name}/prod",
            "BOP_S3_ENDPOINT_URL": self._seaweed.endpoint,
            "BOP_S3_REGION": self._seaweed.region,
            "BOP_GC_GRACE_SECONDS": "0",
            "BOP_GC_ORPHAN_AGE_SECONDS": "0",
            "BOP_HOT_CACHE_BYTES": "0",
            **self._seaweed.environment(),
        }

    async def keys(self) -> set[str]:
        """All but the owner object."""
        async with get_session().create_client(
            "s3",
            endpoint_url=self._seaweed.endpoint,
            region_name=self._seaweed.region,
            aws_access_key_id=self._seaweed.access_key,
            aws_secret_access_key=self._seaweed.secret_key,
        ) as client:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=self.name)
            found = {
                item["Key"].removeprefix("prod/")
                async for page in pages
                for item in page.get("Contents", ())
            }
        return found - {"owner.json"}


async def check_kept(client: httpx.AsyncClient, bucket: Bucket) -> None:
    """Everything on the store is there for a reason that can be told."""
    keys = await bucket.keys()
    for key in keys:
        told = await ok(await client.get("/debug/blobs/explain", params={"key": key}))
        assert told["state"] == "kept", told
    swept = (await collect(client, orphans="report"))["orphans"]
    assert (swept["listed"], swept["count"]) == (len(keys), 0)
    assert (await ok(await client.get("/debug/manifest/fsck")))["findings"] == []


async def test_only_what_can_be_read_stays(
    make_server: MakeServer, seaweed: SeaweedS3, tmp_path: Path
) -> None:
    bucket = Bucket(seaweed)
    server: ServerProcess = make_server(settings=bucket.settings)
    await server.start()
    client = server.client
    body = {"engine": "libsql", "chunk_bytes": 65536}
    await ok(await client.put(APP, json=body), 201)
    source = Application(tmp_path / "app.db")
    images = {}
    for count in (0, 3, 3, 60, 2, 2):
        content = source.change(count)
        images[await publish(client, content)] = content
    assert list(images) == [1, 2, 3, 4, 5, 6]
    await ok(await client.post(f"{APP}/forks", json={"database": "fork", "generation": 1}), 201)
    await ok(await client.post(f"{APP}/snapshots", json={"name": "s", "generation": 3}), 201)

    # nothing is due: by default a day is kept
    assert (await collect(client))["expired_generations"] == 0
    rule = {"keep_generations": 2, "keep_seconds": None, "minimum_generations": 1}
    await ok(await client.patch(APP, json={"retention": rule}))
    report = await collect(client)
    assert report["expired_generations"] == 3
    assert report["deleted_blobs"] > 3
    assert report["waiting_blobs"] == 0
    assert await generations(client) == [3, 5, 6]
    gone = await client.get(f"{APP}/image", params={"generation": 2})
    assert (gone.status_code, gone.json()["code"]) == (410, "generation_expired")
    assert await image(client, generation=3) == images[3] == await image(client, snapshot="s")
    assert await image(client, generation=5) == images[5]
    assert await image(client) == images[6]
    assert await image(client, f"{TENANT}/fork") == images[1]
    await check_kept(client, bucket)

    # the fork goes its own way, the snapshot and then the parent go
    changed = source.change(5)
    await publish(client, changed, "fork")
    assert await image(client, f"{TENANT}/fork", generation=1) == images[1]
    refused = await client.delete(APP)
    assert (refused.status_code, refused.json()["code"]) == (409, "snapshot_pinned")
    assert refused.json()["names"] == ["s"]
    before = await bucket.keys()
    await delete(client, APP, snapshots="delete")
    assert (await client.get(APP)).status_code == 404
    await collect(client)
    assert len(await bucket.keys()) < len(before)
    assert await image(client, f"{TENANT}/fork", generation=1) == images[1]
    assert await image(client, f"{TENANT}/fork") == changed
    await check_kept(client, bucket)

    # a restart knows it all; with the fork the last of it goes
    await server.restart()
    client = server.client
    assert await image(client, f"{TENANT}/fork") == changed
    await delete(client, f"{TENANT}/fork")
    await collect(client)
    assert await bucket.keys() == set()
    assert (await ok(await client.get("/debug/manifest/stats")))["entries"]["databases"] == 0
    assert (await ok(await client.get("/debug/manifest/fsck")))["findings"] == []
    assert await server.terminate() == 0, server.log_tail()


async def test_a_collection_needs_no_body(make_server: MakeServer):
    server = make_server()
    await server.start()
    told = await ok(await server.client.post("/admin/gc/run"))
    assert (told["paused"], told["orphans"]) == (False, None)
