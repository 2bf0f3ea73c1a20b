"""Partitions by nftables, in a network namespace of its own (rows 31, 32).

The service, SeaweedFS and the client of both are in it; only packets to or from the store's port
are lost.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import MakeServer
from tests.helpers import network
from tests.helpers.launch import NewInterpreter
from tests.helpers.numbered import LOG, NAMES, append, create, ended, readable, span
from tests.helpers.seaweed import SeaweedS3
from tests.helpers.wait import wait_until

pytestmark = pytest.mark.skipif(
    not network.is_available(), reason="no nftables in a network namespace here"
)
IDLE_SECONDS = 1.0


@pytest.fixture
def seaweed(tmp_path: Path) -> Iterator[SeaweedS3]:
    """In a namespace that holds for the rest of the test."""
    with network.network_namespace(), SeaweedS3.running(tmp_path / "seaweed") as server:
        yield server


async def test_a_store_behind_a_partition(seaweed: SeaweedS3, make_server: MakeServer) -> None:
    """Row 32: what was uploaded while answers were lost is adopted, not sent again. Row 31: a store
    that says nothing meets our deadline. Appends are taken all the time.
    """
    server = make_server(
        launcher=NewInterpreter(),
        settings={
            "BOP_REMOTE_URL": f"s3://{seaweed.bucket()}/faults",
            "BOP_S3_ENDPOINT_URL": seaweed.endpoint,
            "BOP_S3_REGION": seaweed.region,
            "BOP_REMOTE_ATTEMPTS": "1",
            "BOP_REMOTE_IDLE_TIMEOUT_SECONDS": str(IDLE_SECONDS),
            "BOP_REMOTE_CONNECT_TIMEOUT_SECONDS": str(IDLE_SECONDS),
            **seaweed.environment(),
        },
    )
    await server.start()
    client = server.client
    await create(client)
    await append(client, 5)

    def told(event: str) -> int:
        return server.log_path.read_text().count(f'"event":"{event}"')

    async def is_degraded() -> bool:
        ready = await client.get("/readyz")
        assert ready.status_code == 200
        return ready.json()["degraded"] == ["remote"]

    async def uploads_confirmed() -> float:
        lines = (await client.get("/metrics")).text.splitlines()
        name = 'remote_requests_total{op="put_blob",outcome="ok"}'
        return next(float(line.split()[-1]) for line in lines if line.startswith(name))

    confirmed = await uploads_confirmed()  # the probe's
    with network.answers_dropped(seaweed.port):
        job_id = (await client.post("/checkpoints", json=NAMES)).json()["id"]
        await wait_until(lambda: told("job.retrying") >= 1, timeout=20, describe="a lost answer")
        await append(client, 1)
    job = await ended(client, job_id)
    assert job["state"] == "completed", job
    assert told("checkpoint.published") == 1
    assert await uploads_confirmed() == confirmed, "sent again, though it was there"
    with network.requests_dropped(seaweed.port):
        before, started = told("job.retrying"), time.monotonic()
        job_id = (await client.post("/checkpoints", json=NAMES)).json()["id"]
        await wait_until(lambda: told("job.retrying") > before, timeout=20, describe="a deadline")
        assert time.monotonic() - started < 15
        await wait_until(is_degraded, timeout=20, describe="a store said to be away")
        await append(client, 1)
    assert (await ended(client, job_id))["state"] == "completed"
    # once; or not at all, where the kernel delivers the first request when it can again
    assert await uploads_confirmed() <= confirmed + 1
    assert told("checkpoint.published") == 2
    assert await readable(client) == span(1, 7)
    assert len((await client.get(f"{LOG}/generations")).json()["items"]) == 2
    assert (await client.get("/debug/manifest/fsck")).json()["findings"] == []
    assert await server.terminate() == 0, server.log_tail()
