"""Truncations against checkpoints, crashes and stalls (fault rows 4, 41, 44).

Row 44: in every stage of a checkpoint a truncation waits for it, or cancels it and leaves a record
of that. Row 4: one that waits in vain ends in time and has changed nothing. Row 41: an executor
that was stopped beyond its lease publishes nothing with it. And kill -9 at every step of both.
"""

import json
import signal
import time
from pathlib import Path

import httpx
import pytest

from app.core.formats.record_framing import pack_records
from tests.conftest import MakeServer
from tests.helpers.failpoints import Failpoints, kill_at
from tests.helpers.leases import (
    lease_expiry_blocking,
    lease_tokens_blocking,
    take_lease_blocking,
)
from tests.helpers.numbered import (
    LOG,
    NAMES,
    Gate,
    append,
    changes,
    checkpoint,
    create,
    ended,
    job_of,
    readable,
    span,
    stop_and_check,
    truncate,
)
from tests.helpers.server import ServerProcess
from tests.helpers.wait import wait_until
from tests.helpers.workload import RECORDS, scratch_left

PAUSES = {
    "planning": "wal.before_seal",
    "reserving": "hot_cache.before_unlink",
    "staging": "stage.before_create_scratch",
    "uploading": "directory.before_place",
    "cleanup": "stage.before_remove_scratch",
    "publishing": "wal.before_remove",
}
"""Stages of a checkpoint, each with a step off the event loop. While it reserves, that is the cache
making room for it. At the last it has published.
"""


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


async def start_with_history(
    server: ServerProcess, failpoints: Failpoints, *, compression: str = "none"
) -> None:
    """LSNs 1 to 10 are published, 11 to 15 only in the WAL. What is compressed takes room when it
    is staged, else it is linked.
    """
    await server.start(failpoints=failpoints)
    await create(server.client, compression=compression)
    await append(server.client, 10)
    await checkpoint(server.client)
    await append(server.client, 5)


async def start_checkpoint(server: ServerProcess, gate: Gate, tenant: str = "acme") -> str:
    """Returns once it is held up at the gate."""
    gate.close()
    answer = await server.client.post("/checkpoints", json={**NAMES, "tenant": tenant})
    await wait_until(lambda: gate.is_reached, describe=lambda: f"the gate\n{server.log_tail()}")
    return answer.json()["id"]


async def leave_room(client: httpx.AsyncClient, size_bytes: int) -> None:
    """Of the quota, beside what is used now."""
    used_bytes = (await client.get("/debug/storage/quota")).json()["global"]["used_bytes"]
    answer = await client.put("/admin/quota", json={"global_bytes": used_bytes + size_bytes})
    assert answer.status_code == 200, answer.text


async def until_waiting(client: httpx.AsyncClient, job_id: str) -> None:
    async def waits() -> bool:
        job = await job_of(client, job_id)
        return (job["state"], job["stage"]) == ("in_flight", "waiting_for_lease")

    await wait_until(waits, describe="a truncation that waits")


async def assert_nothing_left(server: ServerProcess) -> None:
    assert (await server.client.get("/debug/checkpoint/leases")).json()["items"] == []
    assert (await server.client.get("/debug/storage/quota")).json()["jobs"] == []
    assert scratch_left(server.data_dir) == []


@pytest.mark.parametrize("on_lease", ["wait", "cancel"])
@pytest.mark.parametrize("stage", PAUSES)
async def test_truncation_in_each_stage_of_a_checkpoint(
    stage: str, on_lease: str, make_server: MakeServer, gate: Gate
):
    server = make_server()
    codec = "zstd" if stage == "reserving" else "none"
    await start_with_history(server, {PAUSES[stage]: {"action": gate.action}}, compression=codec)
    client = server.client
    if stage == "reserving":
        await leave_room(client, 1)
    checkpoint_id = await start_checkpoint(server, gate)
    if stage != "planning":
        assert (await job_of(client, checkpoint_id))["stage"] == stage
    if stage == "planning":  # the log is being sealed, which a tail truncation needs as well
        truncation_id = await truncate(client, "head", 11, on_lease=on_lease)
        expected = span(11, 15)
    else:
        lsn = 13 if stage == "publishing" else 8  # at most the newest chunk
        truncation_id = await truncate(client, "tail", lsn, on_lease=on_lease)
        expected = span(1, lsn - 1)
    await until_waiting(client, truncation_id)
    cancels = on_lease == "cancel" and stage != "publishing"
    if cancels:
        await wait_until(lambda: "job.cancel_requested" in server.log_tail())
    gate.open()
    truncation = await ended(client, truncation_id)
    assert truncation["state"] == "completed", truncation
    told = await ended(client, checkpoint_id)
    assert told["state"] == ("cancelled" if cancels else "completed"), told
    reasons = [change["reason"] for change in await changes(client)]
    assert reasons.count("checkpoint.published") == (1 if cancels else 2)
    assert reasons.count("checkpoint.cancelled_by_truncation") == (1 if cancels else 0)
    assert await readable(client) == expected
    await assert_nothing_left(server)
    await checkpoint(client)
    assert await readable(client) == expected
    assert (await client.get(LOG)).json()["checkpointed_lsn"] == 15
    await stop_and_check(server)


@pytest.mark.parametrize("on_lease", ["wait", "cancel"])
async def test_truncation_while_a_checkpoint_waits_for_room_that_another_holds(
    on_lease: str, make_server: MakeServer, gate: Gate
):
    """Refused its reservation, it has given its leases back: it is in nobody's way, so neither
    policy waits for it or ends it. It plans anew, and goes on when there is room.
    """
    server = make_server(
        settings={"BOP_DRAIN_RESERVE_BYTES": "1", "BOP_JOB_BACKOFF_CAP_SECONDS": "4"}
    )
    pause = {"stage.before_create_scratch": {"action": gate.action}}
    await start_with_history(server, pause, compression="zstd")
    client = server.client
    zstd = {"engine": "append_only", "compression": "zstd"}
    await client.put("/tenants/other/databases/log", json=zstd)
    answer = await client.post(
        "/tenants/other/databases/log/records",
        content=pack_records([b"one"]),
        headers={"Content-Type": RECORDS},
    )
    assert answer.status_code == 201, answer.text
    await leave_room(client, 0)
    holder_id = await start_checkpoint(server, gate, tenant="other")
    held = (await client.get("/debug/storage/quota")).json()
    assert [one["job_id"] for one in held["jobs"]] == [holder_id]
    checkpoint_id = (await client.post("/checkpoints", json=NAMES)).json()["id"]

    async def is_refused() -> bool:
        job = await job_of(client, checkpoint_id)
        return (job["state"], job["stage"]) == ("pending", "reserving")

    await wait_until(is_refused, describe="a checkpoint that waits for room")
    told = await job_of(client, checkpoint_id)
    assert told["error"]["code"] == "quota_exhausted"
    truncation = await ended(client, await truncate(client, "tail", 8, on_lease=on_lease))
    assert truncation["result"]["dropped"] == {"first_lsn": 8, "last_lsn": 15}
    assert await readable(client) == span(1, 7)
    assert (await job_of(client, checkpoint_id))["state"] in {"pending", "in_flight"}
    gate.open()
    for job_id in (holder_id, checkpoint_id):
        assert (await ended(client, job_id))["state"] == "completed"
    reasons = [change["reason"] for change in await changes(client)]
    assert "checkpoint.cancelled_by_truncation" not in reasons
    assert await readable(client) == span(1, 7)
    assert (await client.get(LOG)).json()["checkpointed_lsn"] == 15
    await assert_nothing_left(server)
    await stop_and_check(server)


async def test_truncation_blocks_on_lease(make_server: MakeServer, gate: Gate):
    """The plan's integration test 3: it waits while the lease lives, and goes on when it is gone.
    A checkpoint asked for meanwhile does not go first.
    """
    server = make_server()
    await start_with_history(server, {"directory.before_place": {"action": gate.action}})
    client = server.client
    first = await start_checkpoint(server, gate)
    leases = (await client.get("/debug/checkpoint/leases")).json()["items"]
    assert [(one["chunk_id"], one["job_id"]) for one in leases] == [(1, first)]
    truncation = await truncate(client, "tail", 12)
    await until_waiting(client, truncation)
    await append(client, 2)
    later = (await client.post("/checkpoints", json=NAMES)).json()["id"]
    assert (await job_of(client, later))["state"] == "pending"
    assert (await job_of(client, truncation))["stage"] == "waiting_for_lease"
    gate.open()
    assert (await ended(client, first))["state"] == "completed"
    result = (await ended(client, truncation))["result"]
    assert result["dropped"] == {"first_lsn": 12, "last_lsn": 15}
    assert (await ended(client, later))["result"]["last_lsn"] == 17
    assert await readable(client) == [*span(1, 11), 16, 17]
    await stop_and_check(server)


async def test_a_truncation_that_waits_in_vain_ends_in_time(make_server: MakeServer, gate: Gate):
    server = make_server()
    await start_with_history(server, {"directory.before_place": {"action": gate.action}})
    client = server.client
    checkpoint_id = await start_checkpoint(server, gate)
    before = (await client.get("/debug/manifest/change_log")).json()["items"]
    job = await ended(client, await truncate(client, "tail", 8, lease_timeout_seconds=0.3))
    assert (job["state"], job["error"]["code"]) == ("failed", "lease_timeout")
    assert job["error"]["holder"] == checkpoint_id
    after = (await client.get("/debug/manifest/change_log")).json()["items"]
    assert [one["reason"] for one in after[len(before) :]] == []
    assert await readable(client) == span(1, 15)
    gate.open()
    assert (await ended(client, checkpoint_id))["state"] == "completed"
    await stop_and_check(server)


async def test_a_waiting_truncation_can_be_cancelled(make_server: MakeServer, gate: Gate):
    server = make_server()
    await start_with_history(server, {"directory.before_place": {"action": gate.action}})
    client = server.client
    checkpoint_id = await start_checkpoint(server, gate)
    truncation = await truncate(client, "tail", 8, lease_timeout_seconds=600)
    await until_waiting(client, truncation)
    assert (await client.post(f"/jobs/{truncation}/cancel")).status_code == 202
    assert (await ended(client, truncation))["state"] == "cancelled"
    gate.open()
    assert (await ended(client, checkpoint_id))["state"] == "completed"
    assert await readable(client) == span(1, 15)
    await stop_and_check(server)


async def test_waiting_truncations_hold_up_neither_other_databases_nor_the_end(
    make_server: MakeServer, gate: Gate
):
    server = make_server(settings={"BOP_JOB_CONCURRENCY": "2"})
    await start_with_history(server, {"directory.before_place": {"action": gate.action}})
    client = server.client
    await start_checkpoint(server, gate)
    for lsn in (14, 13, 12):
        await until_waiting(client, await truncate(client, "tail", lsn))
    await client.put("/tenants/other/databases/empty", json={"engine": "append_only"})
    other = await client.post("/checkpoints", json={"tenant": "other", "database": "empty"})
    assert (await ended(client, other.json()["id"]))["state"] == "completed"
    gate.open()
    await server.restart(failpoints={})
    await _until_idle(server.client)
    assert await readable(server.client) == span(1, 11)
    await stop_and_check(server)


async def test_what_is_appended_after_acceptance_stays_over_a_crash(
    make_server: MakeServer, gate: Gate
):
    server = make_server()
    await start_with_history(server, {"directory.before_place": {"action": gate.action}})
    await start_checkpoint(server, gate)
    truncation = await truncate(server.client, "tail", 8)
    await until_waiting(server.client, truncation)
    await append(server.client, 3)
    await server.kill9()
    await server.start(failpoints={})
    job = await ended(server.client, truncation)
    assert job["result"]["dropped"] == {"first_lsn": 8, "last_lsn": 15}
    await _until_idle(server.client)
    assert await readable(server.client) == [*span(1, 7), *span(16, 18)]
    await stop_and_check(server)


ALONE = {
    "truncate.before_plan": 1,
    "truncate.before_commit": 1,
    "truncate.after_commit": 1,
    "publish.before_document": 2,
    "publish.after_document": 2,
    "wal.before_remove": 2,
    "wal.after_remove": 2,
    "publish.after_wal_release": 2,
}
"""Steps of a truncation with nothing in its way, and at which hit: a checkpoint went before it.
One of the head leaves the WAL's files alone.
"""

TOGETHER = (
    "truncate.before_wait",
    "truncate.after_cancel",
    "stage.after_intents",
    "upload.after_put",
    "cleanup.after_links",
    "publish.before_commit",
    "publish.after_commit",
    "publish.after_document",
)
"""Steps of a truncation and of the checkpoint in its way, which it waits for or cancels."""


TRUNCATIONS = {"tail": (8, span(8, 15)), "head": (11, span(1, 10))}
"""For each direction an LSN to truncate at, and what goes then."""


def kept_of(direction: str) -> list[int]:
    """Of the history and three records more."""
    _, dropped = TRUNCATIONS[direction]
    return [lsn for lsn in span(1, 18) if lsn not in dropped]


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        *((name, "tail") for name in ALONE),
        *((name, "head") for name in ALONE if "wal." not in name),
    ],
)
async def test_kill_at_each_step_of_a_truncation(
    name: str, direction: str, make_server: MakeServer
):
    server = make_server()
    await start_with_history(server, kill_at(name, nth=ALONE[name]))
    await _ask(server.client, direction)
    assert await server.wait_exit() == -signal.SIGKILL
    await server.start(failpoints={})
    await append(server.client, 3)
    await _until_idle(server.client)
    jobs = (await server.client.get("/truncations")).json()["items"]
    assert [job["state"] for job in jobs] == ["completed"]
    _, dropped = TRUNCATIONS[direction]
    assert jobs[0]["result"]["dropped"] == {"first_lsn": dropped[0], "last_lsn": dropped[-1]}
    assert await readable(server.client) == kept_of(direction)
    await checkpoint(server.client)
    assert await readable(server.client) == kept_of(direction)
    await stop_and_check(server)


@pytest.mark.parametrize("direction", TRUNCATIONS)
@pytest.mark.parametrize("name", TOGETHER)
async def test_kill_at_each_step_of_a_truncation_against_a_checkpoint(
    name: str, direction: str, make_server: MakeServer, gate: Gate
):
    """Held up in the pool, the checkpoint is in the way; killed where either comes to `name`."""
    on_lease = "cancel" if name == "truncate.after_cancel" else "wait"
    nth = 1 if name.startswith("truncate.") else 2
    server = make_server()
    pause = {"stage.before_create_scratch": {"action": gate.action}}
    await start_with_history(server, {**pause, **kill_at(name, nth=nth)})
    await start_checkpoint(server, gate)
    await _ask(server.client, direction, on_lease=on_lease)
    gate.open()
    assert await server.wait_exit() == -signal.SIGKILL
    await server.start(failpoints={})
    await append(server.client, 3)
    await _until_idle(server.client)
    jobs = (await server.client.get("/truncations")).json()["items"]
    assert [job["state"] for job in jobs] == ["completed"]
    assert await readable(server.client) == kept_of(direction)
    await checkpoint(server.client)
    assert await readable(server.client) == kept_of(direction)
    await assert_nothing_left(server)
    await stop_and_check(server)


async def test_a_checkpoint_stopped_beyond_its_lease_publishes_nothing_with_it(
    make_server: MakeServer, gate: Gate
):
    """Stopped on the brink of its publication, while another process takes the lease: the resumed
    executor's token is refused, to its renewal and inside the publishing transaction, whichever is
    told; it starts over.
    """
    server = make_server(settings={"BOP_LEASE_TTL_SECONDS": "2"})
    await start_with_history(server, {"publish.before_commit": {"action": gate.action}})
    checkpoint_id = await start_checkpoint(server, gate)
    server.pause()
    await wait_until(lambda: _is_stopped(server), describe="the stop")
    expires_at = lease_expiry_blocking(server.data_dir / "manifest")
    await wait_until(lambda: time.time() > expires_at, describe="the end of the lease")
    taken = take_lease_blocking(server.data_dir / "manifest", job_id="ANOTHER")
    gate.open()
    server.resume()
    job = await ended(server.client, checkpoint_id)
    assert job["state"] == "completed", job
    log = server.log_path.read_text()
    (replanned,) = [line for line in log.splitlines() if "checkpoint.replanning" in line]
    assert json.loads(replanned)["detail"].startswith("lease_lost: ")
    published = [
        change
        for change in await changes(server.client)
        if change["reason"] == "checkpoint.published"
    ]
    assert [change["generation"] for change in published] == [1, 2]
    assert lease_tokens_blocking(server.data_dir / "manifest") > taken, "published with a new token"
    assert await readable(server.client) == span(1, 15)
    await assert_nothing_left(server)
    await stop_and_check(server)


async def _ask(client: httpx.AsyncClient, direction: str, **fields: object) -> None:
    """The service may die before it answers."""
    lsn, _ = TRUNCATIONS[direction]
    asked = {**NAMES, "direction": direction, "lsn": lsn, **fields}
    try:
        await client.post("/truncations", json=asked)
    except httpx.TransportError:
        return


async def _until_idle(client: httpx.AsyncClient) -> None:
    async def idle() -> bool:
        return not (await client.get("/debug/checkpoint/active_jobs")).json()["items"]

    await wait_until(idle, timeout=30, describe="no job at work")


def _is_stopped(server: ServerProcess) -> bool:
    stat = Path(f"/proc/{server.pid}/stat").read_text()
    return stat.rpartition(")")[2].split()[0] == "T"
