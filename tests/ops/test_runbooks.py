"""Each runbook, run against a live service in the very trouble that its page is about.

A test is named after its page, brings a service into the trouble, and goes down the page block by
block: the trouble shows in what the commands say, and is over at the end. `on_call` sees that no
block is left out. The pages of the plan are here, the others in test_runbooks_of_alerts.
"""

import asyncio
import os
import re
from pathlib import Path
from typing import Any

import httpx

from tests.conftest import MakeServer
from tests.helpers.fault_proxy import Answer, FaultProxy, Rule
from tests.helpers.numbered import (
    LOG,
    NAMES,
    Gate,
    append,
    create,
    job_of,
    readable,
    span,
    stop_and_check,
)
from tests.helpers.runbooks import pages
from tests.helpers.server import ServerProcess
from tests.helpers.wait import wait_until
from tests.helpers.workload import ORPHAN, plant_orphan, scratch_left
from tests.ops import test_runbooks_of_alerts
from tests.ops.conftest import (
    ANN,
    CLEAN,
    OnCall,
    as_application,
    ended_checkpoint,
    page_of,
)

KIB = 1024
HELD_UP = "directory.before_place"
DISK_HANGS = "stage.before_create_scratch"
"""What a job must wait for, cancelled or not."""
"""A step of an upload to the embedded store, off the event loop."""


def test_every_page_is_run():
    tests = {*globals(), *vars(test_runbooks_of_alerts)}
    assert pages() <= {page_of(name) for name in tests if name.startswith("test_")}


async def checkpoint_held_up(server: ServerProcess, gate: Gate) -> str:
    """Its job's id, once it hangs."""
    gate.close()
    job_id = await checkpoint_asked_for(server)
    await wait_until(lambda: gate.is_reached, describe=lambda: f"the gate\n{server.log_tail()}")
    return job_id


async def checkpoint_asked_for(server: ServerProcess) -> str:
    answer = await server.client.post("/checkpoints", json=NAMES, headers=ANN)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


async def shown_job(server: ServerProcess, job_id: str) -> dict[str, Any]:
    return await job_of(server.client, job_id)


async def test_stuck_checkpoint(
    make_server: MakeServer, gate: Gate, tokens: dict[str, str], on_call: OnCall
):
    """The disk hangs, and a cancelled job waits for that; two people take its lease away."""
    server = make_server(settings=tokens, failpoints={DISK_HANGS: {"action": gate.action}})
    await server.start()
    client = as_application(server)
    await create(client)
    await append(client, 10)
    stuck = await checkpoint_held_up(server, gate)
    operator = on_call(server)
    told = await operator.next(JOB=stuck)
    assert "in_flight (staging)" in told
    assert told.count(stuck) == 2  # among the jobs, and as the lease's holder
    assert "cancel" not in (await shown_job(server, stuck))["state"]
    await operator.next()
    told = await operator.next(CHUNK="0")
    assert "pending" in told
    approval = re.search(r"approvals approve (\S+)'", told)
    assert approval is not None
    told = await operator.next(APPROVAL=approval[1])
    assert re.search(r"released +yes", told)
    gate.open()
    told = await operator.next()
    assert "No chunk is leased." in told
    assert CLEAN in told
    old = await shown_job(server, stuck)
    assert (old["state"], old["result"]) == ("cancelled", None)
    assert (await client.get(LOG)).json()["generation"] == 1
    assert await readable(client) == span(1, 10)
    await stop_and_check(server)


async def test_quota_exhaustion(make_server: MakeServer, tokens: dict[str, str], on_call: OnCall):
    """A client sends what its tenant's limit can never hold, again and again; the remains of a
    dead job lie about, too.
    """
    server = make_server(settings=tokens)
    await server.start()
    client = as_application(server)
    await create(client)
    await append(client, 10)
    plant_orphan(server.data_dir)
    answer = await client.put(
        "/admin/tenants/acme/quota", json={"limit_bytes": 100 * KIB}, headers=ANN
    )
    assert answer.status_code == 200, answer.text
    refused = 0

    async def taken() -> bool:
        nonlocal refused
        answer = await client.post(
            f"{LOG}/records", content=os.urandom(200 * KIB),
            headers={"Content-Type": "application/octet-stream"},
        )  # fmt: skip
        if answer.status_code == 201:
            return True
        assert (answer.status_code, answer.json()["code"]) == (507, "quota_exhausted")
        refused += 1
        return False

    async with asyncio.TaskGroup() as tasks:
        looping = tasks.create_task(wait_until(taken, timeout=90))
        await wait_until(lambda: refused >= 3, timeout=30)
        operator = on_call(server)
        told = await operator.next()
        assert re.search(r"limit +100.0 KiB", told)
        assert ORPHAN in told
        assert not looping.done()
        told = await operator.next(MORE_BYTES="65GiB")
        assert re.search(r"removed +1\b", told)
        assert re.search(r"global +65.0 GiB", told)
        assert re.search(r"\nlimit +none", told)
        await looping
    assert "completed" in await operator.next()
    assert CLEAN in await operator.next()
    assert scratch_left(server.data_dir) == []
    await stop_and_check(server)


async def test_truncation_blocked(
    make_server: MakeServer, gate: Gate, tokens: dict[str, str], on_call: OnCall
):
    """By waiting, once the checkpoint in the way has ended; then by cancelling another."""
    server = make_server(settings=tokens, failpoints={HELD_UP: {"action": gate.action}})
    await server.start()
    client = as_application(server)
    await create(client)
    for first in (1, 11):
        await append(client, 10)
        holder = await checkpoint_held_up(server, gate)
        if first == 1:
            gate.open()
            await wait_until_ended(client, holder)
    body = {**NAMES, "direction": "head", "lsn": 11, "lease_timeout_seconds": 0.2}
    blocked = (await client.post("/truncations", json=body)).json()["id"]
    await wait_until_ended(client, blocked)
    operator = on_call(server)
    told = await operator.next(JOB=blocked)
    assert "lease_timeout" in told
    assert holder in told
    assert await readable(client) == span(1, 20)

    gate.open()
    told = await operator.next(HOLDER=holder, LSN="11")
    assert re.search(r"First LSN +11\b", told)
    assert await readable(client) == span(11, 20)

    await append(client, 10)
    holder = await checkpoint_held_up(server, gate)
    running = asyncio.create_task(operator.next(LSN="21"))
    await wait_until(lambda: "job.cancel_requested" in server.log_tail(), timeout=30)
    gate.open()
    told = await running
    assert "checkpoint.cancelled_by_truncation" in told
    assert (await shown_job(server, holder))["state"] == "cancelled"
    told = await operator.next()
    assert re.search(r"LSNs +21-30", told)
    assert CLEAN in told
    assert await readable(client) == span(21, 30)
    await stop_and_check(server)


async def wait_until_ended(client: httpx.AsyncClient, job_id: str) -> None:
    async def ended() -> bool:
        return (await job_of(client, job_id))["state"] in {"completed", "failed"}

    await wait_until(ended, timeout=30)


async def test_s3_upload_failures(
    make_server: MakeServer, proxy: FaultProxy, s3_settings: dict[str, str],
    tokens: dict[str, str], on_call: OnCall,
):  # fmt: skip
    """503 and 429 to every upload, until the store has rested."""
    server = make_server(settings={**s3_settings, **tokens})
    await server.start()
    client = as_application(server)
    await create(client)
    await append(client, 10)
    proxy.add(Rule(method="PUT", path=r"/chunk-", action=Answer.slow_down(), times=2))
    proxy.add(Rule(method="PUT", path=r"/chunk-", action=Answer.too_many_requests(), times=None))
    job = await checkpoint_asked_for(server)

    async def degraded() -> bool:
        return bool((await client.get("/readyz")).json()["degraded"])

    await wait_until(degraded, timeout=60, describe=server.log_tail)
    operator = on_call(server)
    told = await operator.next(JOB=job)
    assert '"degraded":["remote"]' in told
    throttled = re.search(r"^remote_throttled_total (\d+)", told, re.MULTILINE)
    assert throttled is not None
    assert int(throttled[1]) >= 3
    assert job in told
    assert re.search(r"It (works|waits)", told)
    await append(client, 10)
    assert "900" in await operator.next()
    assert "drain" in await operator.next()
    proxy.clear()
    told = await operator.next()
    assert "completed" in told
    assert CLEAN in told
    assert (await shown_job(server, job))["state"] == "completed"
    assert (await client.get(LOG)).json()["checkpointed_lsn"] == 20
    assert not await degraded()
    assert await readable(client) == span(1, 20)
    await server.terminate()


async def test_manifest_corruption(
    make_server: MakeServer, tokens: dict[str, str], on_call: OnCall
):
    """Bytes of the stopped service's data.mdb flip; its backup is put back."""
    server = make_server(settings=tokens)
    await server.start()
    client = as_application(server)
    await create(client)
    await append(client, 10)
    await ended_checkpoint(client)
    await append(client, 5)
    operator = on_call(server)
    told = await operator.next()
    assert re.search(r"enable_checkpoints +off", told)
    backup = re.search(r"path +(\S+)", told)
    assert backup is not None
    change_log = operator.work / "change_log.json"
    assert "checkpoint.published" in change_log.read_text()
    await append(client, 3)
    await server.terminate()

    data = server.data_dir / "manifest" / "data.mdb"
    flip_rows(data, b"checkpoints/acme/log")
    told = await operator.next(fails=True)
    assert CLEAN not in told
    assert "Traceback" not in told
    assert CLEAN in await operator.next(BACKUP=backup[1])
    assert (data.parent.with_name("manifest.damaged") / "data.mdb").exists()

    await server.start()
    client = as_application(server)
    told = await operator.next()
    assert "completed" in told
    assert CLEAN in told
    database = (await client.get(LOG)).json()
    assert database["checkpointed_lsn"] == 18
    assert await readable(client) == span(1, 18)
    await stop_and_check(server)


def flip_rows(data: Path, of: bytes) -> None:
    """Every row that holds these bytes: they are no text any more."""
    content = data.read_bytes()
    assert of in content
    data.write_bytes(content.replace(of, bytes(each ^ 0xFF for each in of)))
