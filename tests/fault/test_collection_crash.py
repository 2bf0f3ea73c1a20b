"""Kill -9 at every step of deletion and collection: what is unreachable goes, nothing else does."""

import signal
from typing import Any

import httpx
import pytest

from app.container import fsck
from app.core.formats.record_framing import pack_records
from app.settings import Settings
from tests.conftest import MakeServer
from tests.helpers.failpoints import Failpoints, kill_at
from tests.helpers.server import ServerEnded, ServerProcess
from tests.helpers.wait import wait_until
from tests.helpers.workload import RECORDS, unframe

FAILS_ONCE: Failpoints = {"publish.before_commit": {"action": "raise", "nth": 3}}
"""The third checkpoint fails when all of it is uploaded."""
STEPS = (
    "collect.before_wal_removal",
    "collect.after_wal_removal",
    "collect.before_prune",
    "collect.before_expire",
    "collect.after_expire",
    "collect.after_prune",
    "collect.before_doom",
    "collect.before_delete",
    "collect.after_delete",
    "collect.after_forget",
)


class Client:
    """One caller over the lives of a service."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server

    async def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            return await self._server.client.request(method, path, **options)
        except httpx.TransportError as error:
            raise ServerEnded(repr(error)) from error

    async def fill(self, database: str, content: bytes) -> None:
        path = f"/tenants/acme/databases/{database}"
        await self.call("PUT", path, json={"engine": "append_only", "chunk_bytes": 65536})
        body = pack_records([content * 30_000] * 3)
        await self.call("POST", f"{path}/records", content=body, headers={"Content-Type": RECORDS})
        await self.checkpoint(database)

    async def checkpoint(self, database: str) -> None:
        body = {"tenant": "acme", "database": database}
        job = (await self.call("POST", "/checkpoints", json=body)).json()
        await self.call("GET", f"/jobs/{job['id']}?wait=30")

    async def is_idle(self) -> bool:
        return not (await self.call("GET", "/debug/checkpoint/active_jobs")).json()["items"]

    async def let_go(self) -> None:
        """Repeatable, as far as an earlier life got."""
        await self.call("DELETE", "/tenants/acme/databases/gone")
        await wait_until(self.is_idle, timeout=20, describe="no job is active")
        answer = await self.call("POST", "/admin/gc/run", json={})
        assert answer.status_code == 200, answer.text
        assert answer.json()["waiting_blobs"] == 0


@pytest.mark.parametrize("name", STEPS)
async def test_kill_at_each_step_of_deletion_and_collection(
    name: str, make_server: MakeServer
) -> None:
    server = make_server(settings={"BOP_GC_GRACE_SECONDS": "0", "BOP_JOB_ATTEMPTS": "1"})
    client = Client(server)
    with pytest.raises(ServerEnded):
        await live(server, client, {**FAILS_ONCE, **kill_at(name)})
    assert await server.wait_exit(timeout=10) == -signal.SIGKILL, server.log_tail()
    await server.start(failpoints={})
    await client.let_go()
    kept = await client.call("GET", "/tenants/acme/databases/kept/records?from_lsn=1")
    assert unframe(kept.content) == [b"k" * 30_000] * 3
    assert (await client.call("GET", "/tenants/acme/databases/gone")).status_code == 404
    root = server.data_dir / "remote"
    left = [
        str(path.relative_to(root))
        for folder in ("checkpoints", "generations")
        for path in (root / folder).rglob("*")
        if path.is_file()
    ]
    assert len(left) == 2, left  # the chunk of the one that stays, and its document
    assert all("/kept/" in one for one in left)
    assert await server.terminate() == 0, server.log_tail()
    assert (await fsck(Settings(data_dir=server.data_dir))).findings == ()


async def live(server: ServerProcess, client: Client, failpoints: Failpoints) -> None:
    await server.start(failpoints=failpoints)
    await client.fill("kept", b"k")
    await client.fill("gone", b"g")
    await client.fill("gone", b"f")  # fails, and leaves uploads that nobody published
    await client.let_go()
