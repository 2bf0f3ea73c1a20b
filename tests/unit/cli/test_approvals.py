import json
import os
import subprocess
import sys

TIME = "2026-11-23T21:05:00Z"

APPROVAL = {
    "approval_id": "01A", "state": "pending", "action": "lease.release", "tenant": "acme",
    "database": "events", "chunk_id": 4, "job_id": "01J", "token": 17, "reason": "it hangs",
    "requested_by": "ann", "requested_at": TIME, "expires_at": TIME, "decided_by": None,
    "decided_at": None, "released": False,
}  # fmt: skip
DONE = {**APPROVAL, "state": "approved", "decided_by": "bob", "decided_at": TIME, "released": True}
ENTRY = {
    "sequence": 2, "at": TIME, "principal": "ann", "action": "POST /admin/queue/drain",
    "path": "/admin/queue/drain", "tenant": None, "reason": None, "request": "", "request_id": "r",
    "outcome": "refused", "status": 403, "code": "forbidden", "answer": "", "ended_at": TIME,
}  # fmt: skip


def test_a_lease_is_asked_for_with_a_reason(cli, api):
    api.canned["POST", "/admin/checkpoint/lease/release/4"] = (202, APPROVAL)
    ran = cli("leases", "release", "acme/events", "4", "--reason", "it hangs")
    assert ran.exit_code == 0
    assert "approvals approve 01A" in ran.stderr
    request = api.requests[-1]
    assert dict(request.url.params) == {"tenant": "acme", "database": "events"}
    assert json.loads(request.content) == {"reason": "it hangs"}
    assert cli("leases", "release", "acme/events", "4").exit_code == 2  # why is not said
    assert cli.json("leases", "release", "acme/events", "4", "--reason", "x").json == APPROVAL


def test_approvals_are_listed_and_decided(cli, api):
    api.canned["GET", "/admin/approvals"] = (200, {"items": [APPROVAL], "next_cursor": None})
    api.canned["POST", "/admin/approvals/01A/approve"] = (200, DONE)
    api.canned["POST", "/admin/approvals/01A/reject"] = (200, {**DONE, "state": "rejected"})
    assert "acme/events" in cli("approvals", "list").stdout
    assert cli.json("approvals", "list").json == {"items": [APPROVAL]}
    assert cli.json("approvals", "approve", "01A").json == DONE
    assert "rejected" in cli("approvals", "reject", "01A").stdout
    own = {"code": "self_approval", "title": "t", "detail": "ann asked for this.", "status": 403}
    api.canned["POST", "/admin/approvals/01A/approve"] = (403, own)
    assert cli("approvals", "approve", "01A").exit_code == 1


def test_a_reason_cannot_move_the_cursor_of_who_decides(cli, api):
    hidden = {**APPROVAL, "reason": "x\x1b[1A\x1b[2K\nall is well"}
    api.canned["GET", "/admin/approvals"] = (200, {"items": [hidden], "next_cursor": None})
    api.canned["POST", "/admin/approvals/01A/reject"] = (200, hidden)
    for ran in (cli("approvals", "list"), cli("approvals", "reject", "01A")):
        assert "\x1b" not in ran.stdout
        assert r"x\x1b[1A\x1b[2K" in ran.stdout
    assert len(cli("approvals", "list").stdout.splitlines()) == 2
    assert cli.json("approvals", "list").json["items"] == [hidden]  # programs get it as it is


def test_the_audit_log(cli, api):
    api.canned["GET", "/admin/audit"] = (200, {"items": [ENTRY], "next_cursor": None})
    shown = cli("audit").stdout
    assert "refused (forbidden)" in shown
    assert cli.json("audit").json == {"items": [ENTRY]}


def test_backup_says_where_it_is(cli, api):
    made = {"path": "/data/backups/manifest-1", "bytes": 2048, "sequence": 7}
    api.canned["POST", "/admin/manifest/backup"] = (200, made)
    assert "/data/backups/manifest-1" in cli("manifest", "backup").stdout
    assert cli.json("manifest", "backup").json == made


def test_explain_says_what_is_waited_for(cli, api):
    reason = {
        "kind": "lease", "detail": "Chunk 3 is leased.", "job_id": "01X", "chunk_id": 3,
        "until": None,
    }  # fmt: skip
    found = {"job_id": "01J", "summary": "It waits for: lease.", "waits_for": [reason]}
    api.canned["GET", "/debug/jobs/01J/explain"] = (200, found)
    ran = cli("jobs", "explain", "01J")
    assert ran.stderr == "It waits for: lease.\n"
    assert ran.stdout.splitlines()[1].split()[:2] == ["lease", "01X"]
    assert cli.json("jobs", "explain", "01J").json == found


def test_the_shell_completes_commands_and_options():
    def completed(*words: str) -> set[str]:
        ran = subprocess.run(
            [sys.executable, "-m", "app.cli.main"],
            env={
                **os.environ,
                "_BOP_CHECKPOINT_COMPLETE": "complete_bash",
                "COMP_WORDS": " ".join(("bop-checkpoint", *words)),
                "COMP_CWORD": str(len(words)),
            },
            capture_output=True,
            text=True,
            check=True,
        )
        return set(ran.stdout.split())

    assert completed("app") == {"append", "approvals"}
    assert "--reason" in completed("leases", "release", "--r")
