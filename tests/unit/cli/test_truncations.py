import json

import pytest


def test_truncate_answers_with_the_job(cli, api):
    api.add_database("acme", "events")
    ran = cli("truncate", "acme/events", "--head", "7")
    assert ran.exit_code == 0
    assert "jobs watch" in ran.stderr
    assert json.loads(api.requests[-1].content) == {
        "tenant": "acme", "database": "events", "direction": "head", "lsn": 7, "on_lease": "wait",
        "lease_timeout_seconds": 30.0,
    }  # fmt: skip
    assert api.requests[-1].headers["Idempotency-Key"]


def test_truncate_waits_and_tells_what_was_dropped(cli, api):
    api.add_database("acme", "events")
    ran = cli(
        "truncate", "acme/events", "--tail", "7", "--on-lease", "cancel", "--timeout", "2", "--wait"
    )
    assert ran.exit_code == 0
    asked = json.loads(api.requests[0].content)
    assert (asked["direction"], asked["on_lease"]) == ("tail", "cancel")
    assert asked["lease_timeout_seconds"] == 2
    facts = dict(line.split(maxsplit=1) for line in ran.stdout.splitlines() if "Dropped" in line)
    assert facts["Dropped"].strip() == "7-9"
    job = cli.json("truncate", "acme/events", "--tail", "7", "--wait").json
    assert (job["state"], job["result"]["outcome"]) == ("completed", "truncated")


@pytest.mark.parametrize("arguments", [[], ["--head", "1", "--tail", "2"], ["--head", "0"]])
def test_one_direction_is_named(cli, arguments):
    ran = cli("truncate", "acme/events", *arguments)
    assert ran.exit_code == 2


def test_truncate_of_no_database(cli):
    ran = cli.json("truncate", "acme/none", "--head", "1")
    assert (ran.exit_code, ran.problem["code"]) == (1, "database_not_found")
