"""Storage limits, back-pressure, triggers and flags on the real service (I9, I13; fault row 5)."""

import asyncio
import os
from collections.abc import AsyncIterator

import httpx
import pytest

from app.core.formats.record_framing import pack_records
from tests.conftest import MakeServer
from tests.helpers.server import ServerProcess
from tests.helpers.wait import wait_until
from tests.helpers.workload import RECORDS

KIB = 1024
MIB = 1024 * KIB


def path_of(database: str, tenant: str = "acme") -> str:
    return f"/tenants/{tenant}/databases/{database}"


async def create(client: httpx.AsyncClient, *databases: str, tenant: str = "acme") -> None:
    for database in databases:
        body = {"engine": "append_only", "chunk_bytes": 1 * MIB, "compression": "zstd"}
        answer = await client.put(path_of(database, tenant), json=body)
        assert answer.status_code == 201, answer.text


async def append(
    client: httpx.AsyncClient, database: str, size: int, tenant: str = "acme"
) -> httpx.Response:
    return await client.post(
        f"{path_of(database, tenant)}/records",
        content=pack_records([os.urandom(size)]),
        headers={"Content-Type": RECORDS},
    )


async def checkpoint(client: httpx.AsyncClient, database: str, tenant: str = "acme") -> dict:
    answer = await client.post("/checkpoints", json={"tenant": tenant, "database": database})
    assert answer.status_code == 202, answer.text
    job = (await client.get(f"/checkpoints/{answer.json()['id']}?wait=60")).json()
    assert job["state"] == "completed", job
    return job


async def quota(client: httpx.AsyncClient) -> dict:
    answer = await client.get("/debug/storage/quota")
    assert answer.status_code == 200
    return answer.json()


async def used_by(client: httpx.AsyncClient, tenant: str) -> int:
    mine = [one for one in (await quota(client))["tenants"] if one["tenant"] == tenant]
    return mine[0]["used_bytes"] if mine else 0


async def limit_global(client: httpx.AsyncClient, global_bytes: int | None) -> None:
    answer = await client.put("/admin/quota", json={"global_bytes": global_bytes})
    assert answer.status_code == 200, answer.text


def wal_files_bytes(server: ServerProcess) -> int:
    return sum(path.stat().st_size for path in (server.data_dir / "wal").rglob("*.wal"))


def assert_refused(answer: httpx.Response, status: int, code: str) -> dict:
    assert answer.status_code == status, answer.text
    assert answer.json()["code"] == code
    assert 1 <= int(answer.headers["Retry-After"]) <= 60
    return answer.json()


@pytest.fixture
async def checked(make_server: MakeServer) -> AsyncIterator[ServerProcess]:
    """A service whose books are right when the test ends."""
    server = make_server()
    await server.start()
    yield server
    report = (await server.client.get("/debug/manifest/fsck")).json()
    assert report["findings"] == []


async def test_hierarchical_reservation(checked: ServerProcess):
    """WAL counts for its tenant and in all, the cache in all, an inode once wherever it lies."""
    client = checked.client
    await create(client, "one", "two")
    await create(client, "log", tenant="zeta")
    for database, tenant in (("one", "acme"), ("two", "acme"), ("log", "zeta")):
        assert (await append(client, database, 300 * KIB, tenant)).status_code == 201
    seen = await quota(client)
    assert {one["tenant"] for one in seen["tenants"]} == {"acme", "zeta"}
    assert sum(one["used_bytes"] for one in seen["tenants"]) == wal_files_bytes(checked)
    assert seen["global"]["used_bytes"] == wal_files_bytes(checked)
    assert seen["jobs"] == []

    await checkpoint(client, "one")
    await wait_until(lambda: _all_wal_is(checked, 2))
    seen = await quota(client)
    cached = (await client.get("/debug/cache")).json()["hot_cache"]["used_bytes"]
    assert cached > 300 * KIB
    assert seen["global"]["used_bytes"] == wal_files_bytes(checked) + cached
    assert await used_by(client, "acme") < 310 * KIB

    # limits are judged at each level, and hold after a restart
    await client.patch("/admin/tenants/acme/feature-flags", json={"enable_checkpoints": False})
    answer = await client.put(
        "/admin/tenants/acme/quota", json={"limit_bytes": 400 * KIB, "job_limit_bytes": 350 * KIB}
    )
    assert answer.json() == {
        "tenant": "acme", "limit_bytes": 400 * KIB, "job_limit_bytes": 350 * KIB,
    }  # fmt: skip
    assert (await client.get("/admin/tenants/acme/quota")).json() == answer.json()
    await limit_global(client, 10 * MIB)
    for _ in range(2):
        client = checked.client
        problem = assert_refused(await append(client, "two", 200 * KIB), 507, "quota_exhausted")
        assert (problem["level"], problem["limit_bytes"]) == ("tenant", 400 * KIB)
        assert (await client.get(path_of("two"))).json()["next_lsn"] == 2
        assert (await client.get("/admin/quota")).json() == {"global_bytes": 10 * MIB}
        assert (await quota(client))["global"] == {
            "limit_bytes": 10 * MIB,
            "used_bytes": wal_files_bytes(checked) + cached,
        }
        await checked.restart()
    client = checked.client
    assert (await append(client, "log", 200 * KIB, "zeta")).status_code == 201
    await client.put("/admin/tenants/acme/quota", json={})
    await limit_global(client, None)
    assert (await append(client, "two", 200 * KIB)).status_code == 201
    assert (await client.get("/admin/quota")).json()["global_bytes"] > 1 << 30


def _all_wal_is(server: ServerProcess, count: int) -> bool:
    return len(list((server.data_dir / "wal").rglob("*.wal"))) == count


async def test_quota_exhaustion_backpressure(checked: ServerProcess):
    """Cache goes first; then 507, nothing kept; the freeing checkpoint begins by itself."""
    client = checked.client
    await create(client, "log")
    assert (await append(client, "log", 900 * KIB)).status_code == 201
    await checkpoint(client, "log")
    await limit_global(client, 2 * MIB)
    assert (await append(client, "log", 900 * KIB)).status_code == 201
    assert (await client.get("/debug/cache")).json()["hot_cache"]["entries"] == 1
    assert (await append(client, "log", 900 * KIB)).status_code == 201
    assert (await client.get("/debug/cache")).json()["hot_cache"]["entries"] == 0  # it gave way
    before = await quota(client)
    problem = assert_refused(await append(client, "log", 900 * KIB), 507, "quota_exhausted")
    assert problem["level"] == "global"
    assert (await client.get(path_of("log"))).json()["next_lsn"] == 4
    assert before["global"]["used_bytes"] <= 2 * MIB

    # the drain reserve lets the checkpoint run that frees the WAL, although nothing is left
    async def taken() -> bool:
        return (await append(client, "log", 900 * KIB)).status_code == 201

    await wait_until(taken, timeout=30)
    jobs = (await client.get("/checkpoints")).json()["items"]
    assert [job["reason"] for job in jobs] == ["wal_pressure", None]
    assert jobs[0]["state"] == "completed"

    # a limit below what is used is taken: only cache is dropped
    used = (await quota(client))["global"]["used_bytes"]
    await limit_global(client, 10 * KIB)
    assert_refused(await append(client, "log", 1), 507, "quota_exhausted")
    seen = (await quota(client))["global"]
    assert seen["limit_bytes"] == 10 * KIB
    assert 10 * KIB < seen["used_bytes"] <= used
    assert (await client.get("/debug/cache")).json()["hot_cache"]["entries"] == 0
    await limit_global(client, None)
    assert (await append(client, "log", 1)).status_code == 201


async def test_reservation_release_on_failure(make_server: MakeServer):
    """Whatever becomes of a job, it holds nothing afterwards."""
    server = make_server(
        settings={"BOP_JOB_ATTEMPTS": "2", "BOP_QUOTA_GLOBAL_BYTES": str(8 * MIB)},
        failpoints={"upload.before_put": {"action": "raise"}},
    )
    await server.start()
    client = server.client
    await create(client, "log")
    assert (await append(client, "log", 900 * KIB)).status_code == 201
    answer = await client.post("/checkpoints", json={"tenant": "acme", "database": "log"})
    job = (await client.get(f"/checkpoints/{answer.json()['id']}?wait=60")).json()
    assert job["state"] == "failed", job
    seen = await quota(client)
    assert seen["jobs"] == []
    assert seen["global"]["used_bytes"] == wal_files_bytes(server)
    assert (await client.get("/debug/manifest/fsck")).json()["findings"] == []


async def test_concurrent_quota_exhaustion(checked: ServerProcess):
    """Fault row 5: fifty appends at once for room that a few of them fit."""
    client = checked.client
    await create(client, *(f"db{number}" for number in range(5)))
    await client.patch("/admin/tenants/acme/feature-flags", json={"enable_checkpoints": False})
    await limit_global(client, 1 * MIB)
    answers = await asyncio.gather(
        *(append(client, f"db{number % 5}", 100 * KIB) for number in range(50))
    )
    taken = [answer for answer in answers if answer.status_code == 201]
    assert len(taken) == 10
    for answer in answers:
        if answer.status_code != 201:
            assert_refused(answer, 507, "quota_exhausted")
    listed = (await client.get("/tenants/acme/databases")).json()["items"]
    assert sum(one["next_lsn"] - 1 for one in listed) == len(taken)
    await limit_global(client, None)
    report = (await client.post("/admin/janitor/run")).json()
    assert (report["quota_corrected"], report["quota_drift_bytes"]) == (0, 0)


async def test_wal_backlog_is_judged_per_database(make_server: MakeServer):
    server = make_server(settings={"BOP_WAL_BUDGET_BYTES": str(4 * MIB)})
    await server.start()
    client = server.client
    await create(client, "flood")
    await create(client, "quiet", tenant="zeta")
    flags = await client.patch(
        "/admin/tenants/acme/feature-flags", json={"enable_checkpoints": False}
    )
    assert flags.json()["enable_checkpoints"] is False
    for _ in range(4):
        assert (await append(client, "flood", 1000 * KIB)).status_code == 201
    problem = assert_refused(await append(client, "flood", 1000 * KIB), 429, "backpressure")
    assert problem["share_bytes"] == 4 * MIB
    assert (await client.get(path_of("flood"))).json()["next_lsn"] == 5
    assert (await append(client, "quiet", 1000 * KIB, "zeta")).status_code == 201
    await client.patch("/admin/tenants/acme/feature-flags", json={"enable_checkpoints": True})

    async def taken() -> bool:
        return (await append(client, "flood", 100 * KIB)).status_code == 201

    await wait_until(taken, timeout=30)
    jobs = (await client.get("/checkpoints?tenant=acme")).json()["items"]
    assert jobs[-1]["reason"] == "wal_pressure"
    assert (await client.get("/debug/manifest/fsck")).json()["findings"] == []


async def test_timer_flags_and_a_drained_queue(checked: ServerProcess):
    client = checked.client
    flags = "/admin/tenants/acme/feature-flags"
    assert (await client.get(flags)).json() == {
        "enable_checkpoints": True, "enable_chunk_deltas": True,
        "enable_append_only_truncation": True, "enable_cold_scan": True,
        "checkpoint_interval_seconds": 0,
    }  # fmt: skip
    await create(client, "log")
    assert (await append(client, "log", 10)).status_code == 201
    changed = await client.patch(flags, json={"checkpoint_interval_seconds": 1})
    assert changed.json()["checkpoint_interval_seconds"] == 1

    async def published() -> bool:
        return (await client.get(path_of("log"))).json()["checkpointed_lsn"] == 1

    await wait_until(published, timeout=20)
    jobs = (await client.get("/checkpoints")).json()["items"]
    assert [job["reason"] for job in jobs] == ["timer"]

    body = {"tenant": "acme", "database": "log"}
    await client.patch(flags, json={"enable_checkpoints": False})
    refused = await client.post("/checkpoints", json=body)
    assert (refused.status_code, refused.json()["code"]) == (409, "feature_disabled")
    assert (await client.patch(flags, json={"enable_everything": True})).status_code == 422
    assert (await client.patch(flags, json={})).status_code == 422

    assert (await client.post("/admin/queue/drain")).json()["state"] == "drained"
    await checked.restart()
    client = checked.client
    assert (await client.get(flags)).json()["checkpoint_interval_seconds"] == 1
    await client.patch(
        flags, json={"enable_checkpoints": True, "checkpoint_interval_seconds": None}
    )
    assert (await client.get("/admin/queue")).json()["state"] == "drained"
    refused = await client.post("/checkpoints", json=body)
    assert (refused.status_code, refused.json()["code"]) == (409, "queue_drained")
    resumed = (await client.post("/admin/queue/resume")).json()
    assert (resumed["state"], resumed["pending"], resumed["in_flight"]) == ("open", 0, 0)
    await checkpoint(client, "log")


async def test_the_janitor_on_demand(checked: ServerProcess):
    client = checked.client
    dead = checked.data_dir / "checkpoint_scratch" / "01J0000000000000000000000A"
    dead.mkdir(parents=True)
    (dead / "chunk-0").write_bytes(b"x" * 1000)
    assert (await client.post("/admin/janitor/run", json={"max_age_seconds": 3600})).json()[
        "removed"
    ] == []
    assert (await quota(client))["global"]["used_bytes"] == 1000  # found, and accounted
    report = (await client.post("/admin/janitor/run")).json()
    assert (report["removed"], report["removed_bytes"]) == ([dead.name], 1000)
    assert not dead.exists()
    assert (await quota(client))["global"]["used_bytes"] == 0
