"""Retention, snapshots and forks at the HTTP edge."""

import pytest

from app.core.base.errors import GenerationExpired, NoGeneration
from tests.unit.routers.conftest import Running, bearer

BASE = "/tenants/acme/databases/events"
SNAPSHOT = {
    "name": "one",
    "generation": 4,
    "last_lsn": 90,
    "page_count": 3,
    "created_at": "2025-11-23T21:05:00.000000Z",
}


async def test_retention_is_changed_field_by_field(client):
    answer = await client.patch(BASE, json={"retention": {"keep_generations": 7}})
    assert answer.status_code == 200
    assert answer.json()["retention"] == {
        "keep_generations": 7, "keep_seconds": 86_400, "minimum_generations": 2,
    }  # fmt: skip
    body = {"retention": {"keep_generations": None, "keep_seconds": None, "minimum_generations": 1}}
    assert (await client.patch(BASE, json=body)).json()["retention"] == body["retention"]
    assert (await client.get(BASE)).json()["retention"] == body["retention"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"retention": None},
        {"retention": {}, "engine": "libsql"},
        {"retention": {"minimum_generations": 0}},
        {"retention": {"minimum_generations": None}},
        {"retention": {"keep_generations": 0}},
        {"retention": {"keep_seconds": -1}},
        {"retention": {"keep_seconds": 1.5}},
        {"retention": {"keep_seconds": "60"}},
        {"retention": {"keep_days": 3}},
    ],
)
async def test_retention_that_is_refused(client, body):
    answer = await client.patch(BASE, json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


async def test_a_snapshot_is_made_shown_listed_and_deleted(client):
    made = await client.post(f"{BASE}/snapshots", json={"name": "one", "generation": 4})
    assert (made.status_code, made.json()) == (201, SNAPSHOT)
    assert made.headers["location"] == f"{BASE}/snapshots/one"
    await client.post(f"{BASE}/snapshots", json={"name": "two"})
    page = await client.get(f"{BASE}/snapshots?limit=1")
    assert page.json()["items"] == [SNAPSHOT]
    rest = (await client.get(f"{BASE}/snapshots?cursor={page.json()['next_cursor']}")).json()
    assert [one["name"] for one in rest["items"]] == ["two"]
    assert (await client.get(f"{BASE}/snapshots/one")).json() == SNAPSHOT
    gone = await client.delete(f"{BASE}/snapshots/one")
    assert (gone.status_code, gone.content) == (204, b"")
    for method in ("GET", "DELETE"):
        answer = await client.request(method, f"{BASE}/snapshots/one")
        assert (answer.status_code, answer.json()["code"]) == (404, "snapshot_not_found")


@pytest.mark.parametrize(
    "body", [{}, {"name": "A"}, {"name": "a", "generation": 0}, {"name": "a", "at": "now"}]
)
async def test_snapshots_that_are_refused(client, body):
    assert (await client.post(f"{BASE}/snapshots", json=body)).status_code == 422


async def test_a_fork_is_made(client):
    await client.post(f"{BASE}/snapshots", json={"name": "one", "generation": 4})
    made = await client.post(f"{BASE}/forks", json={"database": "copy", "snapshot": "one"})
    assert made.status_code == 201
    assert made.headers["location"] == "/tenants/acme/databases/copy"
    parent = {"tenant": "acme", "database": "events", "generation": 4}
    assert made.json()["forked_from"] == parent
    assert (await client.get("/tenants/acme/databases/copy")).json() == made.json()
    other = await client.post(f"{BASE}/forks", json={"database": "copy", "tenant": "zeta"})
    assert other.json()["tenant"] == "zeta"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"database": "A"},
        {"database": "a", "generation": 1, "snapshot": "s"},
        {"database": "a", "generation": "1"},
        {"database": "a", "engine": "libsql"},
    ],
)
async def test_forks_that_are_refused(client, body):
    assert (await client.post(f"{BASE}/forks", json=body)).status_code == 422


@pytest.mark.parametrize(
    ("path", "body"), [("snapshots", {"name": "one"}), ("forks", {"database": "copy"})]
)
async def test_a_key_gives_the_first_answer_again(client, service, path, body):
    key = {"Idempotency-Key": "k"}
    first = await client.post(f"{BASE}/{path}", json=body, headers=key)
    again = await client.post(f"{BASE}/{path}", json=body, headers=key)
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.content == first.content
    assert again.headers["location"] == first.headers["location"]
    assert service.committed[0].record.body == first.content  # in the effect's own commit
    other = await client.post(f"{BASE}/{path}", json={**body, "generation": 1}, headers=key)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")


async def test_refusals_have_their_codes(client, service):
    service.failing["snapshots.create"] = NoGeneration()
    answer = await client.post(f"{BASE}/snapshots", json={"name": "one"})
    assert (answer.status_code, answer.json()["code"]) == (409, "no_generation")
    service.failing["forks.create"] = GenerationExpired(generation=1)
    answer = await client.post(f"{BASE}/forks", json={"database": "copy", "generation": 1})
    assert (answer.status_code, answer.json()["code"]) == (410, "generation_expired")
    service.failing.clear()
    await client.post(f"{BASE}/snapshots", json={"name": "one"})
    answer = await client.post(f"{BASE}/snapshots", json={"name": "one"})
    assert (answer.status_code, answer.json()["code"]) == (409, "snapshot_exists")


async def test_a_fork_needs_both_tenants(guarded: Running):
    body = {"database": "copy", "tenant": "zeta"}
    answer = await guarded.client.post(f"{BASE}/forks", json=body, headers=bearer("acme"))
    assert (answer.status_code, answer.json()["code"]) == (404, "database_not_found")
    assert ("zeta", "copy") not in guarded.service.stored
    answer = await guarded.client.post(f"{BASE}/forks", json=body, headers=bearer("all"))
    assert answer.status_code == 201
    for method, path in (("PATCH", BASE), ("POST", f"{BASE}/forks"), ("POST", f"{BASE}/snapshots")):
        answer = await guarded.client.request(method, path, json=body, headers=bearer("reader"))
        assert answer.status_code == 403
