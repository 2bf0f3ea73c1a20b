"""Fault row 45: a lease is released by force while its holder lives. The holder is fenced."""

import hashlib
import json
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import MakeServer
from tests.helpers.fault_proxy import Blackhole, FaultProxy, Hold, Rule
from tests.helpers.seaweed import SeaweedS3
from tests.helpers.server import ServerProcess
from tests.helpers.wait import wait_until
from tests.helpers.workload import RECORDS, frame, scratch_left, unframe

LOG = "/tenants/acme/databases/log"
RELEASE = "/admin/checkpoint/lease/release/0?tenant=acme&database=log"
WHY = {"reason": "the upload hangs"}
ALL = ["read", "write", "checkpoint", "debug", "admin"]


@pytest.fixture(scope="module")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedS3]:
    with SeaweedS3.running(tmp_path_factory.mktemp("seaweed") / "server") as server:
        yield server


@pytest.fixture
async def proxy(seaweed: SeaweedS3) -> AsyncIterator[FaultProxy]:
    async with FaultProxy.running("127.0.0.1", seaweed.port) as proxy:
        yield proxy


def tokens_file(path: Path) -> Path:
    entries = [
        {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), "scopes": ALL}
        for name in ("ann", "bob")
    ]
    path.write_text(json.dumps({"tokens": entries}))
    return path


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


async def serving(
    make_server: MakeServer, seaweed: SeaweedS3, proxy: FaultProxy, tokens: Path, **settings: str
) -> ServerProcess:
    """A service behind the proxy, with one segment of records to be checkpointed."""
    server = make_server(
        settings={
            "BOP_REMOTE_URL": f"s3://{seaweed.bucket()}/release",
            "BOP_S3_ENDPOINT_URL": proxy.endpoint,
            "BOP_S3_REGION": seaweed.region,
            "BOP_REMOTE_IDLE_TIMEOUT_SECONDS": "60",
            "BOP_AUTH_TOKENS_FILE": str(tokens),
            **settings,
            **seaweed.environment(),
        }
    )
    await server.start()
    server.client.headers.update(bearer("ann"))
    await server.client.put(LOG, json={"engine": "append_only", "chunk_bytes": 65536})
    answer = await server.client.post(
        f"{LOG}/records", content=frame([b"one"]), headers={"Content-Type": RECORDS}
    )
    assert answer.status_code == 201
    return server


async def hanging_checkpoint(server: ServerProcess, proxy: FaultProxy) -> str:
    """Its job's id, once the upload has reached the proxy."""
    job = await server.client.post("/checkpoints", json={"tenant": "acme", "database": "log"})
    await proxy.seen(1, "PUT", r"/chunk-")
    return job.json()["id"]


async def ended(server: ServerProcess, job_id: str) -> dict:
    job = (await server.client.get(f"/checkpoints/{job_id}?wait=20")).json()
    assert job["state"] == "completed", job
    return job


async def approved(server: ServerProcess) -> httpx.Response:
    asked = (await server.client.post(RELEASE, json=WHY)).json()
    path = f"/admin/approvals/{asked['approval_id']}/approve"
    own = await server.client.post(path)
    assert (own.status_code, own.json()["code"]) == (403, "self_approval")
    return await server.client.post(path, headers=bearer("bob"))


async def leases(server: ServerProcess) -> list[dict]:
    return (await server.client.get("/debug/checkpoint/leases")).json()["items"]


async def assert_whole(server: ServerProcess) -> None:
    generations = (await server.client.get(f"{LOG}/generations")).json()["items"]
    assert [one["generation"] for one in generations] == [1]
    content = (await server.client.get(f"{LOG}/records?from_lsn=1")).content
    assert unframe(content) == [b"one"]
    assert await leases(server) == []
    assert scratch_left(server.data_dir) == []
    report = (await server.client.get("/debug/manifest/fsck")).json()
    assert report["findings"] == []


async def test_forced_release_fences_the_holder(make_server, seaweed, proxy, tmp_path):
    """It wakes up with its upload done, and its publication is refused: only a new plan, under a
    new token, publishes.
    """
    server = await serving(make_server, seaweed, proxy, tokens_file(tmp_path / "tokens"))
    gate = threading.Event()
    proxy.add(Rule(method="PUT", path=r"/chunk-", action=Hold(until=gate), times=1))
    job_id = await hanging_checkpoint(server, proxy)
    (held,) = await leases(server)
    done = await approved(server)
    assert (done.status_code, done.json()["released"]) == (200, True)
    assert (done.json()["job_id"], done.json()["token"]) == (job_id, held["token"])
    assert await leases(server) == []
    nobody = await server.client.post(RELEASE, json=WHY)
    assert (nobody.status_code, nobody.json()["code"]) == (404, "lease_not_found")
    assert (await server.client.get(LOG)).json()["generation"] == 0
    gate.set()
    await ended(server, job_id)
    lines = [json.loads(line) for line in server.log_path.read_text().splitlines()]
    (refused,) = [line for line in lines if line["event"] == "checkpoint.replanning"]
    assert "lease_lost" in refused["detail"]
    await assert_whole(server)
    job = (await server.client.get(f"/checkpoints/{job_id}")).json()
    assert job["result"]["checkpoint_id"].endswith(f"{job_id}-1"), "a new plan has keys of its own"
    audit = (await server.client.get("/admin/audit")).json()["items"]
    assert [(one["principal"], one["outcome"], one["code"]) for one in audit] == [
        ("ann", "refused", "lease_not_found"),
        ("bob", "done", None),
        ("ann", "refused", "self_approval"),
        ("ann", "done", None),
    ]


async def test_forced_release_frees_a_holder_that_hangs_for_ever(
    make_server, seaweed, proxy, tmp_path
):
    """The holder learns of it when it renews its leases, gives up the upload, and plans anew."""
    server = await serving(
        make_server, seaweed, proxy, tokens_file(tmp_path / "tokens"),
        BOP_LEASE_TTL_SECONDS="3", BOP_ADMIN_APPROVALS="false",
    )  # fmt: skip
    proxy.add(Rule(method="PUT", path=r"/chunk-", action=Blackhole(), times=1))
    job_id = await hanging_checkpoint(server, proxy)
    await wait_until(lambda: _holds(server))
    answer = await server.client.post(RELEASE, json=WHY)
    assert (answer.status_code, answer.json()["state"]) == (200, "approved")
    await ended(server, job_id)
    await assert_whole(server)


async def _holds(server: ServerProcess) -> bool:
    return len(await leases(server)) == 1
