import asyncio

import msgspec
import pytest

from app.core.base.errors import ManifestFull
from app.core.stores.manifest.records import ForkParent, GenerationRecord
from tests.helpers.wait import wait_until

BASE = "/tenants/acme/databases"


async def test_create_then_again_then_otherwise(client, service):
    body = {"engine": "append_only", "chunk_bytes": 65536, "compression": "none"}
    first = await client.put(f"{BASE}/new", json=body)
    assert first.status_code == 201
    assert first.headers["location"] == f"{BASE}/new"
    again = await client.put(f"{BASE}/new", json=body)
    assert again.status_code == 200
    assert again.json() == first.json()
    other = await client.put(f"{BASE}/new", json={"engine": "libsql"})
    assert (other.status_code, other.json()["code"]) == (409, "database_conflict")
    assert other.json()["differing"] == {"engine": "libsql"}


async def test_the_database_object(client):
    database = (await client.get(f"{BASE}/events")).json()
    assert database == {
        "tenant": "acme",
        "database": "events",
        "db_id": 1,
        "engine": "append_only",
        "page_size": None,
        "chunk_bytes": 67108864,
        "compression": "none",
        "state": "active",
        "generation": 0,
        "first_lsn": 1,
        "next_lsn": 1,
        "checkpointed_lsn": 0,
        "page_count": 0,
        "wal_bytes": 0,
        "created_at": "2025-11-23T21:05:00.000000Z",
        "forked_from": None,
        "health": {"state": "ok", "lost_from_lsn": None},
        "retention": {"keep_generations": None, "keep_seconds": 86400, "minimum_generations": 2},
        "earliest_generation": None,
        "latest_generation": None,
    }


async def test_a_fork_names_its_parent_by_name(client, service):
    stored = service.add_database("acme", "fork", "libsql")
    parent = ForkParent(tenant="acme", database="events", db_id=1, generation=3)
    stored.record = msgspec.structs.replace(stored.record, forked_from=parent)
    database = (await client.get(f"{BASE}/fork")).json()
    assert database["forked_from"] == {"tenant": "acme", "database": "events", "generation": 3}
    assert database["page_size"] == 4096


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"engine": "sqlite"},
        {"engine": "append_only", "unknown": 1},
        {"engine": "append_only", "page_size": 4096},
        {"engine": "libsql", "page_size": 4095},
        {"engine": "libsql", "page_size": 256},
        {"engine": "libsql", "page_size": 131072},
        {"engine": "libsql", "page_size": "4096"},
        {"engine": "append_only", "chunk_bytes": 65535},
        {"engine": "append_only", "chunk_bytes": 65537},
        {"engine": "append_only", "chunk_bytes": 2**31},
        {"engine": "append_only", "compression": "gzip"},
        {"engine": "append_only", "chunk_bytes": 65536.5},
    ],
)
async def test_bodies_that_are_refused(client, service, body):
    answer = await client.put(f"{BASE}/new", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert answer.json()["errors"][0]["loc"][0] == "body"
    assert ("acme", "new") not in service.stored


@pytest.mark.parametrize(
    "name", ["A", "a.", ".a", "-a", "a" * 64, "a b", "a%2fb", "a%00", "%2e%2e", "ä", "a%0a"]
)
async def test_names_that_are_refused(client, service, name):
    answer = await client.put(f"{BASE}/{name}", json={"engine": "append_only"})
    assert answer.status_code in {404, 422}, name  # 404: an encoded slash makes another path
    assert len(service.stored) == 1


@pytest.mark.parametrize("name", ["a", "0", "a.b", "a_b-c", "a" * 63])
async def test_names_that_are_taken(client, name):
    assert (await client.put(f"{BASE}/{name}", json={"engine": "libsql"})).status_code == 201


async def test_a_full_manifest_is_507(client, service):
    service.failing["databases.create"] = ManifestFull()
    answer = await client.put(f"{BASE}/new", json={"engine": "libsql"})
    assert (answer.status_code, answer.json()["code"]) == (507, "manifest_full")


async def test_an_unknown_tenant_has_no_databases(client):
    answer = await client.get("/tenants/nobody/databases")
    assert answer.json() == {"items": [], "next_cursor": None}


async def test_durable_at_once_and_when_it_comes(client, service):
    stored = service.stored["acme", "events"]
    stored.records += [b"a", b"b"]
    at_once = await client.get(f"{BASE}/events/durable?min_lsn=2")
    assert at_once.json() == {"durable_lsn": 2, "checkpointed_lsn": 0}
    waiting = asyncio.create_task(client.get(f"{BASE}/events/durable?min_lsn=2&wait=60"))
    await wait_until(lambda: service.waiting)
    stored.record = msgspec.structs.replace(stored.record, checkpointed_lsn=2)
    async with service.changed:
        service.changed.notify_all()
    assert (await waiting).json() == {"durable_lsn": 2, "checkpointed_lsn": 2}


@pytest.mark.parametrize("query", ["min_lsn=-1", "min_lsn=x", "wait=-1", "wait=60.1", "wait=inf"])
async def test_durable_queries_that_are_refused(client, query):
    assert (await client.get(f"{BASE}/events/durable?{query}")).status_code == 422


async def test_acknowledge_loss(client):
    answer = await client.post(f"{BASE}/events/acknowledge-loss")
    assert (answer.status_code, answer.json()["database"]) == (200, "events")
    answer = await client.post(f"{BASE}/nothing/acknowledge-loss")
    assert answer.json()["code"] == "database_not_found"


async def test_generations(client, service):
    service.generations_kept = [
        GenerationRecord(
            db_id=1,
            generation=number,
            checkpoint_id=f"c{number}",
            first_lsn=1,
            last_lsn=number * 10,
            page_count=0,
            committed_at_us=number,
            base_chunks=number,
            delta_chunks=0,
            bytes_uploaded=100,
            document_key="k",
            superseded_at_us=number + 1 if number < 3 else None,
        )
        for number in (1, 2, 3)
    ]
    page = (await client.get(f"{BASE}/events/generations?limit=2")).json()
    assert [item["generation"] for item in page["items"]] == [1, 2]
    assert page["items"][0] == {
        "generation": 1,
        "checkpoint_id": "c1",
        "created_at": "1970-01-01T00:00:00.000001Z",
        "first_lsn": 1,
        "last_lsn": 10,
        "page_count": 0,
        "base_chunks": 1,
        "delta_chunks": 0,
        "bytes_uploaded": 100,
        "superseded_at": "1970-01-01T00:00:00.000002Z",
        "verified_at": None,
    }
    page = (
        await client.get(f"{BASE}/events/generations", params={"cursor": page["next_cursor"]})
    ).json()
    assert [item["generation"] for item in page["items"]] == [3]
    assert page["items"][0]["superseded_at"] is None
    page = (await client.get(f"{BASE}/events/generations?expiring=true&limit=1")).json()
    assert [item["generation"] for item in page["items"]] == [1]
    assert page["next_cursor"] is not None
    assert (await client.get(f"{BASE}/nothing/generations")).status_code == 404
