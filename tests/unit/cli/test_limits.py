"""`flags`, `quota`, `queue`, `janitor` against the contract in memory."""

import json
from typing import Any

import httpx
import pytest

FLAGS = {
    "enable_checkpoints": True, "enable_chunk_deltas": True,
    "enable_append_only_truncation": True, "enable_cold_scan": True,
    "checkpoint_interval_seconds": 60,
}  # fmt: skip
GIB = 1 << 30


class Admin:
    """The operator's part of the contract."""

    def __init__(self, api) -> None:
        self.flags: dict[str, Any] = dict(FLAGS)
        self.limits: dict[str, Any] = {"limit_bytes": None, "job_limit_bytes": 5}
        self.queue = {"state": "open", "pending": 1, "in_flight": 2, "depth_max": 10_000}
        self.failed: list[str] = []
        self.sent: list[tuple[str, str, Any]] = []
        inner = api.handle

        def handle(request: httpx.Request) -> httpx.Response:
            if not request.url.path.startswith(("/admin/", "/debug/storage")):
                return inner(request)
            body = json.loads(request.content) if request.content else None
            self.sent.append((request.method, request.url.path, body))
            return httpx.Response(200, json=self.answer(request.method, request.url.path, body))

        api.handle = handle

    def answer(self, method: str, path: str, body: Any) -> Any:
        match path.rsplit("/", 1)[1]:
            case "feature-flags":
                self.flags.update(
                    {name: 60 if value is None else value for name, value in (body or {}).items()}
                )
                return self.flags
            case "quota" if "storage" in path:
                return {
                    "global": {"limit_bytes": 64 * GIB, "used_bytes": 1024},
                    "tenants": [{"tenant": "acme", "limit_bytes": None, "used_bytes": 512}],
                    "jobs": [{"job_id": "01J", "tenant": "acme", "reserved_bytes": 100}],
                }
            case "quota" if "tenants" in path:
                self.limits.update(body or {})
                return {"tenant": "acme", **self.limits}
            case "quota":
                return {"global_bytes": body["global_bytes"] or 64 * GIB}
            case "run":
                return {
                    "scanned": 3, "removed": ["01J"], "failed": self.failed, "removed_bytes": 2048,
                    "released_bytes": 0, "quota_files": 9, "quota_corrected": 0,
                    "quota_drift_bytes": 0,
                }  # fmt: skip
            case "drain" | "resume" as verb:
                self.queue["state"] = "draining" if verb == "drain" else "open"
        return self.queue


@pytest.fixture
def admin(api) -> Admin:
    return Admin(api)


def test_flags(cli, admin):
    assert "enable_cold_scan" in cli("flags", "show", "acme").stdout
    ran = cli.json(
        "flags", "set", "acme", "enable_checkpoints=off", "checkpoint_interval_seconds=5"
    )
    assert ran.json == {
        **FLAGS, "enable_checkpoints": False, "checkpoint_interval_seconds": 5,
    }  # fmt: skip
    assert admin.sent[-1] == (
        "PATCH", "/admin/tenants/acme/feature-flags",
        {"enable_checkpoints": False, "checkpoint_interval_seconds": 5},
    )  # fmt: skip
    cli("flags", "set", "acme", "checkpoint_interval_seconds=default")
    assert admin.sent[-1][2] == {"checkpoint_interval_seconds": None}


@pytest.mark.parametrize(
    "value", ["enable_everything=true", "enable_cold_scan=maybe", "checkpoint_interval_seconds=-1"]
)
def test_a_flag_that_is_none_is_wrong_usage(cli, admin, value):
    assert cli("flags", "set", "acme", value).exit_code == 2
    assert admin.sent == []


def test_quota_use(cli, admin):
    lines = [line.split() for line in cli("quota", "show").stdout.splitlines()]
    assert lines[1:] == [
        ["everything", "64.0", "GiB", "1.0", "KiB"],
        ["tenant", "acme", "none", "512", "B"],
        ["job", "01J", "of", "acme", "-", "100", "B"],
    ]
    assert cli.json("quota", "show").json["global"]["used_bytes"] == 1024
    assert cli.json("quota", "show", "acme").json == {
        "tenant": "acme", "limit_bytes": None, "job_limit_bytes": 5,
    }  # fmt: skip


def test_limits_are_set_one_by_one(cli, admin):
    assert cli.json("quota", "set", "--limit", "2GiB").json == {"global_bytes": 2 * GIB}
    assert cli.json("quota", "set", "--limit", "none").json == {"global_bytes": 64 * GIB}
    ran = cli.json("quota", "set", "acme", "--limit", "1.5 MiB")
    assert ran.json == {"tenant": "acme", "limit_bytes": 3 << 19, "job_limit_bytes": 5}
    cli("quota", "set", "acme", "--job-limit", "none")
    assert admin.limits == {"limit_bytes": 3 << 19, "job_limit_bytes": None}
    for arguments in ([], ["--limit", "much"], ["--job-limit", "1"]):
        assert cli("quota", "set", *arguments).exit_code == 2


def test_queue(cli, admin):
    assert cli("queue", "show").stdout.split() == [
        "state", "open", "pending", "1", "in", "flight", "2", "at", "most", "10,000",
    ]  # fmt: skip
    assert cli.json("queue", "drain").json["state"] == "draining"
    assert cli.json("queue", "resume").json["state"] == "open"


def test_janitor(cli, admin):
    assert "2.0 KiB" in cli("janitor").stdout
    assert admin.sent[-1] == ("POST", "/admin/janitor/run", {"max_age_seconds": 0})
    admin.failed.append("01K")
    ran = cli.json("janitor", "--max-age", "3600")
    assert (ran.exit_code, ran.json["failed"]) == (1, ["01K"])
