import json

from tests.helpers.fake_api import TIME


def test_create_sends_what_is_given_and_shows_the_database(cli, api):
    ran = cli("databases", "create", "acme/events", "--chunk-bytes", "65536")
    assert ran.exit_code == 0
    assert json.loads(api.requests[-1].content) == {"engine": "append_only", "chunk_bytes": 65536}
    assert ran.stderr == "Created acme/events.\n"
    assert "64.0 KiB" in ran.stdout
    again = cli("databases", "create", "acme/events")
    assert (again.exit_code, again.stderr) == (0, "Exists already: acme/events.\n")
    assert cli.json("databases", "create", "acme/events").json["chunk_bytes"] == 65536


def test_create_with_other_properties_fails(cli, api):
    api.add_database("acme", "events")
    ran = cli.json("databases", "create", "acme/events", "--engine", "libsql")
    assert (ran.exit_code, ran.problem["code"]) == (1, "database_conflict")


def test_list_as_table_and_as_json(cli, api):
    api.add_records("acme", "events", b"a", b"b")
    api.add_database("acme", "more", wal_bytes=1536)
    api.add_database("other", "secret")
    table = cli("databases", "list", "acme").stdout.splitlines()
    assert table[0].split()[:2] == ["DATABASE", "ENGINE"]
    assert [line.split()[0] for line in table[1:]] == ["acme/events", "acme/more"]
    assert "1-2" in table[1]
    assert "1.5 KiB" in table[2]
    found = cli.json("databases", "list", "acme").json
    assert [one["database"] for one in found["items"]] == ["events", "more"]


def test_an_empty_list_says_so_on_standard_error(cli):
    ran = cli("databases", "list", "acme")
    assert (ran.exit_code, ran.stdout, ran.stderr) == (0, "", "acme has no database.\n")
    assert cli.json("databases", "list", "acme").json == {"items": []}


def test_show_tells_of_a_loss(cli, api):
    api.add_database("acme", "events", health={"state": "wal_lost", "lost_from_lsn": 41})
    shown = cli("databases", "show", "acme/events").stdout
    assert "wal_lost" in shown
    assert "41" in shown
    assert cli.json("databases", "acknowledge-loss", "acme/events").json["health"] == {
        "state": "ok",
        "lost_from_lsn": None,
    }


def test_generations(cli, api):
    api.add_database("acme", "events")
    assert "checkpoint acme/events" in cli("generations", "acme/events").stderr
    api.generations = [
        {
            "generation": 1, "checkpoint_id": "c1", "created_at": TIME, "first_lsn": 1,
            "last_lsn": 9, "page_count": 0, "base_chunks": 1, "delta_chunks": 0,
            "bytes_uploaded": 2048, "superseded_at": None, "verified_at": None,
        }
    ]  # fmt: skip
    table = cli("generations", "acme/events").stdout.splitlines()
    assert table[1].split() == [
        "1", "2026-11-23", "21:05:00Z", "1-9", "1", "0", "2.0", "KiB", "-",
    ]  # fmt: skip
    assert cli.json("generations", "acme/events").json["items"][0]["created_at"].startswith("2026")
