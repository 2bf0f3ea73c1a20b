import hashlib

from tests.helpers.fake_api import TIME


def change(sequence: int) -> dict[str, object]:
    return {
        "sequence": sequence, "committed_at": TIME, "tenant": "acme", "database": "events",
        "generation": 1, "reason": "checkpoint.published", "ops": [{"type": "UpsertChunk"}],
    }  # fmt: skip


def test_leases(cli, api):
    assert cli("leases", "list").stderr == "No chunk is leased.\n"
    api.leases = [
        {
            "tenant": "acme", "database": "events", "chunk_id": 4, "generation": 2,
            "job_id": "01J", "token": 17, "registered_at": TIME, "expires_at": TIME,
        }
    ]  # fmt: skip
    assert cli("leases", "list").stdout.splitlines()[1].split()[:5] == [
        "acme/events", "4", "2", "01J", "17",
    ]  # fmt: skip
    assert cli.json("leases", "list").json["items"][0]["token"] == 17


def test_manifest_stats_with_units(cli):
    assert cli("manifest", "stats").stdout.split() == [
        "map_bytes", "64.0", "GiB", "rows.databases", "1",
    ]  # fmt: skip
    assert cli.json("manifest", "stats").json["map_bytes"] == 1 << 36


def test_change_log_as_table_and_as_lines(cli, api):
    api.changes = [change(1), change(2), change(3)]
    assert len(cli("manifest", "change-log").stdout.splitlines()) == 4
    found = cli.json("manifest", "change-log", "--after", "1", "--limit", "1").lines
    assert [one["sequence"] for one in found] == [2]
    assert found[0]["ops"] == [{"type": "UpsertChunk"}]
    assert cli.json("manifest", "change-log", "--after", "3").stdout == ""


def test_fsck_of_a_running_service(cli, api):
    clean = cli("fsck")
    assert (clean.exit_code, clean.stdout) == (0, "")
    assert "Everything agrees." in clean.stderr
    api.findings = [{"invariant": "I2", "where": "blob x", "detail": "is gone"}]
    dirty = cli("fsck")
    assert dirty.exit_code == 1
    assert dirty.stdout.splitlines()[1].split() == ["I2", "blob", "x", "is", "gone"]
    ran = cli.json("fsck")
    assert ran.exit_code == 1
    assert ran.json == {"findings": api.findings, "checked": {"databases": 0}}


def test_fsck_of_no_data_directory_makes_none(cli, tmp_path):
    place = tmp_path / "none"
    ran = cli.json("fsck", "--data-dir", str(place))
    assert (ran.exit_code, ran.problem["code"]) == (1, "no_manifest")
    assert not place.exists()


def test_tokens_hash(cli):
    wanted = hashlib.sha256(b"s3cret").hexdigest()
    assert cli("tokens", "hash", "s3cret").stdout == f"{wanted}\n"
    assert cli("tokens", "hash", input=b"s3cret\n").stdout == f"{wanted}\n"
    assert cli.json("tokens", "hash", "-", input=b"s3cret").json == {"sha256": wanted}
    made = cli.json("tokens", "hash", "--generate").json
    assert hashlib.sha256(made["token"].encode()).hexdigest() == made["sha256"]
    assert len(made["token"]) == 64
    assert cli.json("tokens", "hash", "--generate").json["token"] != made["token"]
    assert cli("tokens", "hash", input=b"").exit_code == 2
    assert cli("tokens", "hash", "x", "--generate").exit_code == 2
