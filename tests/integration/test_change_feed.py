"""The change feed over HTTP: a subscriber that dies goes on, one left behind is told."""

import hashlib
import json
from pathlib import Path
from typing import Any

from app.container import fsck
from app.settings import Settings
from tests.conftest import MakeServer
from tests.helpers.server import ServerProcess
from tests.helpers.wait import wait_until

SCOPES = ["read", "write", "checkpoint", "debug", "admin"]


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def write_tokens(path: Path) -> Path:
    tokens = [
        {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), "scopes": SCOPES}
        | ({} if name == "ops" else {"tenants": [name]})
        for name in ("ops", "acme", "zeta")
    ]
    path.write_text(json.dumps({"tokens": tokens}), encoding="utf-8")
    return path


async def create(server: ServerProcess, tenant: str, database: str) -> None:
    answer = await server.client.put(
        f"/tenants/{tenant}/databases/{database}",
        json={"engine": "append_only"},
        headers=bearer("ops"),
    )
    assert answer.status_code == 201, answer.text


async def test_change_feed(make_server: MakeServer, tmp_path: Path) -> None:
    server = make_server(
        settings={
            "BOP_AUTH_TOKENS_FILE": str(write_tokens(tmp_path / "tokens.json")),
            "BOP_CHANGE_HISTORY_COUNT": "2",
            "BOP_CHANGE_LAG_COUNT_MAX": "6",
        }
    )
    await server.start()

    async def call(method: str, path: str, token: str = "ops", **options: Any) -> Any:
        return await server.client.request(method, path, headers=bearer(token), **options)

    made = await call("PUT", "/change-cursors/sync", json={"from": "start"})
    assert made.status_code == 201, made.text
    assert made.json()["state"] == "live"
    assert (
        await call("PUT", "/change-cursors/sync", "acme", json={"from": "now"})
    ).status_code == 201
    for name in ("a", "b", "c"):
        await create(server, "acme", name)
    await create(server, "zeta", "hidden")

    # pages, and what they leave to be acknowledged
    page = (await call("GET", "/changes?cursor=sync&limit=3")).json()
    assert [one["sequence"] for one in page["items"]] == [1, 2, 3]
    assert page["items"][0]["ops"][0]["type"] == "RestoreDatabase"
    page = (await call("GET", f"/changes?cursor={page['next_cursor']}")).json()
    assert ([one["sequence"] for one in page["items"]], page["next_cursor"]) == ([4], None)
    acked = await call("POST", "/change-cursors/sync/ack", json={"sequence": 2})
    assert (acked.json()["acknowledged"], acked.json()["lag"]) == (2, 2)
    page = (await call("GET", "/changes?cursor=sync")).json()
    assert [one["sequence"] for one in page["items"]] == [3, 4]

    # another principal's cursor of that name is another one, and shows its tenant only
    page = (await call("GET", "/changes?cursor=sync", "acme")).json()
    assert {one["tenant"] for one in page["items"]} == {"acme"}
    assert (await call("GET", "/changes?cursor=sync", "zeta")).json()["code"] == "cursor_not_found"

    # events: what is there, then what comes; a stream that broke off goes on
    events: list[dict[str, Any]] = []
    async with server.client.stream(
        "GET",
        "/changes?cursor=sync",
        headers={**bearer("ops"), "Accept": "text/event-stream", "Last-Event-ID": "3"},
    ) as stream:
        lines = stream.aiter_lines()
        async for line in lines:
            if line.startswith("data:"):
                events.append(json.loads(line[5:]))
                if len(events) == 1:
                    await create(server, "acme", "later")
                if len(events) == 2:
                    break
    assert [one["sequence"] for one in events] == [4, 5]

    # one that lags too far is left behind; the log still replays to the catalogue
    await call("PUT", "/change-cursors/sync", "acme", json={"from": "now"})
    for name in "defgh":
        await create(server, "zeta", name)
    await server.restart()

    async def expired() -> bool:
        return (await call("GET", "/change-cursors/sync")).json()["state"] == "expired"

    await wait_until(expired, timeout=20, describe="the log trimmed beyond the cursor")
    gone = await call("GET", "/changes?cursor=sync")
    assert (gone.status_code, gone.json()["code"]) == (410, "cursor_expired")
    again = await call("PUT", "/change-cursors/sync", json={"from": "start"})
    assert (again.status_code, again.json()["state"]) == (200, "live")
    assert (await call("PUT", "/change-cursors/sync", json={"from": 1})).status_code == 410
    assert (await call("PUT", "/change-cursors/sync", json={"from": 999})).status_code == 422
    unread = await server.client.get(
        "/changes?cursor=sync",
        headers={**bearer("ops"), "Accept": "text/event-stream", "Last-Event-ID": "x"},
    )
    assert unread.json()["errors"][0]["loc"] == ["header", "Last-Event-ID"]
    gone = await call("DELETE", "/change-cursors/sync")
    assert (gone.status_code, gone.content) == (204, b"")
    assert "content-type" not in gone.headers
    assert (await call("DELETE", "/change-cursors/sync")).status_code == 404
    assert await server.terminate() == 0, server.log_tail()
    assert (await fsck(Settings(data_dir=server.data_dir))).findings == ()
