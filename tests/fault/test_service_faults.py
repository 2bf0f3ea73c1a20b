"""The service against its own machine: the manifest's disk and map, descriptors, clocks, signals,
copies of its data directory, files damaged at rest (rows 2, 14, 22, 42, 43, 47, 50, 53, 55).
"""

import asyncio
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
import lmdb
import msgspec
import pytest

from app.core.formats.record_framing import pack_records
from app.core.stores.manifest.ledger import LedgerEntry
from app.core.stores.manifest.tables import SCHEMA, ledger_key, meta_key
from tests.conftest import MakeServer
from tests.fault.conftest import requires_strace
from tests.helpers.failpoints import kill_at
from tests.helpers.launch import NewInterpreter
from tests.helpers.numbered import (
    LOG,
    NAMES,
    Gate,
    append,
    changes,
    checkpoint,
    create,
    ended,
    readable,
    span,
    stop_and_check,
)
from tests.helpers.server import ServerProcess
from tests.helpers.wait import wait_until
from tests.helpers.workload import RECORDS

FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
requires_faketime = pytest.mark.skipif(FAKETIME is None, reason="libfaketime is not installed")


@contextmanager
def failing_syncs(server: ServerProcess, log: Path, path: Path) -> Iterator[None]:
    """From now on each fdatasync of `path` fails, in whatever thread of the service."""
    command = [
        "strace", "-f", "-p", str(server.pid), "-o", os.devnull, "-P", str(path),
        "-e", "trace=fdatasync", "-e", "inject=fdatasync:error=EIO",
    ]  # fmt: skip
    with log.open("wb") as output, subprocess.Popen(command, stderr=output) as tracer:
        try:
            yield
        finally:
            tracer.terminate()


@requires_strace
async def test_a_manifest_that_fails_at_commit_ends_the_service_in_order(
    server: ServerProcess, tmp_path: Path
) -> None:
    """Row 2: no answer after it, no partial batch, and the job goes on in the next life."""
    await create(server.client)
    await append(server.client, 5)
    said = tmp_path / "strace"
    manifest = server.data_dir / "manifest" / "data.mdb"
    with failing_syncs(server, said, manifest):
        await wait_until(lambda: b"attached" in said.read_bytes(), describe="strace at work")
        try:
            answer = await server.client.post("/checkpoints", json=NAMES)
            assert answer.status_code >= 500, answer.text
        except httpx.TransportError:
            pass
        assert await server.wait_exit() == 1, server.log_tail()
    assert "manifest" in server.log_tail()
    await server.start()
    assert await readable(server.client) == span(1, 5)
    assert (await server.client.get("/debug/storage/quota")).json()["jobs"] == []
    done = await checkpoint(server.client)
    assert done["result"]["last_lsn"] == 5
    sequences = [change["sequence"] for change in await changes(server.client)]
    assert sorted(sequences) == span(1, len(sequences))
    await stop_and_check(server)


async def test_a_full_map_refuses_whole_batches_and_serves_on(make_server: MakeServer) -> None:
    """Row 14: 507, nothing half done, reads go on, and so does the next life."""
    server = make_server(settings={"BOP_MANIFEST_MAP_BYTES": str(1 << 20)})
    await server.start()
    await create(server.client)
    await server.terminate()
    with _schema(server.data_dir) as (transaction, table):
        transaction.put(meta_key("filler"), bytes(800 * 1024), db=table)
    await server.start()
    client = server.client
    made, refused = {"log"}, None
    while refused is None and len(made) < 5000:
        for number in range(len(made), len(made) + 50):
            name = f"{'n' * 50}{number}"
            answer = await client.put(
                f"/tenants/acme/databases/{name}", json={"engine": "append_only"}
            )
            if answer.status_code != 201:
                refused = answer
                break
            made.add(name)
    assert refused is not None, "the map took all of it"
    assert (refused.status_code, refused.json()["code"]) == (507, "manifest_full")
    assert await _databases(client) == made
    assert (await client.get("/readyz")).status_code == 200
    await stop_and_check(server)
    await server.start()
    assert await _databases(server.client) == made


async def _databases(client: httpx.AsyncClient) -> set[str]:
    page = await client.get("/tenants/acme/databases?limit=1000")
    assert page.status_code == 200, page.text
    assert page.json()["next_cursor"] is None
    return {one["database"] for one in page.json()["items"]}


async def test_wal_and_watermark_wait_for_the_document(make_server: MakeServer) -> None:
    """Row 22: killed when the manifest has the generation and the bucket has not yet been told."""
    server = make_server(failpoints=kill_at("publish.before_document"))
    await server.start()
    await create(server.client)
    await append(server.client, 5)
    with pytest.raises(httpx.TransportError):
        await ended(
            server.client, (await server.client.post("/checkpoints", json=NAMES)).json()["id"]
        )
    assert await server.wait_exit() == -signal.SIGKILL
    assert documents(server) == []
    assert wal_files(server) != []
    await server.start(failpoints={})
    job = (await server.client.get("/checkpoints")).json()["items"][0]
    assert (await ended(server.client, job["id"]))["state"] == "completed"
    assert len(documents(server)) == 1
    assert wal_files(server) == []
    assert (await server.client.get(LOG)).json()["checkpointed_lsn"] == 5
    assert await readable(server.client) == span(1, 5)
    await stop_and_check(server)


@requires_faketime
async def test_a_clock_that_jumps_changes_nothing_that_matters(
    make_server: MakeServer, tmp_path: Path
) -> None:
    """Row 42: an hour on, two hours back. A lease holds through it, appends go on, and collection
    waits for an operator.
    """
    clock, gate = tmp_path / "clock", Gate(tmp_path)
    clock.write_text("+0")
    server = make_server(
        launcher=NewInterpreter(),
        settings={
            "LD_PRELOAD": str(FAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(clock),
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DISABLE_SHM": "1",
            "NO_FAKE_STAT": "1",
            "BOP_GC_GRACE_SECONDS": "60",
        },
        failpoints={"directory.before_place": {"action": gate.action}},
    )
    await server.start()
    client = server.client

    async def set_clock(seconds: int) -> None:
        clock.write_text(f"{seconds:+d}")

        async def is_set() -> bool:
            told = (await client.get("/healthz")).headers["Date"]
            return abs(parsedate_to_datetime(told).timestamp() - time.time() - seconds) < 300

        await wait_until(is_set, describe="the service's clock")

    other = "/tenants/acme/databases/gone"
    await client.put(other, json={"engine": "append_only"})
    headers = {"Content-Type": RECORDS}
    await client.post(f"{other}/records", content=pack_records([b"x"]), headers=headers)
    job = (await client.post("/checkpoints", json={**NAMES, "database": "gone"})).json()
    assert (await ended(client, job["id"]))["state"] == "completed"
    await client.delete(other)
    (retired,) = stored(server, "checkpoints")

    async def is_doomed() -> bool:
        told = (await client.post("/admin/gc/run", json={})).json()
        return told["waiting_blobs"] > 0

    await wait_until(is_doomed, describe="a blob in its grace period")
    await create(client)
    for seconds in (3600, -3600):
        await append(client, 2)
        gate.close()
        held = (await client.post("/checkpoints", json=NAMES)).json()["id"]
        await wait_until(lambda: gate.is_reached, describe="an upload under way")
        await set_clock(seconds)
        await append(client, 1)
        gate.open()
        job = await ended(client, held)
        assert (job["state"], job["attempts"]) == ("completed", 1), job
        told = (await client.post("/admin/gc/run", json={})).json()
        assert (told["paused"], told["deleted_blobs"]) == (True, 0), told
        assert retired in stored(server, "checkpoints")
    assert "checkpoint.replanning" not in server.log_path.read_text()
    assert await readable(client) == span(1, 6)
    accepted = (await client.post("/admin/gc/run", json={"accept_clock": True})).json()
    assert (accepted["paused"], accepted["deleted_blobs"]) == (False, 0)
    await stop_and_check(server)


async def test_an_older_copy_of_the_data_directory_is_refused(make_server: MakeServer) -> None:
    """Row 43: its LSNs were given out again otherwise. `recover` has all that was published."""
    server = make_server()
    await server.start()
    await create(server.client)
    await append(server.client, 5)
    await checkpoint(server.client)
    await append(server.client, 1)
    await server.terminate()
    older = server.data_dir.with_name("older")
    shutil.copytree(server.data_dir, older, ignore=shutil.ignore_patterns("remote"))
    await server.start()
    await append(server.client, 4)
    await checkpoint(server.client)
    await server.terminate()
    newest = server.data_dir.with_name("newest")
    server.data_dir.rename(newest)
    older.rename(server.data_dir)
    shutil.copytree(newest / "remote", server.data_dir / "remote")
    owner = (server.data_dir / "remote" / "owner.json").read_bytes()
    await server.start(wait="launched")
    assert await server.wait_exit() == 1
    told = server.log_tail()
    assert "acme/log is at generation 1 here" in told
    assert "bop-checkpoint recover" in told
    assert (server.data_dir / "remote" / "owner.json").read_bytes() == owner
    shutil.rmtree(server.data_dir)
    newest.rename(server.data_dir)
    await server.start()
    assert await readable(server.client) == span(1, 10)
    await stop_and_check(server)


async def test_out_of_descriptors_is_unavailable_and_passes(server: ServerProcess) -> None:
    """Row 47."""
    await create(server.client)
    await append(server.client, 3)
    soft, hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    await server.client.put(f"{LOG}-two", json={"engine": "append_only"})
    body = pack_records([b"x"])
    headers = {"Content-Type": RECORDS}
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (3, hard))
    try:
        refused = await server.client.post(f"{LOG}-two/records", content=body, headers=headers)
        assert (refused.status_code, refused.json()["code"]) == (503, "not_ready"), refused.text
        assert int(refused.headers["Retry-After"]) >= 1
        assert (await append(server.client, 1))["last_lsn"] == 4  # its segment is open already
    finally:
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (soft, hard))
    taken = await server.client.post(f"{LOG}-two/records", content=body, headers=headers)
    assert (taken.status_code, taken.json()["first_lsn"]) == (201, 1)
    assert (await server.client.get("/readyz")).status_code == 200
    await checkpoint(server.client)
    assert await readable(server.client) == span(1, 4)
    await stop_and_check(server)


async def test_a_manifest_of_the_future_is_refused_and_left_alone(server: ServerProcess) -> None:
    """Row 50."""
    await create(server.client)
    await append(server.client, 2)
    await server.terminate()
    step = msgspec.msgpack.encode(LedgerEntry(name="of_the_future", applied_at_us=1))
    with _schema(server.data_dir) as (transaction, table):
        transaction.put(ledger_key(9999), step, db=table)
    path = server.data_dir / "manifest" / "data.mdb"
    before = path.read_bytes()
    await server.start(wait="launched")
    assert await server.wait_exit() == 1
    assert "of_the_future" in server.log_tail()
    assert path.read_bytes() == before
    with _schema(server.data_dir) as (transaction, table):
        transaction.delete(ledger_key(9999), db=table)
    await server.start()
    assert await readable(server.client) == span(1, 2)
    await stop_and_check(server)


async def test_a_damaged_cache_file_is_fetched_again(server: ServerProcess) -> None:
    """Row 53: never served, dropped, and the bucket's copy is."""
    await create(server.client)
    await append(server.client, 50)
    await checkpoint(server.client)
    (cached,) = [path for path in (server.data_dir / "hot_cache").rglob("*") if path.is_file()]
    data = bytearray(cached.read_bytes())
    data[len(data) // 3] ^= 8
    cached.unlink()  # its other link is the bucket's object here
    cached.write_bytes(data)
    assert await readable(server.client) == span(1, 50)
    assert not cached.exists() or cached.read_bytes() != data
    await stop_and_check(server)


async def test_a_key_replayed_by_two_clients_has_one_effect(
    make_server: MakeServer, tmp_path: Path
) -> None:
    """Row 55: during the first, after it, and in a later life."""
    gate = Gate(tmp_path)
    server = make_server(failpoints={"wal.before_write": {"action": gate.action}})
    await server.start()
    await create(server.client)
    gate.close()

    async def send(client: httpx.AsyncClient) -> tuple[int, Any]:
        answer = await client.post(
            f"{LOG}/records",
            content=pack_records([b"once"]),
            headers={"Content-Type": RECORDS, "Idempotency-Key": "the-key"},
        )
        return answer.status_code, answer.json()

    async with httpx.AsyncClient(base_url=server.base_url, trust_env=False, timeout=30) as other:
        first = asyncio.ensure_future(send(server.client))
        await wait_until(lambda: gate.is_reached, describe="the first at the disk")
        second = asyncio.ensure_future(send(other))
        await other.get("/healthz")  # the second has been read by now
        gate.open()
        answers = [await first, await second, await send(other)]
    assert answers[0][0] == 201
    assert answers == [answers[0]] * 3
    await server.kill9()
    await server.start(failpoints={})
    assert await send(server.client) == answers[0]
    assert (await server.client.get(LOG)).json()["next_lsn"] == 2
    await stop_and_check(server)


def documents(server: ServerProcess) -> list[str]:
    return stored(server, "generations")


def stored(server: ServerProcess, folder: str) -> list[str]:
    root = server.data_dir / "remote" / folder
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def wal_files(server: ServerProcess) -> list[Path]:
    return list((server.data_dir / "wal").rglob("*.wal"))


@contextmanager
def _schema(data_dir: Path) -> Iterator[tuple[lmdb.Transaction, Any]]:
    """The manifest's own table, written past the service."""
    environment = lmdb.open(str(data_dir / "manifest"), max_dbs=64, map_size=1 << 28, create=False)
    try:
        table = environment.open_db(SCHEMA.stored_name, create=False)
        with environment.begin(write=True) as transaction:
            yield transaction, table
    finally:
        environment.close()
