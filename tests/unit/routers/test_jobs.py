"""Checkpoints and jobs: trigger, list, look, wait, cancel, follow."""

import asyncio
import json

import pytest

from app.core.base.errors import Backpressure, FeatureDisabled
from app.core.stores.manifest.records import JobFailure, Progress
from app.routers import sse
from app.routers.sse import EventStream, ServerEvent
from app.routers.waiting import Stopping
from tests.helpers.fake_clock import FakeClock
from tests.helpers.wait import wait_until
from tests.unit.routers.asgi import RawExchange
from tests.unit.routers.conftest import Running

BODY = {"tenant": "acme", "database": "events"}


async def test_trigger(client, service):
    answer = await client.post("/checkpoints", json={**BODY, "reason": "upgrade"})
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/checkpoints/{job['id']}"
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.headers["content-type"] == "application/json"
    assert job == {
        "id": job["id"],
        "kind": "create_checkpoint",
        "tenant": "acme",
        "database": "events",
        "state": "pending",
        "stage": None,
        "progress": {
            "staged_chunks": 0,
            "uploaded_blobs": 0,
            "total_chunks": 0,
            "uploaded_bytes": 0,
            "total_bytes": 0,
        },
        "attempts": 0,
        "reason": "upgrade",
        "created_at": "2025-11-23T21:05:00.000001Z",
        "started_at": None,
        "finished_at": None,
        "error": None,
        "result": None,
    }
    assert service.job_records[job["id"]].principal == "local"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"tenant": "acme"},
        {**BODY, "force": True},
        {**BODY, "tenant": "../x"},
        {**BODY, "reason": 5},
        {**BODY, "reason": "x" * 1025},
    ],
)
async def test_bodies_that_are_refused(client, service, body):
    answer = await client.post("/checkpoints", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert service.job_records == {}


async def test_missing_database(client):
    answer = await client.post("/checkpoints", json={**BODY, "database": "nothing"})
    assert (answer.status_code, answer.json()["code"]) == (404, "database_not_found")


async def test_a_key_gives_the_first_answer_again(client, service):
    key = {"Idempotency-Key": "k"}
    first = await client.post("/checkpoints", json=BODY, headers=key)
    again = await client.post("/checkpoints", json=BODY, headers=key)
    assert again.status_code == 202
    assert again.content == first.content
    assert again.headers["location"] == first.headers["location"]
    assert again.headers["content-type"] == "application/json"
    assert len(service.job_records) == 1
    assert service.committed[0].record.body == first.content  # in the job's own commit
    other = await client.post("/checkpoints", json={**BODY, "reason": "x"}, headers=key)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")


async def test_a_replay_during_the_first_waits_for_it(client, service, monkeypatch):
    go, trigger = asyncio.Event(), service.services.checkpoints.trigger

    async def slow(*args, **kwargs):
        await go.wait()
        return await trigger(*args, **kwargs)

    monkeypatch.setattr(service.services.checkpoints, "trigger", slow)
    key = {"Idempotency-Key": "k"}
    both = [
        asyncio.create_task(client.post("/checkpoints", json=BODY, headers=key)) for _ in range(2)
    ]
    await wait_until(lambda: service.idempotency_locks)
    go.set()
    first, second = await asyncio.gather(*both)
    assert first.content == second.content
    assert len(service.job_records) == 1


async def test_lasting_refusals_are_remembered_and_passing_ones_are_not(client, service):
    service.failing["checkpoints.trigger"] = FeatureDisabled(flag="enable_checkpoints")
    lasting, passing = {"Idempotency-Key": "lasting"}, {"Idempotency-Key": "passing"}
    refused = await client.post("/checkpoints", json=BODY, headers=lasting)
    assert (refused.status_code, refused.json()["code"]) == (409, "feature_disabled")
    service.failing["checkpoints.trigger"] = Backpressure(retry_after_seconds=3)
    busy = await client.post("/checkpoints", json=BODY, headers=passing)
    assert (busy.status_code, busy.headers["retry-after"]) == (429, "3")
    service.failing.clear()
    again = await client.post("/checkpoints", json=BODY, headers=lasting)
    assert (again.status_code, again.content) == (409, refused.content)
    assert again.headers["content-type"] == "application/problem+json"
    assert (await client.post("/checkpoints", json=BODY, headers=passing)).status_code == 202


@pytest.mark.parametrize("key", ["", "a b", "k" * 256])
async def test_keys_that_are_refused(client, service, key):
    answer = await client.post("/checkpoints", json=BODY, headers={"Idempotency-Key": key})
    assert answer.status_code == 422
    assert service.job_records == {}


async def test_lists_are_filtered(client, service):
    old = service.add_job(state="completed")
    other = service.add_job(kind="verify_manifest")
    foreign = service.add_job(tenant="zeta", database="x")

    async def ids(path):
        return [job["id"] for job in (await client.get(path)).json()["items"]]

    assert await ids("/jobs") == [foreign.job_id, other.job_id, old.job_id]
    assert await ids("/checkpoints") == [foreign.job_id, old.job_id]
    assert await ids("/jobs?kind=verify_manifest") == [other.job_id]
    assert await ids("/jobs?tenant=zeta&database=x") == [foreign.job_id]
    assert await ids("/checkpoints?state=completed") == [old.job_id]
    assert await ids("/jobs?state=completed&state=pending&limit=1") == [foreign.job_id]
    for query in ("state=done", "kind=x", "tenant=BAD"):
        assert (await client.get(f"/jobs?{query}")).status_code == 422


async def test_a_job_of_another_kind_is_no_checkpoint(client, service):
    job = service.add_job(kind="verify_manifest")
    assert (await client.get(f"/jobs/{job.job_id}")).status_code == 200
    for method, path in (("GET", ""), ("POST", "/cancel"), ("GET", "/events")):
        answer = await client.request(method, f"/checkpoints/{job.job_id}{path}")
        assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found")


async def test_a_failed_jobs_error_is_a_problem(client, service):
    failure = JobFailure(
        kind="unavailable",
        code="deadline_exceeded",
        title="The job ran out of time",
        detail="It did.",
        fields={"seconds": 5, "status": "not to hide the real one"},
    )
    job = service.add_job(
        state="failed", error=failure, result={"digest": b"\x01"}, request_id="asked-1"
    )
    shown = (await client.get(f"/jobs/{job.job_id}")).json()
    assert shown["error"] == {
        "type": "urn:bop:problem:deadline_exceeded",
        "title": "The job ran out of time",
        "status": 503,
        "detail": "It did.",
        "code": "deadline_exceeded",
        "request_id": "asked-1",
        "seconds": 5,
    }
    assert shown["result"] == {"digest": "01"}
    own = service.add_job(state="failed", error=failure)
    assert (await client.get(f"/jobs/{own.job_id}")).json()["error"]["request_id"] is None


async def test_waiting_for_a_job(client, service):
    job = service.add_job()
    at_once = await client.get(f"/jobs/{job.job_id}?wait=0.001")
    assert at_once.json()["state"] == "pending"
    waiting = asyncio.create_task(client.get(f"/checkpoints/{job.job_id}?wait=60"))
    await wait_until(lambda: service.waiting)
    await service.update_job(job.job_id, state="in_flight", stage="uploading")
    await service.update_job(job.job_id, state="completed", stage=None)
    assert (await waiting).json()["state"] == "completed"
    assert (await client.get(f"/jobs/{job.job_id}?wait=61")).status_code == 422


async def test_cancel(client, service):
    job = service.add_job()
    answer = await client.post(f"/checkpoints/{job.job_id}/cancel")
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/checkpoints/{job.job_id}"
    assert "retry-after" in answer.headers
    answer = await client.post(f"/jobs/{job.job_id}/cancel")
    assert (answer.status_code, answer.json()["code"]) == (409, "job_already_ended")
    answer = await client.post("/jobs/nothing/cancel")
    assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found")


# --- events


def events_of(content: bytes) -> list[tuple[str, dict]]:
    found = []
    for block in content.decode().strip().split("\n\n"):
        if block.startswith(":"):
            continue
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((fields["event"], json.loads(fields["data"])))
    return found


async def test_events_follow_a_job_to_its_end(running: Running):
    service = running.service
    job = service.add_job()
    raw = RawExchange("GET", f"/checkpoints/{job.job_id}/events").body(b"")
    following = asyncio.create_task(raw.run(running.app))
    await wait_until(lambda: len(raw.sent) == 2)
    await service.update_job(job.job_id, state="in_flight", stage="staging")
    await wait_until(lambda: len(raw.sent) == 3)
    await service.update_job(job.job_id, progress=Progress(staged_chunks=1, total_chunks=1))
    await wait_until(lambda: len(raw.sent) == 4)
    await service.update_job(job.job_id, state="completed", stage=None)
    await following
    assert raw.status == 200
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert raw.complete
    seen = events_of(raw.content)
    assert [name for name, _ in seen] == ["changed", "changed", "changed", "ended"]
    assert [job["state"] for _, job in seen] == ["pending", "in_flight", "in_flight", "completed"]
    assert seen[2][1]["progress"]["staged_chunks"] == 1
    assert service.waiting == 0


async def test_events_of_an_ended_job_are_one(client, service):
    job = service.add_job(state="cancelled")
    answer = await client.get(f"/checkpoints/{job.job_id}/events")
    assert [name for name, _ in events_of(answer.content)] == ["ended"]
    assert (await client.get("/checkpoints/nothing/events")).status_code == 404


async def test_a_follower_that_leaves_is_let_go(running: Running):
    job = running.service.add_job()
    raw = RawExchange("GET", f"/checkpoints/{job.job_id}/events").body(b"")
    following = asyncio.create_task(raw.run(running.app))
    await wait_until(lambda: running.service.waiting)
    raw.leave()
    await following
    assert running.service.waiting == 0


async def test_followers_end_when_the_service_stops(running: Running):
    job = running.service.add_job()
    raw = RawExchange("GET", f"/checkpoints/{job.job_id}/events").body(b"")
    following = asyncio.create_task(raw.run(running.app))
    await wait_until(lambda: running.service.waiting)
    running.desk.begin_shutdown()
    await following
    assert raw.complete
    assert "ended" not in [name for name, _ in events_of(raw.content)]


async def test_silence_is_broken_by_pings():
    clock, go = FakeClock(), asyncio.Event()

    async def source():
        await go.wait()
        yield ServerEvent(name="ended", data=b"{}")

    raw = RawExchange("GET", "/events").body(b"")

    async def check():
        checks.append(None)

    checks: list[None] = []
    stream = EventStream(source(), clock=clock, stopping=Stopping(), check=check)
    sending = asyncio.create_task(stream(raw.scope, raw.receive, raw.send))
    for count in (1, 2):
        await clock.until_sleeping()
        clock.advance(sse.PING_SECONDS)
        await wait_until(lambda count=count: len(raw.sent) == 1 + count)
    go.set()
    await sending
    assert raw.content == b": ping\n\n" * 2 + b"id: 1\nevent: ended\ndata: {}\n\n"
    assert len(checks) == 2
