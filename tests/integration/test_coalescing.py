"""Small chunks of a slow log become large ones, and nothing about its records changes."""

import shutil

import httpx
import pytest

from tests.conftest import MakeServer
from tests.helpers.failpoints import kill_at
from tests.helpers.seaweed import SeaweedS3
from tests.helpers.server import ServerProcess
from tests.helpers.wait import wait_until
from tests.integration.test_append_only import (
    LOG,
    append,
    assert_clean,
    checkpoint,
    create,
    read,
    run_recover,
    s3_settings,
)

CHUNK_BYTES = 65536
ROUNDS = 12


async def coalesced(server: ServerProcess) -> list[dict]:
    answer = await server.client.get("/jobs?kind=coalesce_chunks&limit=1000")
    assert answer.status_code == 200, answer.text
    return answer.json()["items"]


async def write_slowly(server: ServerProcess, rounds: int = ROUNDS) -> list[bytes]:
    """A checkpoint for each few records."""
    written: list[bytes] = []
    for number in range(rounds):
        batch = [b"%04d-%d " % (number, n) * 60 for n in range(3)]
        await append(server.client, batch)
        await checkpoint(server.client)
        written += batch
    return written


async def settled(server: ServerProcess) -> None:
    async def is_settled() -> bool:
        answer = await server.client.get("/debug/checkpoint/active_jobs")
        return answer.json()["items"] == []

    await wait_until(is_settled, timeout=30, describe="idle jobs")


@pytest.mark.parametrize("compression", ["none", "zstd"])
async def test_small_chunks_are_merged(
    make_server: MakeServer, seaweed: SeaweedS3, compression: str
):
    settings = s3_settings(seaweed, seaweed.bucket())
    server = make_server(settings=settings)
    await server.start()
    await create(server.client, chunk_bytes=CHUNK_BYTES, compression=compression)
    written = await write_slowly(server)
    await settled(server)
    jobs = await coalesced(server)
    assert jobs
    assert {job["state"] for job in jobs} == {"completed"}, jobs
    merged = [chunk for job in jobs for chunk in job["result"]["chunks"]]
    assert {chunk["action"] for chunk in merged} == {"merge_chunks"}
    assert await read(server.client) == written
    database = (await server.client.get(LOG)).json()
    assert database["generation"] == ROUNDS + len(jobs)
    assert database["checkpointed_lsn"] == len(written)
    assert await server.terminate() == 0, server.log_tail()

    # From the remote store alone, with the directory and without.
    shutil.rmtree(server.data_dir / "hot_cache")
    await server.start()
    assert await read(server.client) == written
    assert await server.terminate() == 0, server.log_tail()
    await assert_clean(server)
    shutil.rmtree(server.data_dir)
    await run_recover(server)
    await server.start()
    assert await read(server.client) == written


@pytest.mark.parametrize("name", ["coalesce.after_fetch", "coalesce.mid_write"])
async def test_kill_while_chunks_are_merged(make_server: MakeServer, name: str):
    server = make_server()
    await server.start(failpoints=kill_at(name))
    await create(server.client, chunk_bytes=CHUNK_BYTES, compression="zstd")
    written: list[bytes] = []

    async def write_until_killed() -> None:
        for number in range(ROUNDS):
            batch = [b"%04d-%d " % (number, n) * 60 for n in range(3)]
            await append(server.client, batch)
            written.extend(batch)
            await checkpoint(server.client)
            await settled(server)  # so that no append is under way when it dies

    with pytest.raises(httpx.TransportError):
        await write_until_killed()
    await server.wait_exit(timeout=10)
    await server.start(failpoints={})
    await settled(server)
    assert {job["state"] for job in await coalesced(server)} == {"completed"}
    assert await read(server.client) == written
    assert await server.terminate() == 0, server.log_tail()
    await assert_clean(server)


async def test_a_fork_merges_only_what_is_its_own(make_server: MakeServer):
    """Merging what it has of its parent would copy it."""
    server = make_server()
    await server.start()
    client, fork = server.client, "/tenants/acme/databases/fork"
    await create(client, chunk_bytes=CHUNK_BYTES)
    inherited = await write_slowly(server, rounds=3)
    await settled(server)
    answer = await client.post(f"{LOG}/forks", json={"database": "fork"})
    assert answer.status_code == 201, answer.text
    before = len(await coalesced(server))
    own: list[bytes] = []
    for number in range(ROUNDS):
        batch = [b"%04d-%d " % (number, n) * 60 for n in range(3)]
        await append(client, batch, fork)
        await checkpoint(client, "fork")
        own += batch
    await settled(server)
    jobs = [job for job in await coalesced(server) if job["database"] == "fork"]
    assert len(jobs) == len(await coalesced(server)) - before > 0
    assert {job["state"] for job in jobs} == {"completed"}, jobs
    merged = [chunk["blob_key"] for job in jobs for chunk in job["result"]["chunks"]]
    assert all(key.startswith("checkpoints/acme/fork/") for key in merged)
    assert await read(client, fork) == inherited + own
    assert await read(client) == inherited
    assert await server.terminate() == 0, server.log_tail()
    await assert_clean(server)
