"""The runbooks that only alerts lead to, run like those of the plan in test_runbooks."""

import os
import random
import re
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import httpx

from app.core.formats.record_framing import pack_records
from tests.conftest import MakeServer
from tests.helpers.fault_proxy import Answer, Delay, FaultProxy, Rule
from tests.helpers.launch import NewInterpreter
from tests.helpers.numbered import LOG, append, create, readable, span, stop_and_check
from tests.helpers.scans import records, scan
from tests.helpers.wait import wait_until
from tests.helpers.workload import RECORDS
from tests.ops.conftest import ANN, CLEAN, OnCall, as_application, ended_checkpoint

DAY_SECONDS = 86_400


async def test_service_not_ready(
    make_server: MakeServer, proxy: FaultProxy, s3_settings: dict[str, str],
    tokens: dict[str, str], on_call: OnCall,
):  # fmt: skip
    """The remote store turns everything away, so that the prefix cannot be claimed."""
    outage = Rule(action=Answer.slow_down(), times=None)
    proxy.add(outage)
    server = make_server(settings={**s3_settings, **tokens})
    await server.start(wait="alive")
    client = as_application(server)
    operator = on_call(server)

    async def tried() -> bool:
        return "remote" in (await client.get("/readyz")).text

    await wait_until(tried, timeout=30, describe=server.log_tail)
    told = await operator.next()
    assert '"status":"starting"' in told
    await create(client)
    await append(client, 3)
    proxy.clear()
    await server.wait_serving("/readyz", timeout=60)
    told = await operator.next()
    assert '"status":"ready"' in told
    assert CLEAN in told
    assert await readable(client) == span(1, 3)


async def test_unpublished_wal(make_server: MakeServer, tokens: dict[str, str], on_call: OnCall):
    """Someone drained the queue and switched the tenant's checkpoints off."""
    server = make_server(settings=tokens)
    await server.start()
    client = as_application(server)
    await create(client)
    await append(client, 10)
    flags = "/admin/tenants/acme/feature-flags"
    await client.patch(flags, json={"enable_checkpoints": False}, headers=ANN)
    await client.post("/admin/queue/drain", headers=ANN)
    operator = on_call(server)
    told = await operator.next()
    assert '"database":"log"' in told
    assert re.search(r"state +drained", told)
    assert re.search(r"enable_checkpoints +off", told)
    assert "There are no such jobs." in told
    assert "completed" in await operator.next()
    told = await operator.next()
    assert re.search(r"Checkpointed LSN +10\b", told)
    assert CLEAN in told
    await stop_and_check(server)


async def test_unhealthy_database(make_server: MakeServer, tokens: dict[str, str], on_call: OnCall):
    """Two blobs rot, of one of which the hot cache has a copy; and another database's WAL is gone
    with what was not published.
    """
    server = make_server(settings=tokens)
    await server.start()
    client = as_application(server)
    keys = await published_chunks(client)
    lost = "/tenants/acme/databases/lost"
    await client.put(lost, json={"engine": "append_only"})
    await append_random(client, lost, 1)
    db_id = (await client.get(lost)).json()["db_id"]
    await server.terminate()
    shutil.rmtree(server.data_dir / "wal" / str(db_id))
    mended, rotten = (server.data_dir / "remote" / key for key in keys)
    sound = rotten.read_bytes()
    for path in (mended, rotten):
        rot(path)
    digest = rotten.stem.rpartition("-")[2]
    [cached] = (server.data_dir / "hot_cache").rglob(f"*{digest}*")
    cached.unlink()
    await server.start()
    client = as_application(server)
    asked = await client.post(
        "/admin/verifications", json={"tenant": "acme", "database": "log"}, headers=ANN
    )
    await client.get(f"/jobs/{asked.json()['id']}?wait=30")

    operator = on_call(server)
    assert re.search(r"Health +unhealthy_generation", await operator.next())
    told = await operator.next(fails=True)
    assert "corrupt_blob" in told
    assert re.search(rf"damaged +{re.escape(keys[1])}", told)
    assert keys[0] not in told  # the first verification had put it back from the hot cache
    rotten.write_bytes(sound)
    assert "completed" in await operator.again()
    refused = await client.post(f"{lost}/records", content=b"x")
    assert refused.json()["code"] == "wal_lost"
    assert re.search(r"Health +ok", await operator.next(LOST_DATABASE="lost"))
    told = await operator.next()
    assert re.search(r"Health +ok", told)
    assert CLEAN in told
    await append_random(client, lost, 1)
    await stop_and_check(server)


async def test_slow_reads(
    make_server: MakeServer, proxy: FaultProxy, s3_settings: dict[str, str],
    tokens: dict[str, str], on_call: OnCall, tmp_path: Path,
):  # fmt: skip
    """A restart with an empty hot cache, and a store that takes its time."""
    server = make_server(settings={**s3_settings, **tokens, "BOP_PAGE_CACHE_BYTES": "0"})
    await server.start()
    client = as_application(server)
    app = "/tenants/acme/databases/app"
    await client.put(app, json={"engine": "libsql"})
    assert (await client.put(f"{app}/image", content=sqlite_file(tmp_path))).status_code == 200
    await ended_checkpoint(client, "app")
    await server.terminate()
    shutil.rmtree(server.data_dir / "hot_cache")
    await server.start()
    client = as_application(server)
    proxy.add(Rule(method="GET", path=r"/chunk-", action=Delay(seconds=1.1), times=2))
    assert (await client.get(f"{app}/pages/2")).headers["Bop-Tier"] == "remote"

    operator = on_call(server)
    operator.variables["DATABASE"] = "app"
    told = await operator.next()
    fetches, seconds = (
        float(re.findall(rf'latency_seconds_{what}{{tier="remote"}} ([\d.]+)', told)[0])
        for what in ("count", "sum")
    )
    assert seconds / fetches > 0.5
    assert '"hot_cache"' in told
    assert "completed" in await operator.next()
    assert (await client.get(f"{app}/pages/3")).headers["Bop-Tier"] == "local"
    told = await operator.next()
    assert re.search(r'count{tier="local"} [1-9]', told)
    assert CLEAN in told
    await server.terminate()


async def test_cold_scan_bandwidth(
    make_server: MakeServer, tokens: dict[str, str], on_call: OnCall
):
    """A scan goes on. (That a limiter fails has no test: it would be a fault of the service.)"""
    server = make_server(settings=tokens)
    await server.start()
    client = as_application(server)
    await published_chunks(client, count=4)
    asked = {"tenant": "acme", "database": "log"}
    operator = on_call(server)
    async with client.stream(
        "GET", "/cold-scan", params={**asked, "max_bytes_per_second": 60_000}
    ) as running:
        assert running.status_code == 200
        pieces = running.aiter_raw()
        await anext(pieces)
        told = await operator.next()
        assert re.search(r'remote_bytes_read_total{mode="cold"} [1-9]', told)
        assert re.search(r"cold_scans_active 1", told)
        assert re.search(r"enable_cold_scan +on", told)
        assert re.search(r"enable_cold_scan +off", await operator.next())
        refused = await client.get("/cold-scan", params=asked)
        assert refused.json()["code"] == "feature_disabled"

    async def is_over() -> bool:
        return "\ncold_scans_active 0" in (await client.get("/metrics")).text

    await wait_until(is_over)
    told = await operator.next()
    assert "cold_scans_active 0" in told
    assert re.search(r"enable_cold_scan +on", told)
    assert CLEAN in told
    assert len(records(await scan(client, database="log"))) == 36
    await stop_and_check(server)


async def test_collection_stalled(
    make_server: MakeServer, tokens: dict[str, str], on_call: OnCall, tmp_path: Path
):
    """The wall clock jumps by an hour under the service. An upload had landed too late besides."""
    ahead = tmp_path / "ahead"
    ahead.write_text("0")
    server = make_server(
        launcher=NewInterpreter(module="tests.helpers.moved_clock"),
        settings={**tokens, "MOVED_CLOCK": str(ahead), "BOP_GC_GRACE_SECONDS": "0"},
    )
    await server.start()
    client = as_application(server)
    known, _ = await published_chunks(client)
    orphan = (server.data_dir / "remote" / known).with_name(f"chunk-7-1-{'ab' * 32}.blob")
    orphan.write_bytes(b"too late")
    landed = time.time() - 2 * DAY_SECONDS
    os.utime(orphan, (landed, landed))
    assert (await client.post("/admin/gc/run", json={}, headers=ANN)).json()["paused"] is False
    ahead.write_text("3600")
    await client.post("/admin/gc/run", json={}, headers=ANN)

    operator = on_call(server)
    told = await operator.next(fails=True)
    assert re.search(r"^gc_paused 1", told, re.MULTILINE)
    assert "Collection is paused" in told
    assert "paused" not in await operator.next()
    told = await operator.next()
    assert told.count("orphans") == 2
    assert "1, 8 B" in told
    await client.post("/admin/gc/run", json={}, headers=ANN)
    assert not orphan.exists()
    told = await operator.next()
    assert re.search(r"^gc_paused 0", told, re.MULTILINE)
    assert re.search(r"^gc_lag_seconds 0", told, re.MULTILINE)
    assert CLEAN in told


async def published_chunks(client: httpx.AsyncClient, *, count: int = 2) -> list[str]:
    """A log of that many chunks; their keys."""
    await create(client, chunk_bytes=65_536)
    await append_random(client, LOG, count)
    job = await ended_checkpoint(client)
    return [chunk["blob_key"] for chunk in job["result"]["chunks"]]


async def append_random(client: httpx.AsyncClient, path: str, chunks: int) -> None:
    source = random.Random(1)
    for _ in range(chunks):
        body = pack_records([source.randbytes(6000) for _ in range(9)])
        answer = await client.post(
            f"{path}/records", content=body, headers={"Content-Type": RECORDS}
        )
        assert answer.status_code == 201, answer.text


def rot(path: Path) -> None:
    """As bit rot would: whoever holds a link to the file keeps what it was."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.unlink()
    path.write_bytes(data)


def sqlite_file(directory: Path) -> bytes:
    path = directory / "app.db"
    source = random.Random(1)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE row (body)")
        rows = [(source.randbytes(3000),) for _ in range(20)]
        connection.executemany("INSERT INTO row VALUES (?)", rows)
        connection.commit()
    return path.read_bytes()
