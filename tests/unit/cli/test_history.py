import json

import pytest

from tests.helpers.fake_api import TIME


@pytest.fixture(autouse=True)
def database(api):
    return api.add_database("acme", "events")


def sent(api) -> dict:
    return json.loads(api.requests[-1].content)


def test_snapshots_are_made_listed_and_deleted(cli, api):
    ran = cli("snapshots", "create", "acme/events", "monday")
    assert (ran.exit_code, ran.stdout) == (0, "monday pins generation 3, LSN 90.\n")
    assert sent(api) == {"name": "monday"}
    assert "Idempotency-Key" in api.requests[-1].headers
    made = cli.json("snapshots", "create", "acme/events", "old", "--generation", "1").json
    assert made["generation"] == 1
    table = cli("snapshots", "list", "acme/events").stdout.splitlines()
    assert table[0].split()[:2] == ["SNAPSHOT", "GENERATION"]
    assert [line.split()[:3] for line in table[1:]] == [["monday", "3", "90"], ["old", "1", "90"]]
    ran = cli("snapshots", "delete", "acme/events", "old")
    assert (ran.exit_code, ran.stderr) == (0, "Deleted snapshot old of acme/events.\n")
    assert [one["name"] for one in cli.json("snapshots", "list", "acme/events").json["items"]] == [
        "monday"
    ]
    ran = cli.json("snapshots", "delete", "acme/events", "old")
    assert (ran.exit_code, ran.problem["code"]) == (1, "snapshot_not_found")
    ran = cli.json("snapshots", "delete", "acme/events", "monday")
    assert ran.json == {"database": "acme/events", "deleted": "monday"}


def test_no_snapshot_says_so(cli):
    assert cli("snapshots", "list", "acme/events").stderr == "acme/events has no snapshot.\n"


def test_fork(cli, api):
    ran = cli("fork", "acme/events", "copy")
    assert (ran.exit_code, ran.stderr) == (0, "Forked acme/events to acme/copy.\n")
    assert "acme/events@3" in ran.stdout
    assert sent(api) == {"database": "copy"}
    made = cli.json("fork", "acme/events", "other", "--tenant", "zeta", "--generation", "2").json
    assert (made["tenant"], made["forked_from"]["generation"]) == ("zeta", 2)
    cli("fork", "acme/events", "third", "--snapshot", "monday")
    assert sent(api) == {"database": "third", "snapshot": "monday"}
    named = cli.json("fork", "acme/events", "zeta/fourth").json
    assert (named["tenant"], named["database"]) == ("zeta", "fourth")
    assert cli("fork", "acme/events", "zeta/x", "--tenant", "acme").exit_code == 2
    ran = cli("fork", "acme/events", "x", "--snapshot", "monday", "--generation", "2")
    assert ran.exit_code == 2


def test_update_sends_only_the_rules_that_are_named(cli, api, database):
    ran = cli("databases", "update", "acme/events", "--keep-seconds", "none")
    assert sent(api) == {"retention": {"keep_seconds": None}}
    assert "Retention" in ran.stdout
    assert "at least 2 " in ran.stdout
    rules = ("--keep-generations", "5", "--keep-seconds", "60", "--minimum-generations", "3")
    shown = cli("databases", "update", "acme/events", *rules).stdout
    assert "at least 3, the newest 5, the last" in shown
    assert sent(api) == {
        "retention": {"keep_generations": 5, "keep_seconds": 60, "minimum_generations": 3}
    }
    assert cli("databases", "update", "acme/events").exit_code == 2
    assert cli("databases", "update", "acme/events", "--keep-seconds", "soon").exit_code == 2


def test_generations_that_are_about_to_go(cli, api):
    assert cli("generations", "acme/events", "--expiring").stderr == (
        "acme/events: every generation is kept.\n"
    )
    api.generations = [
        {
            "generation": number, "checkpoint_id": "c", "created_at": TIME, "first_lsn": 1,
            "last_lsn": 9, "page_count": 0, "base_chunks": 1, "delta_chunks": 0,
            "bytes_uploaded": 1, "superseded_at": superseded, "verified_at": None,
        }
        for number, superseded in ((1, TIME), (2, None))
    ]  # fmt: skip
    found = cli.json("generations", "acme/events", "--expiring").json["items"]
    assert [one["generation"] for one in found] == [1]
