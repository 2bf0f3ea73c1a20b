"""`replicate` and `restore`: what they refuse at once, and what they show."""

import sqlite3
from contextlib import closing
from dataclasses import dataclass, field

import httpx
import pytest

from app.cli.replicate import _show
from app.replication.events import Status


@dataclass
class ShownFleet:
    statuses: dict[str, Status] = field(default_factory=dict)


def shown(**statuses):
    seen = []
    _show(ShownFleet(statuses), lambda *told: seen.append(told))
    return seen


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "or --config FILE"),
        (["a.db"], "or --config FILE"),
        (["a.db", "acme"], "not TENANT/DATABASE"),
        (["a.db", "acme/a", "--config", "x.toml"], "not both"),
        (["--config", "missing.toml"], "cannot be read"),
    ],
)
def test_replicate_needs_a_file_and_a_name_or_a_list(cli, arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = cli.json("replicate", *arguments)
    assert ran.exit_code == 2
    assert says in ran.problem["detail"]


def test_replicate_shows_how_far_it_is():
    assert shown(a=Status(sent_bytes=2048)) == [("a: following, up to date, 2.0 KiB sent", 0, None)]
    assert shown(a=Status(unsent_bytes=1024, away=True), b=Status(unsent_bytes=1024)) == [
        ("2 databases: the service is away, 2.0 KiB behind, 0 B sent", 0, None)
    ]
    sending = Status(image_sent_bytes=3, image_total_bytes=9)
    assert shown(a=Status(), b=sending) == [("b image", 3, 9)]


@pytest.mark.parametrize(
    "options",
    [
        ["--generation", "1", "--snapshot", "s"],
        ["--snapshot", "s", "--at", "2026-01-31T12:00:00Z"],
        ["--at", "yesterday"],
        ["--at", "2026-01-31T12:00:00"],  # of which zone?
    ],
)
def test_restore_wants_one_state(cli, tmp_path, options):
    ran = cli.json("restore", "acme/a", "-o", str(tmp_path / "a.db"), *options)
    assert ran.exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-journal"])
def test_restore_refuses_what_is_there(cli, tmp_path, suffix):
    old = tmp_path / f"a.db{suffix}"
    old.write_bytes(b"old")
    ran = cli.json("restore", "acme/a", "-o", str(tmp_path / "a.db"))
    assert (ran.exit_code, ran.problem["code"]) == (1, "file_exists")
    assert old.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ([], {}),
        (["--generation", "12"], {"generation": "12"}),
        (["--snapshot", "before-2.0"], {"snapshot": "before-2.0"}),
        (["--at", "2026-01-31T13:00:00+01:00"], {"at": "2026-01-31T12:00:00Z"}),
    ],
)
def test_restore_asks_for_the_state_that_was_chosen(cli, tmp_path, options, asked):
    with closing(sqlite3.connect(tmp_path / "source.db")) as connection:
        connection.execute("CREATE TABLE t (a)")
    image = (tmp_path / "source.db").read_bytes()
    seen = []

    def answer(request):
        seen.append(dict(request.url.params))
        headers = {"ETag": '"1"', "Bop-Generation": "12", "Bop-Lsn": "40"}
        if request.method == "HEAD":
            return httpx.Response(200, headers={**headers, "Content-Length": str(len(image))})
        headers["Content-Range"] = f"bytes 0-{len(image) - 1}/{len(image)}"
        return httpx.Response(206, headers=headers, stream=httpx.ByteStream(image))

    cli.api.transport = lambda: httpx.MockTransport(answer)
    for force in ([], ["--force"]):
        ran = cli.json("restore", "acme/a", "-o", str(tmp_path / "a.db"), *options, *force)
        assert ran.exit_code == 0, ran.stderr
        assert (ran.json["generation"], ran.json["lsn"], ran.json["page_count"]) == (12, 40, 2)
    assert seen == [asked] * 4
    assert (tmp_path / "a.db").read_bytes() == image


def test_restore_says_where_a_database_is_empty(cli, tmp_path):
    headers = {"ETag": '"1"', "Content-Length": "0"}
    cli.api.transport = lambda: httpx.MockTransport(
        lambda _: httpx.Response(200, headers=headers, stream=httpx.ByteStream(b""))
    )
    ran = cli.json("restore", "acme/a", "-o", str(tmp_path / "a.db"))
    assert (ran.exit_code, ran.problem["code"]) == (1, "empty_database")
    assert list(tmp_path.iterdir()) == []
