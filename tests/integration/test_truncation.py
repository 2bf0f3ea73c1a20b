"""Truncations end to end: the real service, its restarts, its losses."""

import shutil

from app.core.formats.record_framing import pack_records
from tests.conftest import MakeServer
from tests.helpers.numbered import (
    LOG,
    NAMES,
    append,
    checkpoint,
    create,
    ended,
    readable,
    rebuild_from_bucket,
    span,
    stop_and_check,
    truncate,
    truncated,
)
from tests.helpers.server import ServerProcess
from tests.helpers.workload import RECORDS

COPY = "/tenants/acme/databases/copy"


async def test_a_tail_over_wal_and_chunk(server: ServerProcess):
    client = server.client
    await create(client)
    await append(client, 10)
    await checkpoint(client)
    await append(client, 5)
    result = await truncated(client, "tail", 8)
    assert result["dropped"] == {"first_lsn": 8, "last_lsn": 15}
    assert await readable(client) == span(1, 7)
    database = (await client.get(LOG)).json()
    assert (database["first_lsn"], database["next_lsn"]) == (1, 16)
    await append(client, 4)
    assert await readable(client) == [*span(1, 7), *span(16, 19)]

    await server.kill9()
    await server.start()
    assert await readable(server.client) == [*span(1, 7), *span(16, 19)]
    await checkpoint(server.client)
    assert await readable(server.client) == [*span(1, 7), *span(16, 19)]

    await rebuild_from_bucket(server)
    assert await readable(server.client) == [*span(1, 7), *span(16, 19)]
    assert (await server.client.get(LOG)).json()["next_lsn"] > 1 << 32
    await stop_and_check(server)


async def test_a_tail_of_the_wal_alone_is_not_published_later(server: ServerProcess):
    client = server.client
    await create(client, compression="zstd")
    await append(client, 10)
    result = await truncated(client, "tail", 6)
    assert (result["outcome"], result["generation"]) == ("truncated", 1)
    await append(client, 5)
    result = await truncated(client, "tail", 11)
    assert result["dropped"] == {"first_lsn": 11, "last_lsn": 15}
    assert await readable(client) == span(1, 5)
    assert (await append(client, 2))["first_lsn"] == 16
    await checkpoint(client)
    assert (await client.get(LOG)).json()["wal_bytes"] == 0
    assert await readable(client) == [*span(1, 5), 16, 17]
    await rebuild_from_bucket(server)
    assert await readable(server.client) == [*span(1, 5), 16, 17]
    await stop_and_check(server)


async def test_lsns_of_a_dropped_wal_are_not_given_out_again(server: ServerProcess):
    """Its files and rows are gone, and unpublished records before it are still there."""
    client = server.client
    await create(client)
    await append(client, 5)
    await truncated(client, "tail", 6 - 1)
    await append(client, 5)
    await truncated(client, "tail", 6)
    assert await readable(client) == span(1, 4)
    await server.kill9()
    await server.start()
    assert (await server.client.get(LOG)).json()["next_lsn"] == 11
    assert (await append(server.client, 1))["first_lsn"] == 11
    assert await readable(server.client) == [*span(1, 4), 11]
    await stop_and_check(server)


async def test_the_whole_wal_dropped_leaves_nothing_unpublished(server: ServerProcess):
    client = server.client
    await create(client)
    await append(client, 10, **{"Idempotency-Key": "k1"})
    await truncated(client, "tail", 1)
    database = (await client.get(LOG)).json()
    assert (database["wal_bytes"], database["checkpointed_lsn"]) == (0, 10)
    assert await readable(client) == []
    answer = await client.get(f"{LOG}/records?from_lsn=1")
    assert (answer.content, answer.headers["Bop-Next-Lsn"]) == (b"", "11")

    await server.restart()
    client = server.client
    again = await client.post(
        f"{LOG}/records",
        content=pack_records([b"%d" % lsn for lsn in span(1, 10)]),
        headers={"Content-Type": RECORDS, "Idempotency-Key": "k1"},
    )
    assert (again.status_code, again.json()["last_lsn"]) == (201, 10)
    assert await readable(client) == []
    matched = await client.post(
        f"{LOG}/records",
        content=b"11",
        headers={"Content-Type": "application/octet-stream", "If-Match": '"11"'},
    )
    assert matched.json()["first_lsn"] == 11
    assert await readable(client) == [11]
    await stop_and_check(server)


async def test_a_head_goes_in_whole_chunks(server: ServerProcess):
    client = server.client
    await create(client)
    for _ in range(3):
        await append(client, 10)
        await checkpoint(client)
    await append(client, 5)
    result = await truncated(client, "head", 15)
    assert (result["first_lsn"], result["dropped"]["last_lsn"]) == (11, 10)
    assert await readable(client) == span(11, 35)
    gone = await client.get(f"{LOG}/records?from_lsn=10")
    assert (gone.status_code, gone.json()["code"]) == (410, "lsn_truncated")
    assert gone.json()["first_lsn"] == 11
    assert (await truncated(client, "head", 15))["outcome"] == "no_changes"

    result = await truncated(client, "head", 36)
    assert result["first_lsn"] == 31, "records that are only in the WAL stay"
    await rebuild_from_bucket(server)
    assert (await server.client.get(LOG)).json()["first_lsn"] == 31
    assert await readable(server.client) == [], "the WAL was lost with the node"
    await stop_and_check(server)


async def test_head_and_tail_leave_the_middle(server: ServerProcess):
    client = server.client
    await create(client)
    for _ in range(3):
        await append(client, 10)
        await checkpoint(client)
    await truncated(client, "tail", 25)
    await truncated(client, "head", 11)
    assert await readable(client) == span(11, 24)
    await append(client, 2)
    result = await truncated(client, "head", 28)
    assert result["first_lsn"] == 31
    assert await readable(client) == [31, 32]
    await stop_and_check(server)


async def test_refusals(server: ServerProcess):
    client = server.client
    await create(client)
    await append(client, 10)
    await checkpoint(client)
    await append(client, 10)
    await checkpoint(client)

    async def refused(**fields: object) -> tuple[int, str]:
        answer = await client.post(
            "/truncations", json={**NAMES, "direction": "tail", "lsn": 15, **fields}
        )
        return answer.status_code, answer.json()["code"]

    assert await refused(lsn=10) == (422, "lsn_out_of_range")
    assert await refused(lsn=21) == (422, "lsn_out_of_range")
    assert await refused(direction="head", lsn=22) == (422, "lsn_out_of_range")
    assert await refused(lsn=0) == (422, "invalid_request")
    assert await refused(direction="middle") == (422, "invalid_request")
    assert await refused(on_lease="hope") == (422, "invalid_request")
    assert await refused(database="none") == (404, "database_not_found")
    await client.put("/tenants/acme/databases/pages", json={"engine": "libsql"})
    assert await refused(database="pages") == (409, "wrong_engine")
    assert (await client.get("/truncations")).json()["items"] == []
    assert await readable(client) == span(1, 20)


async def test_the_same_key_truncates_once(server: ServerProcess):
    client = server.client
    await create(client)
    await append(client, 10)
    asked = {**NAMES, "direction": "tail", "lsn": 6}
    first = await client.post("/truncations", json=asked, headers={"Idempotency-Key": "once"})
    await ended(client, first.json()["id"])
    await append(client, 5)
    again = await client.post("/truncations", json=asked, headers={"Idempotency-Key": "once"})
    assert again.json() == first.json()
    assert await readable(client) == [*span(1, 5), *span(11, 15)]
    reused = await client.post(
        "/truncations", json={**asked, "lsn": 7}, headers={"Idempotency-Key": "once"}
    )
    assert reused.json()["code"] == "idempotency_key_reused"
    listed = (await client.get("/truncations", params={"database": "log"})).json()["items"]
    assert [job["id"] for job in listed] == [first.json()["id"]]
    assert (await client.get(f"/checkpoints/{first.json()['id']}")).status_code == 404


async def test_snapshots_and_forks_are_named_and_left_alone(server: ServerProcess):
    client = server.client
    await create(client)
    for _ in range(2):
        await append(client, 10)
        await checkpoint(client)
    assert (await client.post(f"{LOG}/snapshots", json={"name": "keep"})).status_code == 201
    assert (await client.post(f"{LOG}/forks", json={"database": "copy"})).status_code == 201

    async def pinned_by(direction: str, lsn: int) -> list[str]:
        job = await ended(client, await truncate(client, direction, lsn))
        assert (job["state"], job["error"]["code"]) == ("failed", "snapshot_pinned")
        return job["error"]["names"]

    assert await pinned_by("head", 11) == ["acme/copy", "keep"]
    assert await pinned_by("tail", 15) == ["acme/copy", "keep"]
    assert (await client.delete(f"{LOG}/snapshots/keep")).status_code == 204
    assert await pinned_by("head", 11) == ["acme/copy"]
    assert await readable(client) == span(1, 20)

    copy = {**NAMES, "database": "copy", "direction": "tail", "lsn": 15}
    job = await ended(client, (await client.post("/truncations", json=copy)).json()["id"])
    assert job["state"] == "completed", job
    assert await readable(client, COPY) == span(1, 14)
    assert await readable(client) == span(1, 20)
    deleted = await client.delete(COPY)
    assert (await ended(client, deleted.json()["id"]))["state"] == "completed"
    assert (await truncated(client, "head", 11))["first_lsn"] == 11
    assert await readable(client) == span(11, 20)
    await stop_and_check(server)


async def test_blobs_of_what_was_dropped_are_collected(make_server: MakeServer):
    """The blob of a chunk that was cut stays as long as a row of it does."""
    server = make_server(settings={"BOP_GC_GRACE_SECONDS": "0"})
    await server.start()
    client = server.client
    await create(client)
    keys = []
    for _ in range(3):
        await append(client, 10)
        keys.append((await checkpoint(client))["result"]["chunks"][0]["blob_key"])
    await truncated(client, "head", 11)
    await truncated(client, "tail", 25)
    retention = {"keep_generations": None, "keep_seconds": None, "minimum_generations": 1}
    assert (await client.patch(LOG, json={"retention": retention})).status_code == 200
    for _ in range(2):
        assert (await client.post("/admin/gc/run", json={})).status_code == 200
    remote = server.data_dir / "remote"
    assert [(remote / key).exists() for key in keys] == [False, True, True]
    shutil.rmtree(server.data_dir / "hot_cache")
    await server.restart()
    assert await readable(server.client) == span(11, 24)
    await rebuild_from_bucket(server)
    assert await readable(server.client) == span(11, 24)
    await stop_and_check(server)
