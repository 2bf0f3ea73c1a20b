"""`gc` and `databases delete` against the contract in memory."""

import json
from typing import Any

import httpx
import pytest

from tests.helpers.fake_api import job_members


class Collecting:
    """That part of the contract."""

    def __init__(self, api: Any) -> None:
        self.report: dict[str, Any] = {
            "collection_time": "2026-11-23T21:05:00.000000Z", "paused": False,
            "expired_generations": 3, "removed_rows": 5, "retired_blobs": 4,
            "retired_bytes": 2048, "doomed_blobs": 1, "deleted_blobs": 2, "deleted_bytes": 1024,
            "failed_blobs": 0, "waiting_blobs": 2, "orphans": None,
        }  # fmt: skip
        self.sent: list[tuple[str, Any]] = []
        inner = api.handle

        async def handle(request: httpx.Request) -> httpx.Response:
            if request.url.path == "/admin/gc/run":
                self.sent.append((request.method, json.loads(request.content)))
                return httpx.Response(200, json=self.report)
            if request.method == "DELETE":
                self.sent.append((request.method, dict(request.url.params)))
                job = job_members("01J", "prune_checkpoint", "pending", 0)
                return httpx.Response(202, json=job)
            return await inner(request)

        api.handle = handle


@pytest.fixture
def collecting(api: Any) -> Collecting:
    return Collecting(api)


def test_gc(cli: Any, collecting: Collecting) -> None:
    ran = cli("gc")
    assert ran.exit_code == 0
    assert "1.0 KiB" in ran.stdout
    assert collecting.sent == [("POST", {"orphans": None, "accept_clock": False})]
    collecting.report["orphans"] = {"count": 7, "bytes": 4096}
    assert "7, 4.0 KiB" in cli("gc", "--orphans", "report").stdout
    assert collecting.sent[-1][1]["orphans"] == "report"
    assert cli.json("gc").json["deleted_blobs"] == 2
    assert cli("gc", "--orphans", "all").exit_code == 2


def test_gc_fails_where_something_is_left(cli: Any, collecting: Collecting) -> None:
    collecting.report["failed_blobs"] = 1
    assert cli("gc").exit_code == 1
    collecting.report |= {"failed_blobs": 0, "paused": True}
    ran = cli("gc")
    assert (ran.exit_code, "--accept-clock" in ran.stderr) == (1, True)
    cli("gc", "--accept-clock")
    assert collecting.sent[-1][1]["accept_clock"] is True


def test_delete_a_database(cli: Any, collecting: Collecting) -> None:
    ran = cli.json("databases", "delete", "acme/events")
    assert (ran.exit_code, ran.json["kind"]) == (0, "prune_checkpoint")
    assert collecting.sent == [("DELETE", {})]
    cli("databases", "delete", "acme/events", "--snapshots")
    assert collecting.sent[-1] == ("DELETE", {"snapshots": "delete"})
