"""Snapshots and forks of both engines: the real service, real SeaweedFS, real losses."""

import random
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.container import fsck
from app.core.formats.record_framing import pack_records
from app.settings import Settings
from tests.conftest import MakeServer
from tests.helpers.seaweed import SeaweedS3
from tests.helpers.server import ServerProcess
from tests.helpers.wait import wait_until
from tests.helpers.workload import RECORDS, unframe

ROOT = "/tenants/acme/databases"
LSN_GAP = 1 << 32


class SqliteFile:
    """A real SQLite database of some chunks, changed row by row."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.shapes = random.Random(seed)
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA page_size = 4096")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, body BLOB)")
            rows = [(number, self.shapes.randbytes(1000)) for number in range(200)]
            connection.executemany("INSERT INTO t VALUES (?, ?)", rows)
        connection.close()

    @property
    def content(self) -> bytes:
        return self.path.read_bytes()

    def change(self, *numbers: int) -> bytes:
        with sqlite3.connect(self.path) as connection:
            for number in numbers:
                connection.execute(
                    "INSERT OR REPLACE INTO t VALUES (?, ?)", (number, self.shapes.randbytes(1000))
                )
        connection.close()
        return self.content

    def log_of_change(self, number: int) -> bytes:
        """Changes a row; the log that holds the change, which begins at the file as it was."""
        connection = sqlite3.connect(self.path)
        connection.execute(
            "INSERT OR REPLACE INTO t VALUES (?, ?)", (number, self.shapes.randbytes(1000))
        )
        connection.commit()
        log = self.path.with_name(f"{self.path.name}-wal").read_bytes()
        connection.close()
        return log

    def becoming(self, content: bytes) -> "SqliteFile":
        self.path.write_bytes(content)
        return self


@pytest.fixture
async def server(make_server: MakeServer, seaweed: SeaweedS3) -> ServerProcess:
    server = make_server(
        settings={
            "BOP_REMOTE_URL": f"s3://{seaweed.bucket()}/prod",
            "BOP_S3_ENDPOINT_URL": seaweed.endpoint,
            "BOP_S3_REGION": seaweed.region,
            **seaweed.environment(),
        }
    )
    await server.start()
    return server


async def send(
    client: httpx.AsyncClient, method: str, path: str, status: int, **request: Any
) -> Any:
    answer = await client.request(method, f"{ROOT}/{path}", **request)
    assert answer.status_code == status, answer.text
    return answer.json() if answer.content else None


async def refused(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> tuple[int, str]:
    answer = await client.post(f"{ROOT}/{path}", json=body)
    return answer.status_code, answer.json()["code"]


async def checkpoint(client: httpx.AsyncClient, database: str, tenant: str = "acme") -> dict:
    answer = await client.post("/checkpoints", json={"tenant": tenant, "database": database})
    assert answer.status_code == 202, answer.text
    job = (await client.get(f"/checkpoints/{answer.json()['id']}?wait=60")).json()
    assert job["state"] == "completed", job
    return job["result"]


async def put_image(client: httpx.AsyncClient, database: str, content: bytes) -> dict:
    return await send(client, "PUT", f"{database}/image", 200, content=content)


async def image(client: httpx.AsyncClient, database: str, **selector: Any) -> bytes:
    answer = await client.get(f"{ROOT}/{database}/image", params=selector)
    assert answer.status_code == 200, answer.text
    return answer.content


async def append(client: httpx.AsyncClient, database: str, records: list[bytes]) -> dict:
    return await send(
        client, "POST", f"{database}/records", 201,
        content=pack_records(records), headers={"Content-Type": RECORDS},
    )  # fmt: skip


async def records(client: httpx.AsyncClient, database: str, first: int = 1) -> list[bytes]:
    answer = await client.get(f"{ROOT}/{database}/records", params={"from_lsn": first})
    assert answer.status_code == 200, answer.text
    return unframe(answer.content)


async def lose_the_node(server: ServerProcess) -> None:
    """Ends it in order, and rebuilds everything from the bucket."""
    await server.terminate()
    shutil.rmtree(server.data_dir)
    await server.start(wait="launched", arguments=("recover",))
    assert await server.wait_exit() == 0, server.log_tail()
    await server.start(wait="ready")


async def assert_clean(server: ServerProcess, **checked: int) -> None:
    assert await server.terminate() == 0, server.log_tail()
    names = {name.removeprefix("BOP_").lower(): value for name, value in server.settings.items()}
    known = {name: value for name, value in names.items() if name in Settings.model_fields}
    with pytest.MonkeyPatch.context() as environment:
        for name, value in server.settings.items():
            if name.startswith("AWS_"):
                environment.setenv(name, value)
        report = await fsck(Settings(**known))
    assert report.findings == ()
    assert report.checked.items() >= checked.items()


async def test_pages_of_snapshots_and_forks(server: ServerProcess, tmp_path: Path):
    client = server.client
    app = SqliteFile(tmp_path / "app.db", 1)
    await send(
        client, "PUT", "app", 201, json={"engine": "libsql", "chunk_bytes": 65_536}
    )  # fmt: skip
    assert await refused(client, "app/snapshots", {"name": "s"}) == (409, "no_generation")
    assert await refused(client, "app/forks", {"database": "f"}) == (409, "no_generation")

    states: dict[int, bytes] = {}
    await put_image(client, "app", app.content)
    await checkpoint(client, "app")
    states[1] = app.content
    await put_image(client, "app", app.change(3, 150))
    await checkpoint(client, "app")
    states[2] = app.content
    made = await send(client, "POST", "app/snapshots", 201, json={"name": "two"})
    assert (made["generation"], made["page_count"]) == (2, len(states[2]) // 4096)
    await put_image(client, "app", app.change(5, 199))
    await checkpoint(client, "app")
    states[3] = app.content
    await put_image(client, "app", app.change(7))  # stays in the WAL
    newest = app.content

    assert await image(client, "app", snapshot="two") == states[2]
    page = await client.get(f"{ROOT}/app/pages/2?snapshot=two")
    assert page.content == states[2][4096:8192]
    head = await client.head(f"{ROOT}/app/image?snapshot=two")
    assert int(head.headers["Content-Length"]) == len(states[2])
    assert (await client.get(f"{ROOT}/app/image?snapshot=no")).status_code == 404

    fork = await send(
        client, "POST", "app/forks", 201, json={"database": "fork", "snapshot": "two"}
    )
    assert fork["forked_from"] == {"tenant": "acme", "database": "app", "generation": 2}
    assert (fork["generation"], fork["next_lsn"]) == (2, made["last_lsn"] + 1)
    assert (fork["earliest_generation"], fork["latest_generation"]) == (2, 2)
    assert await send(client, "GET", "fork", 200) | {"checkpointed_lsn": 0} == fork
    assert await image(client, "fork") == states[2]
    # Nothing but an image, or a log that asserts this very state, goes on from here.
    gap = await client.post(f"{ROOT}/fork/wal?offset=32", content=b"x" * 100)
    assert (gap.status_code, gap.json()["code"]) == (409, "wal_gap")
    assert gap.json()["last_lsn"] == made["last_lsn"]

    # Both sides go on by themselves, over several generations and deltas.
    child = SqliteFile(tmp_path / "child.db", 2).becoming(states[2])
    children: dict[int, bytes] = {2: states[2]}
    log = child.log_of_change(77)
    query = f"offset=0&after_lsn={made['last_lsn']}"
    told = await send(client, "POST", f"fork/wal?{query}", 200, content=log)
    assert told["first_lsn"] == made["last_lsn"] + 1
    assert await image(client, "fork") == child.content
    for step in range(3):
        await put_image(client, "fork", child.change(step, 160 + step))
        result = await checkpoint(client, "fork")
        children[result["generation"]] = child.content
    assert list(children) == [2, 3, 4, 5]
    assert {chunk["action"] for chunk in result["chunks"]} == {"create_delta"}
    await put_image(client, "app", app.change(20))
    await checkpoint(client, "app")

    # A fork of the fork, at a generation in which it has both its own chunks and its parent's.
    await send(client, "POST", "fork/forks", 201, json={"database": "third", "generation": 3})
    third = SqliteFile(tmp_path / "third.db", 3).becoming(children[3])
    await put_image(client, "third", third.change(*range(400, 600)))  # grows by chunks
    await checkpoint(client, "third")
    await send(client, "POST", "fork/forks", 201, json={"database": "other", "tenant": "globex"})
    elsewhere = await client.get("/tenants/globex/databases/other/image")
    assert elsewhere.content == child.content

    async def check() -> None:
        for generation, content in states.items():
            assert await image(client, "app", generation=generation) == content
        for generation, content in children.items():
            assert await image(client, "fork", generation=generation) == content
        assert await image(client, "third") == third.content
        assert await image(client, "third", generation=3) == children[3]
        assert await image(client, "app", snapshot="two") == states[2]

    # What can be restored is said before the collector comes by; what is pinned stays.
    rules = {"keep_generations": None, "keep_seconds": None, "minimum_generations": 2}
    changed = await send(client, "PATCH", "app", 200, json={"retention": rules})
    assert changed["retention"] == rules
    assert (changed["earliest_generation"], changed["latest_generation"]) == (2, 4)
    gone = await send(client, "GET", "app/generations?expiring=true", 200)
    assert [one["generation"] for one in gone["items"]] == [1]
    keep_all = {"keep_generations": 10}
    changed = await send(client, "PATCH", "app", 200, json={"retention": keep_all})
    assert (changed["retention"], changed["earliest_generation"]) == (rules | keep_all, 1)

    assert await image(client, "app") == app.content != newest
    await check()
    await server.restart()
    client = server.client
    await check()

    async def durable() -> bool:
        found = (await client.get("/tenants/globex/databases/other")).json()
        return found["checkpointed_lsn"] == found["next_lsn"] - 1

    await wait_until(durable)
    await lose_the_node(server)
    client = server.client
    await check()
    assert await image(client, "app") == app.content
    found = await send(client, "GET", "fork", 200)
    assert found["forked_from"] == fork["forked_from"]
    await put_image(client, "fork", child.change(9))
    assert (await checkpoint(client, "fork"))["generation"] == 6
    await send(client, "POST", "fork/forks", 201, json={"database": "again"})
    assert await image(client, "again") == child.content

    # What the collector has taken is gone for whoever names it; forks of it read on.
    only_newest = {"retention": {"keep_generations": None, "keep_seconds": None}}
    only_newest["retention"]["minimum_generations"] = 1
    taken = (await send(client, "GET", "fork/generations", 200))["items"][1]
    for database in ("app", "fork"):
        await send(client, "PATCH", database, 200, json=only_newest)
    assert (await client.post("/admin/gc/run", json={})).status_code == 200
    assert [
        one["generation"] for one in (await send(client, "GET", "app/generations", 200))["items"]
    ] == [2, 4]
    for query in ("generation=3", f"at={taken['created_at']}"):
        answer = await client.get(f"{ROOT}/fork/image?{query}")
        assert (answer.status_code, answer.json()["code"]) == (410, "generation_expired")
    for path, body in (("snapshots", {"name": "x"}), ("forks", {"database": "x"})):
        asked = {**body, "generation": taken["generation"]}
        assert await refused(client, f"fork/{path}", asked) == (410, "generation_expired")
    assert await image(client, "app", snapshot="two") == states[2]
    assert await image(client, "third") == third.content
    assert await image(client, "third", generation=3) == children[3]
    await send(client, "DELETE", "app/snapshots/two", 204)
    await send(client, "GET", "app/snapshots/two", 404)
    await assert_clean(server, forks=4, snapshots=0)


async def test_records_of_snapshots_and_forks(server: ServerProcess):
    client, shapes = server.client, random.Random(5)

    def some(count: int) -> list[bytes]:
        return [shapes.randbytes(900) for _ in range(count)]

    await send(client, "PUT", "log", 201, json={"engine": "append_only", "chunk_bytes": 65_536})
    first, second, third = some(200), some(50), some(30)
    await append(client, "log", first)
    await checkpoint(client, "log")
    await append(client, "log", second)
    await checkpoint(client, "log")
    await append(client, "log", third)
    pinned = await send(
        client, "POST", "log/snapshots", 201, json={"name": "early", "generation": 1}
    )
    assert (pinned["last_lsn"], pinned["page_count"]) == (200, 0)

    fork = await send(
        client, "POST", "log/forks", 201, json={"database": "fork", "snapshot": "early"}
    )
    assert (fork["first_lsn"], fork["next_lsn"], fork["generation"]) == (1, 201, 1)
    assert await records(client, "fork") == first
    newest = await send(client, "POST", "log/forks", 201, json={"database": "newest"})
    assert newest["next_lsn"] == 251  # what is only in the WAL is not in it
    assert await records(client, "newest") == first + second

    mine = some(120)
    told = await append(client, "fork", mine)
    assert told["first_lsn"] == 201
    assert await records(client, "fork") == first + mine
    result = await checkpoint(client, "fork")
    assert (result["generation"], result["first_lsn"], result["last_lsn"]) == (2, 201, 320)
    await send(client, "POST", "fork/forks", 201, json={"database": "third"})
    more = some(10)
    assert (await append(client, "third", more))["first_lsn"] == 321
    await checkpoint(client, "third")

    async def check() -> None:
        assert await records(client, "fork") == first + mine
        assert await records(client, "fork", first=150) == (first + mine)[149:]
        assert await records(client, "third") == first + mine + more
        assert await records(client, "newest") == first + second

    await check()
    assert await records(client, "log") == first + second + third
    for query in ("database=log&snapshot=early", "database=fork&generation=1"):
        scan = await client.get(f"/cold-scan?tenant=acme&{query}")
        assert scan.status_code == 200
        assert pack_records(first[-1:]) in scan.content
        assert second[0] not in scan.content
    asked = {"tenant": "acme", "database": "third"}
    verified = await job(client, await client.post("/admin/verifications", json=asked))
    assert verified["state"] == "completed", verified
    everything = len(pack_records(first + mine + more))
    assert verified["result"]["verified_bytes"] > everything  # with what falls through
    await checkpoint(client, "log")
    await lose_the_node(server)
    client = server.client
    await check()
    assert await records(client, "log") == first + second + third
    listed = await send(client, "GET", "log/snapshots", 200)
    assert listed == {"items": [pinned], "next_cursor": None}
    assert (await append(client, "fork", more))["first_lsn"] == 321 + LSN_GAP
    await checkpoint(client, "fork")
    assert await records(client, "fork") == first + mine
    assert await records(client, "fork", first=321 + LSN_GAP) == more
    await assert_clean(server, forks=3, snapshots=1)


async def job(client: httpx.AsyncClient, answer: httpx.Response) -> dict:
    assert answer.status_code == 202, answer.text
    found = {"finished_at": None}
    while found["finished_at"] is None:
        found = (await client.get(f"/jobs/{answer.json()['id']}?wait=20")).json()
    return found


async def truncate(client: httpx.AsyncClient, database: str, direction: str, lsn: int) -> dict:
    body = {"tenant": "acme", "database": database, "direction": direction, "lsn": lsn}
    return await job(client, await client.post("/truncations", json=body))


async def test_a_fork_is_truncated_by_itself_and_outlives_its_parent(make_server: MakeServer):
    server = make_server(settings={"BOP_GC_GRACE_SECONDS": "0"})
    await server.start()
    client = server.client
    written = [b"%d" % lsn for lsn in range(1, 31)]
    await send(client, "PUT", "log", 201, json={"engine": "append_only"})
    for start in (0, 10, 20):
        await append(client, "log", written[start : start + 10])
        await checkpoint(client, "log")
    await send(client, "POST", "log/forks", 201, json={"database": "fork"})

    blocked = await truncate(client, "log", "head", 11)
    assert (blocked["state"], blocked["error"]["code"]) == ("failed", "snapshot_pinned")
    assert blocked["error"]["names"] == ["acme/fork"]
    assert (await truncate(client, "fork", "head", 11))["result"]["first_lsn"] == 11
    cut = await truncate(client, "fork", "tail", 25)
    assert cut["result"]["dropped"] == {"first_lsn": 25, "last_lsn": 30}
    assert (await append(client, "fork", [b"new"]))["first_lsn"] == 31
    await checkpoint(client, "fork")
    await send(client, "POST", "fork/forks", 201, json={"database": "third"})

    async def check() -> None:
        for database in ("fork", "third"):
            assert await records(client, database, first=11) == written[10:24]
            assert await records(client, database, first=25) == [b"new"]
            assert (await client.get(f"{ROOT}/{database}/records?from_lsn=1")).status_code == 410

    await check()
    assert await records(client, "log") == written

    def blobs() -> int:
        return len(list((server.data_dir / "remote").rglob("*.blob")))

    async def collect() -> None:
        answer = await client.post("/admin/gc/run", json={})
        assert answer.status_code == 200, answer.text

    assert blobs() == 4
    only_newest = {"retention": {"keep_seconds": None, "minimum_generations": 1}}
    for database in ("log", "fork"):
        await send(client, "PATCH", database, 200, json=only_newest)
    deleted = await job(client, await client.delete(f"{ROOT}/log"))
    assert deleted["state"] == "completed", deleted
    await collect()
    await check()
    assert blobs() == 3  # the first chunk was the parent's alone
    await server.restart()
    client = server.client
    await check()
    for database in ("fork", "third"):
        await job(client, await client.delete(f"{ROOT}/{database}"))
    await collect()
    assert blobs() == 0
    assert not list((server.data_dir / "remote" / "generations").rglob("*.zst"))
    assert await server.terminate() == 0
    report = await fsck(Settings(data_dir=server.data_dir))
    assert report.findings == ()
    assert report.checked.get("databases", 0) == 0


async def test_fsck_misses_the_document_of_a_snapshot(make_server: MakeServer):
    server = make_server()
    await server.start()
    client = server.client
    await send(client, "PUT", "log", 201, json={"engine": "append_only"})
    await append(client, "log", [b"one"])
    await checkpoint(client, "log")
    await send(client, "POST", "log/snapshots", 201, json={"name": "s"})
    assert await server.terminate() == 0
    (document,) = (server.data_dir / "remote").rglob("meta-*.json")
    document.unlink()
    report = await fsck(Settings(data_dir=server.data_dir))
    assert [
        (one.invariant, one.where.startswith("snapshots/acme/log/s/")) for one in report.findings
    ] == [("I3", True)]
