"""Kill -9 between what the manifest says of snapshots and forks and what the bucket says."""

import contextlib

import httpx
import pytest

from app.container import fsck
from app.settings import Settings
from tests.conftest import MakeServer
from tests.helpers.failpoints import kill_at
from tests.helpers.wait import wait_until

DATABASE = "/tenants/acme/databases/log"


@pytest.mark.parametrize(
    "point",
    [
        "snapshot.before_document",
        "snapshot.after_document",
        "fork.before_document",
        "fork.after_document",
    ],
)
async def test_killed_between_the_commit_and_the_bucket(make_server: MakeServer, point: str):
    """The row stands; the next start stores what is missing, and the key gives the answer."""
    server = make_server()
    await server.start()
    await server.client.put(DATABASE, json={"engine": "append_only"})
    octets = {"Content-Type": "application/octet-stream"}
    await server.client.post(f"{DATABASE}/records", content=b"one", headers=octets)
    wanted = {"tenant": "acme", "database": "log"}
    job = (await server.client.post("/checkpoints", json=wanted)).json()
    job = (await server.client.get(f"/checkpoints/{job['id']}?wait=60")).json()
    assert job["result"]["outcome"] == "published"
    await server.restart(failpoints=kill_at(point))
    kind = point.partition(".")[0]
    body = {"name": "s"} if kind == "snapshot" else {"database": "copy"}
    key = {"Idempotency-Key": "once"}
    with contextlib.suppress(httpx.TransportError):  # it may die before it answers
        await server.client.post(f"{DATABASE}/{kind}s", json=body, headers=key)
    await server.wait_exit()
    await server.start(failpoints={})
    answer = await server.client.post(f"{DATABASE}/{kind}s", json=body, headers=key)
    assert answer.status_code == 201

    def in_the_bucket() -> int:
        pattern = "snapshots/acme/log/s/*" if kind == "snapshot" else "generations/acme/copy/*/*"
        return len(list((server.data_dir / "remote").rglob(pattern)))

    await wait_until(lambda: in_the_bucket() == 1)
    assert await server.terminate() == 0
    report = await fsck(Settings(data_dir=server.data_dir))
    assert report.findings == ()
    assert in_the_bucket() == 1
