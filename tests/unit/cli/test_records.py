import os
import struct
import threading

import pytest

from app.cli.record_input import LineBatcher, iter_batches
from app.core.base.errors import MalformedRecords
from tests.helpers.fake_api import records_of


def stored(api) -> list[bytes]:
    return list(api.databases["acme", "events"].records.values())


def test_append_lines_of_standard_input(cli, api):
    api.add_database("acme", "events")
    ran = cli("append", "acme/events", input=b'{"n":1}\n\n{"n":3}')
    assert ran.exit_code == 0
    assert ran.stdout == "Appended 3 records (14 B) to acme/events as LSN 1-3.\n"
    assert stored(api) == [b'{"n":1}', b"", b'{"n":3}']


def test_append_a_file_as_json(cli, api, tmp_path):
    api.add_database("acme", "events")
    file = tmp_path / "lines"
    file.write_bytes(b"a\nb\n")
    ran = cli.json("append", "acme/events", str(file))
    assert ran.json == {"first_lsn": 1, "last_lsn": 2, "count": 2, "bytes": 2}


def test_append_single_and_framed_records(cli, api, tmp_path):
    api.add_database("acme", "events")
    assert cli("append", "acme/events", "-", "--format", "single", input=b"a\nb\n").exit_code == 0
    framed = struct.pack("<I", 2) + b"\n\n" + struct.pack("<I", 0)
    assert cli("append", "acme/events", "--format", "records", input=framed).exit_code == 0
    assert stored(api) == [b"a\nb\n", b"\n\n", b""]


def test_a_long_input_is_appended_in_parts_and_totalled(cli, api, monkeypatch):
    monkeypatch.setattr("app.cli.record_input.READ_BYTES", 1000)
    monkeypatch.setattr("app.cli.record_input.iter_batches.__kwdefaults__", {"batch_bytes": 4000})
    api.add_database("acme", "events")
    lines = b"".join(b"line %d\n" % number for number in range(5000))
    ran = cli.json("append", "acme/events", input=lines)
    assert ran.json["count"] == 5000
    assert ran.json["last_lsn"] == 5000
    assert stored(api) == lines.splitlines()
    bodies = [request.content for request in api.requests]
    assert len(bodies) > 5
    assert all(4000 <= len(body) <= 5000 and body.endswith(b"\n") for body in bodies[:-1])
    assert len({request.headers["Idempotency-Key"] for request in api.requests}) == len(bodies)


def test_a_failure_on_the_way_tells_what_was_stored(cli, api, monkeypatch):
    monkeypatch.setattr("app.cli.record_input.READ_BYTES", 8)
    monkeypatch.setattr("app.cli.record_input.iter_batches.__kwdefaults__", {"batch_bytes": 8})
    api.add_database("acme", "events")
    framed = b"".join(struct.pack("<I", 4) + b"abcd" for _ in range(3)) + b"\x09\x00"
    ran = cli.json("append", "acme/events", "--format", "records", input=framed)
    assert ran.exit_code == 1
    assert ran.problem["code"] == "malformed_records"
    assert ran.problem["appended"] == {"count": 3, "last_lsn": 3}
    assert len(stored(api)) == 3


def test_append_failures_before_anything_is_sent(cli, api, tmp_path):
    api.add_database("acme", "events")
    missing = cli("append", "acme/events", str(tmp_path / "none"))
    assert missing.exit_code == 1
    assert "cannot be read: No such file" in missing.stderr
    assert "cannot be read" in cli("append", "acme/events", str(tmp_path)).stderr
    empty = cli.json("append", "acme/events", input=b"")
    assert (empty.exit_code, empty.problem["code"]) == (1, "malformed_records")
    assert api.requests == []


async def test_a_pipe_is_appended_as_it_comes():
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb", buffering=0) as source, os.fdopen(writing, "wb", 0) as sink:
        batches = iter_batches(source, "ndjson")
        sink.write(b"one\ntwo\nthr")
        assert (await anext(batches)).body == b"one\ntwo\n"
        writer = threading.Timer(0.02, sink.write, [b"ee\n"])
        writer.start()
        assert (await anext(batches)).body == b"three\n"
        writer.join()
        sink.write(b"last")
        sink.close()
        assert [batch.body async for batch in batches] == [b"last"]


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_lines_are_cut_behind_newlines_only(size):
    text = b"a\n\nbcd\r\nefg\n\n\nh"
    lines = LineBatcher(4)
    bodies = []
    for at in range(0, len(text), size):
        bodies += lines.feed(text[at : at + size], more_waits=True)
    bodies += lines.finish()
    assert b"".join(bodies) == text
    assert [one for body in bodies for one in records_of("application/x-ndjson", body)] == [
        b"a", b"", b"bcd\r", b"efg", b"", b"", b"h",
    ]  # fmt: skip


def test_no_line_is_no_record():
    with pytest.raises(MalformedRecords):
        list(LineBatcher(10).finish())
    only_newline = LineBatcher(10)
    assert list(only_newline.feed(b"\n", more_waits=False)) == [b"\n"]
    assert list(only_newline.finish()) == []


def test_records_come_out_as_they_went_in(cli, api):
    api.add_records("acme", "events", b'{"n":1}', b"", b"last")
    assert cli("records", "acme/events").stdout_bytes == b'{"n":1}\n\nlast\n'
    framed = cli("records", "acme/events", "--format", "records").stdout_bytes
    assert records_of("framed", framed) == [b'{"n":1}', b"", b"last"]
    chosen = cli("records", "acme/events", "--from", "2", "--to", "3", "--limit", "1")
    assert chosen.stdout_bytes == b"\n"
    single = cli("records", "acme/events", "--from", "3", "--format", "single")
    assert single.stdout_bytes == b"last"


def test_records_as_json_lines(cli, api):
    api.add_records("acme", "events", b'{"n":1}', b"\xff\x00", b"two\nlines")
    assert cli.json("records", "acme/events").lines == [
        {"lsn": 1, "record": '{"n":1}'},
        {"lsn": 2, "base64": "/wA="},
        {"lsn": 3, "record": "two\nlines"},
    ]


def test_a_record_that_is_no_line_is_refused_as_line(cli, api):
    api.add_records("acme", "events", b"fine", b"two\nlines")
    ran = cli("records", "acme/events")
    assert ran.exit_code == 1
    assert "LSN 2 holds a newline" in ran.stderr
    assert "--format records" in ran.stderr


def test_records_of_a_truncated_start(cli, api):
    api.add_records("acme", "events", b"a", b"b")
    api.databases["acme", "events"].members["first_lsn"] = 2
    assert cli("records", "acme/events").stdout_bytes == b"b\n"
    ran = cli.json("records", "acme/events", "--from", "1")
    assert (ran.exit_code, ran.problem["first_lsn"]) == (1, 2)


def test_no_record_to_show(cli, api):
    api.add_database("acme", "events")
    ran = cli("records", "acme/events")
    assert (ran.exit_code, ran.stdout) == (0, "")
    assert cli("records", "acme/events", "--format", "single").exit_code == 1


def test_follow_asks_for_what_is_to_come(cli, api):
    api.add_records("acme", "events", b"a")
    ran = cli("records", "acme/events", "--from", "1", "--follow", "--limit", "1")
    assert ran.stdout_bytes == b"a\n"
    assert float(api.requests[-1].url.params["wait"]) > 0
