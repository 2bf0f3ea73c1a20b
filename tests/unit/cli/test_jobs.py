import json

import pytest


def test_checkpoint_answers_with_the_job(cli, api):
    api.add_database("acme", "events")
    ran = cli("checkpoint", "acme/events", "--reason", "before the upgrade")
    assert ran.exit_code == 0
    assert "pending" in ran.stdout
    assert "jobs watch" in ran.stderr
    assert json.loads(api.requests[-1].content) == {
        "tenant": "acme", "database": "events", "reason": "before the upgrade",
    }  # fmt: skip


def test_checkpoint_waits_until_it_has_ended(cli, api):
    api.add_database("acme", "events")
    ran = cli("checkpoint", "acme/events", "--wait")
    assert ran.exit_code == 0
    assert "completed" in ran.stdout
    assert "2.0 KiB" in ran.stdout
    job = cli.json("checkpoint", "acme/events", "--wait").json
    assert (job["state"], job["result"]["outcome"]) == ("completed", "published")


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_a_checkpoint_that_does_not_complete_is_1(cli, api, state):
    api.add_database("acme", "events")
    api.add_job("pending", "in_flight", state)
    ran = cli.json("checkpoint", "acme/events", "--wait")
    assert ran.exit_code == 1
    assert ran.json["state"] == state


def test_checkpoint_of_no_database(cli):
    ran = cli.json("checkpoint", "acme/none", "--wait")
    assert (ran.exit_code, ran.problem["code"]) == (1, "database_not_found")


def test_jobs_list(cli, api):
    api.add_job("in_flight")
    table = cli("jobs", "list", "--state", "in_flight", "--tenant", "acme").stdout.splitlines()
    assert table[1].split()[1:5] == ["create_checkpoint", "acme/events", "in_flight", "(uploading)"]
    assert api.requests[-1].url.params.get_list("state") == ["in_flight"]
    cli("jobs", "list", "--state", "pending", "--state", "in_flight")
    assert api.requests[-1].url.params.get_list("state") == ["pending", "in_flight"]
    assert len(cli.json("jobs", "list").json["items"]) == 1
    api.jobs.clear()
    assert cli("jobs", "list").stderr == "There are no such jobs.\n"


def test_jobs_show_tells_the_error(cli, api):
    job_id = api.add_job("failed")
    shown = cli("jobs", "show", job_id).stdout
    assert "No lease. (lease_timeout)" in shown
    assert cli.json("jobs", "show", job_id).json["error"]["code"] == "lease_timeout"
    missing = cli("jobs", "show", "01NONE")
    assert missing.exit_code == 1
    assert "jobs list" in missing.stderr


def test_jobs_show_names_the_blobs_that_a_verification_found(cli, api):
    job_id = api.add_job("failed", kind="verify_manifest")
    findings = [{"key": "chunk-0", "outcome": "repaired"}, {"key": "chunk-1", "outcome": "damaged"}]
    api.jobs[job_id]["result"] = {"outcome": "damaged", "findings": findings}
    lines = [line.split() for line in cli("jobs", "show", job_id).stdout.splitlines()]
    at = lines.index(["Findings", "repaired", "chunk-0"])
    assert lines[at + 1] == ["damaged", "chunk-1"]


def test_jobs_watch_tells_each_change(cli, api):
    job_id = api.add_job("pending", "pending", "in_flight", "completed")
    changes = cli.json("jobs", "watch", job_id).lines
    assert [change["state"] for change in changes] == ["pending", "in_flight", "completed"]
    other = api.add_job("in_flight", "in_flight", "failed", kind="verify_manifest")
    ran = cli("jobs", "watch", other)
    assert ran.exit_code == 1
    assert "in_flight, uploading" in ran.stderr
    assert "failed" in ran.stdout


def test_jobs_cancel(cli, api):
    assert cli("jobs", "cancel", api.add_job("in_flight")).exit_code == 0
    ran = cli.json("jobs", "cancel", api.add_job("completed"))
    assert (ran.exit_code, ran.problem["code"]) == (1, "job_already_ended")
