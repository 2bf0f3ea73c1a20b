"""The service against its bucket, SeaweedFS behind the faulty proxy: an upload that is cut off by
the end of the process, that lands too late, and listings that fail (rows 37, 40, 49).
"""

import threading
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.conftest import MakeServer
from tests.helpers.fault_proxy import Answer, Blackhole, FaultProxy, Hold, Rule
from tests.helpers.numbered import LOG, NAMES, append, create, ended, readable, span
from tests.helpers.seaweed import SeaweedS3
from tests.helpers.server import ServerProcess
from tests.helpers.wait import wait_until
from tests.helpers.workload import scratch_left

CHUNKS = r"/chunk-"


@pytest.fixture(scope="module")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedS3]:
    with SeaweedS3.running(tmp_path_factory.mktemp("seaweed") / "server") as server:
        yield server


@pytest.fixture
async def proxy(seaweed: SeaweedS3) -> AsyncIterator[FaultProxy]:
    async with FaultProxy.running("127.0.0.1", seaweed.port) as proxy:
        yield proxy


@pytest.fixture
async def server(make_server: MakeServer, seaweed: SeaweedS3, proxy: FaultProxy) -> ServerProcess:
    """Behind the proxy, with records that wait to be checkpointed; collects without delay."""
    server = make_server(
        settings={
            "BOP_REMOTE_URL": f"s3://{seaweed.bucket()}/faults",
            "BOP_S3_ENDPOINT_URL": proxy.endpoint,
            "BOP_S3_REGION": seaweed.region,
            "BOP_REMOTE_ATTEMPTS": "2",
            "BOP_REMOTE_IDLE_TIMEOUT_SECONDS": "2",
            "BOP_REMOTE_RETRY_BASE_SECONDS": "0.01",
            "BOP_GC_GRACE_SECONDS": "0",
            "BOP_GC_ORPHAN_AGE_SECONDS": "0",
            "BOP_SHUTDOWN_SECONDS": "5",
            **seaweed.environment(),
        }
    )
    await server.start()
    await create(server.client)
    await append(server.client, 5)
    return server


async def checked(server: ServerProcess) -> None:
    assert scratch_left(server.data_dir) == []
    assert (await server.client.get("/debug/checkpoint/leases")).json()["items"] == []
    assert (await server.client.get("/debug/storage/quota")).json()["jobs"] == []
    assert (await server.client.get("/debug/manifest/fsck")).json()["findings"] == []


async def test_sigterm_during_an_upload_ends_in_time_and_resumes(
    server: ServerProcess, proxy: FaultProxy
) -> None:
    """Row 49: within its deadline, as an orderly end; the same job completes in the next life."""
    proxy.add(Rule(method="PUT", path=CHUNKS, action=Blackhole(), times=None))
    job_id = (await server.client.post("/checkpoints", json=NAMES)).json()["id"]
    await proxy.seen(1, "PUT", CHUNKS)
    assert await server.terminate(timeout=15) == 0, server.log_tail()
    proxy.clear()
    await server.start()
    job = await ended(server.client, job_id)
    assert job["state"] == "completed", job
    generations = (await server.client.get(f"{LOG}/generations")).json()["items"]
    assert [one["generation"] for one in generations] == [1]
    assert await readable(server.client) == span(1, 5)
    await checked(server)


async def test_an_upload_that_lands_after_its_collection_is_swept(
    server: ServerProcess, proxy: FaultProxy
) -> None:
    """Rows 37 and 40: cancelled, collected, and only then there: an orphan. While listings fail
    nothing is deleted; then it is, and what is published stays.
    """
    client, landing = server.client, threading.Event()
    late = proxy.add(Rule(method="PUT", path=CHUNKS, action=Hold(until=landing), times=1))
    job_id = (await client.post("/checkpoints", json=NAMES)).json()["id"]
    await wait_until(lambda: late.met == 1, describe="an upload under way")
    await client.post(f"/checkpoints/{job_id}/cancel")
    assert (await ended(client, job_id))["state"] == "cancelled"
    assert (await client.post("/admin/gc/run", json={})).json()["waiting_blobs"] == 0
    job = await ended(client, (await client.post("/checkpoints", json=NAMES)).json()["id"])
    assert job["state"] == "completed", job
    landing.set()

    async def orphans(what: str) -> dict:
        answer = await client.post("/admin/gc/run", json={"orphans": what})
        assert answer.status_code == 200, answer.text
        return answer.json()["orphans"]

    async def has_landed() -> bool:
        return (await orphans("report"))["count"] == 1

    await wait_until(has_landed, describe="the late upload")
    (orphan,) = [one["key"] for one in (await orphans("report"))["items"]]
    assert job_id in orphan
    proxy.add(Rule(method="GET", path="list-type=2", action=Answer.slow_down(), times=None))
    deleted = proxy.count("POST", "delete")
    refused = await client.post("/admin/gc/run", json={"orphans": "delete"})
    assert (refused.status_code, refused.json()["code"]) == (503, "remote_unavailable")
    assert proxy.count("POST", "delete") == deleted
    proxy.clear()
    assert (await orphans("delete"))["queued"] == 1
    assert (await client.post("/admin/gc/run", json={})).json()["waiting_blobs"] == 0
    assert (await orphans("report"))["count"] == 0
    assert await readable(client) == span(1, 5)
    await checked(server)
