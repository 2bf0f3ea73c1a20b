"""Each feature flag off and on, effective at once, on the real service."""

import contextlib
from pathlib import Path

import httpx

from tests.helpers.server import ServerProcess
from tests.integration.test_checkpoint_libsql_delta import Source, source_at

FLAGS = "/admin/tenants/acme/feature-flags"
LOG = {"tenant": "acme", "database": "log"}


async def set_flag(client: httpx.AsyncClient, flag: str, value: bool) -> None:
    answer = await client.patch(FLAGS, json={flag: value})
    assert answer.status_code == 200, answer.text
    assert answer.json()[flag] is value


async def checkpoint(client: httpx.AsyncClient, database: str) -> dict:
    answer = await client.post("/checkpoints", json={"tenant": "acme", "database": database})
    assert answer.status_code == 202, answer.text
    job = (await client.get(f"/checkpoints/{answer.json()['id']}?wait=60")).json()
    assert job["state"] == "completed", job
    return job["result"]


def assert_disabled(answer: httpx.Response, flag: str) -> None:
    assert (answer.status_code, answer.json()["code"]) == (409, "feature_disabled"), answer.text
    assert answer.json()["flag"] == flag


async def test_calls_are_refused_while_switched_off(server: ServerProcess):
    client = server.client
    await client.put("/tenants/acme/databases/log", json={"engine": "append_only"})
    stored = await client.post(
        "/tenants/acme/databases/log/records",
        content=b"one",
        headers={"Content-Type": "application/octet-stream"},
    )
    assert stored.status_code == 201, stored.text
    await checkpoint(client, "log")
    truncation = {**LOG, "direction": "head", "lsn": 1}

    async def scan() -> httpx.Response:
        return await client.get("/cold-scan", params=LOG)

    async def truncate() -> httpx.Response:
        return await client.post("/truncations", json=truncation)

    async def trigger() -> httpx.Response:
        return await client.post("/checkpoints", json=LOG)

    for flag, call, status in (
        ("enable_cold_scan", scan, 200),
        ("enable_append_only_truncation", truncate, 202),
        ("enable_checkpoints", trigger, 202),
    ):
        await set_flag(client, flag, False)
        assert_disabled(await call(), flag)
        await set_flag(client, flag, True)
        answer = await call()
        assert answer.status_code == status, answer.text


async def test_without_deltas_chunks_are_rewritten(server: ServerProcess, tmp_path: Path):
    client = server.client
    await client.put(
        "/tenants/acme/databases/app", json={"engine": "libsql", "chunk_bytes": 1 << 20}
    )
    with contextlib.ExitStack() as stack:
        source: Source = stack.enter_context(source_at(tmp_path / "app.db"))
        source.connection.execute("create table t (id integer primary key, note blob)")
        source.connection.execute(
            "with recursive n(i) as (select 1 union all select i + 1 from n where i < 400) "
            "insert into t select i, randomblob(1000) from n"
        )
        await source.send_log(client)
        await checkpoint(client, "app")
        for enabled, action in ((False, "rewrite_base"), (True, "create_delta")):
            await set_flag(client, "enable_chunk_deltas", enabled)
            source.connection.execute("update t set note = randomblob(1000) where id = 200")
            await source.send_log(client)
            result = await checkpoint(client, "app")
            assert {chunk["action"] for chunk in result["chunks"]} == {action}
