"""Bad input: each with its problem code, and nothing kept (I13)."""

import asyncio
import json
import shutil
import socket
import struct

import httpx
import pytest

from app.container import fsck
from app.core.formats.record_framing import pack_records
from app.settings import Settings
from tests.conftest import MakeServer
from tests.helpers.server import ServerProcess
from tests.helpers.wait import wait_until
from tests.helpers.workload import RECORDS, scratch_left

LOG = "/tenants/acme/databases/log"
URL = f"{LOG}/records"
FRAMED = {"Content-Type": RECORDS}


@pytest.fixture
async def log(make_server: MakeServer) -> ServerProcess:
    """A service with one empty append_only database, and small limits."""
    server = make_server(
        settings={"BOP_MAX_RECORD_BYTES": "1000", "BOP_MAX_APPEND_BYTES": "100000"}
    )
    await server.start()
    await server.client.put(LOG, json={"engine": "append_only"})
    return server


def assert_problem(answer: httpx.Response, status: int, code: str) -> dict:
    assert (answer.status_code, answer.headers["content-type"]) == (
        status,
        "application/problem+json",
    ), answer.text
    problem = answer.json()
    assert problem["code"] == code
    assert problem["type"] == f"urn:bop:problem:{code}"
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    assert problem["request_id"] == answer.headers["X-Request-ID"]
    return problem


async def assert_nothing_kept(server: ServerProcess, *, next_lsn: int = 1) -> None:
    database = (await server.client.get(LOG)).json()
    assert database["next_lsn"] == next_lsn
    assert (await server.client.get("/debug/checkpoint/leases")).json()["items"] == []
    assert scratch_left(server.data_dir) == []
    spool = server.data_dir / "spool"
    assert not spool.exists() or not list(spool.iterdir())


LONG = b"x" * 1001


@pytest.mark.parametrize(
    ("content", "media_type", "status", "code"),
    [
        (b"\x05\x00\x00\x00four", RECORDS, 400, "malformed_records"),
        (b"\x05\x00\x00", RECORDS, 400, "malformed_records"),
        (pack_records([b"whole"]) + b"\x01", RECORDS, 400, "malformed_records"),
        (b"", RECORDS, 400, "malformed_records"),
        (b"", "application/x-ndjson", 400, "malformed_records"),
        (pack_records([b"fits", LONG]), RECORDS, 413, "record_too_large"),
        (struct.pack("<I", 0xFFFFFFFF), RECORDS, 413, "record_too_large"),
        (b"fits\n" + LONG, "application/x-ndjson", 413, "record_too_large"),
        (LONG, "application/octet-stream", 413, "record_too_large"),
        (pack_records([b"y" * 900] * 200), RECORDS, 413, "body_too_large"),
        (b"{}", "application/json", 415, "unsupported_media_type"),
        (b"{}", "text/plain", 415, "unsupported_media_type"),
    ],
)
async def test_a_bad_body_is_refused_whole(log, content, media_type, status, code):
    answer = await log.client.post(URL, content=content, headers={"Content-Type": media_type})
    assert_problem(answer, status, code)
    await assert_nothing_kept(log)


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/tenants/acme/databases/none/records", 404, "database_not_found"),
        ("/tenants/ACME/databases/log/records", 422, "invalid_request"),
        ("/tenants/acme/databases/..%2flog/records", 404, "not_found"),
        ("/tenants/acme/databases/%2e%2e/records", 422, "invalid_request"),
        ("/tenants/acme/databases/a%00b/records", 422, "invalid_request"),
        ("/tenants/-acme/databases/log/records", 422, "invalid_request"),
    ],
)
async def test_names_with_tricks_reach_nothing(log, path, status, code):
    answer = await log.client.post(path, content=pack_records([b"x"]), headers=FRAMED)
    assert answer.status_code in {status, 404, 422}
    assert_problem(answer, answer.status_code, answer.json()["code"])
    if answer.status_code == status:
        assert answer.json()["code"] == code
    assert not [name for name in log.data_dir.parent.iterdir() if name.name == "log"]
    await assert_nothing_kept(log)


async def test_records_are_for_append_only_databases(log):
    path = "/tenants/acme/databases/pages"
    await log.client.put(path, json={"engine": "libsql"})
    answer = await log.client.post(f"{path}/records", content=pack_records([b"x"]), headers=FRAMED)
    assert_problem(answer, 409, "wrong_engine")


@pytest.mark.parametrize(
    "body",
    [
        {"engine": "append_only", "colour": "blue"},
        {"engine": "rocksdb"},
        {},
        {"engine": "append_only", "chunk_bytes": 65_537},
        {"engine": "append_only", "chunk_bytes": 32_768},
        {"engine": "append_only", "page_size": 4096},
        {"engine": "libsql", "page_size": 100},
        {"engine": "append_only", "compression": "rar"},
    ],
)
async def test_a_database_is_asked_for_exactly(log, body):
    answer = await log.client.put("/tenants/acme/databases/other", json=body)
    assert_problem(answer, 422, "invalid_request")
    assert_problem(await log.client.get("/tenants/acme/databases/other"), 404, "database_not_found")


async def test_an_existing_database_keeps_its_properties(log):
    same = await log.client.put(LOG, json={"engine": "append_only"})
    assert same.status_code == 200
    other = await log.client.put(LOG, json={"engine": "append_only", "compression": "zstd"})
    assert_problem(other, 409, "database_conflict")
    assert_problem(await log.client.put(LOG, json={"engine": "libsql"}), 409, "database_conflict")


async def test_a_stale_if_match_appends_nothing(log):
    body = pack_records([b"x"])
    first = await log.client.post(URL, content=body, headers={**FRAMED, "If-Match": '"1"'})
    assert first.status_code == 201
    stale = await log.client.post(URL, content=body, headers={**FRAMED, "If-Match": '"1"'})
    assert assert_problem(stale, 412, "lsn_mismatch")["next_lsn"] == 2
    await assert_nothing_kept(log, next_lsn=2)


async def test_lsns_that_cannot_be_named(log):
    await log.client.post(URL, content=pack_records([b"a", b"b"]), headers=FRAMED)
    for query in ("from_lsn=0", "from_lsn=-1", "from_lsn=x", "from_lsn=1&limit=0"):
        answer = await log.client.get(f"{URL}?{query}")
        assert answer.status_code in {422, 410}, (query, answer.text)
        assert answer.headers["content-type"] == "application/problem+json"
    beyond = await log.client.get(f"{URL}?from_lsn=3")
    assert (beyond.status_code, beyond.content) == (200, b"")


async def test_a_record_with_a_newline_is_not_a_line(log):
    await log.client.post(URL, content=pack_records([b"a", b"b\nc"]), headers=FRAMED)
    answer = await log.client.get(f"{URL}?from_lsn=1", headers={"Accept": "application/x-ndjson"})
    assert_problem(answer, 406, "not_line_records")
    only_first = await log.client.get(
        f"{URL}?from_lsn=1&to_lsn=1", headers={"Accept": "application/x-ndjson"}
    )
    assert only_first.content == b"a\n"
    other = await log.client.get(f"{URL}?from_lsn=1", headers={"Accept": "text/html"})
    assert_problem(other, 406, "not_acceptable")


async def test_ndjson_edges(log):
    body = b'{"a":1}\r\n\n{"b":2}'
    answer = await log.client.post(
        URL, content=body, headers={"Content-Type": "application/x-ndjson"}
    )
    assert answer.json()["count"] == 3
    lines = await log.client.get(f"{URL}?from_lsn=1", headers={"Accept": "application/x-ndjson"})
    assert lines.content == b'{"a":1}\r\n\n{"b":2}\n'


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/nothing/here", None, 404, "not_found"),
        ("DELETE", "/checkpoints", None, 405, "method_not_allowed"),
        ("POST", "/checkpoints", {"tenant": "acme"}, 422, "invalid_request"),
        (
            "POST", "/checkpoints", {"tenant": "acme", "database": "none"},
            404, "database_not_found",
        ),
        (
            "POST", "/checkpoints", {"tenant": "acme", "database": "log", "x": 1},
            422, "invalid_request",
        ),
        ("GET", "/checkpoints/01ARZ3NDEKTSV4RRFFQ69G5FAV", None, 404, "job_not_found"),
        ("POST", "/checkpoints/01ARZ3NDEKTSV4RRFFQ69G5FAV/cancel", None, 404, "job_not_found"),
        ("GET", "/checkpoints?limit=0", None, 422, "invalid_request"),
        ("GET", "/checkpoints?limit=1001", None, 422, "invalid_request"),
        ("GET", "/checkpoints?cursor=%%%", None, 422, "invalid_request"),
        ("GET", f"{LOG}/generations?cursor=bogus", None, 422, "invalid_request"),
    ],
)  # fmt: skip
async def test_other_requests_that_cannot_be(log, method, path, body, status, code):
    answer = await log.client.request(method, path, json=body)
    assert_problem(answer, status, code)
    await assert_nothing_kept(log)


async def test_a_client_that_leaves_in_mid_body_leaves_nothing(log):
    for head in (b"Content-Length: 1000\r\n", b"Transfer-Encoding: chunked\r\n"):
        reader, writer = await asyncio.open_connection("127.0.0.1", log.port)
        writer.write(
            b"POST " + URL.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Type: "
            + RECORDS.encode() + b"\r\n" + head + b"\r\n"
        )  # fmt: skip
        whole = pack_records([b"a whole record, and then nothing"])
        writer.write(whole if b"Length" in head else b"%x\r\n%s\r\n" % (len(whole), whole))
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        del reader
    told = await log.client.post(URL, content=pack_records([b"next"]), headers=FRAMED)
    assert told.json()["first_lsn"] == 1
    await assert_nothing_kept(log, next_lsn=2)


async def test_bit_rot_in_acknowledged_wal_is_told_and_nothing_is_cut(log):
    for number in range(3):
        await log.client.post(URL, content=pack_records([b"record %d" % number]), headers=FRAMED)
    await log.kill9()
    path = next((log.data_dir / "wal").rglob("*.wal"))
    data = bytearray(path.read_bytes())
    at = data.index(b"record 0")
    data[at] ^= 1
    path.write_bytes(data)
    await log.start()
    database = (await log.client.get(LOG)).json()
    assert database["health"]["state"] == "corrupt_wal"
    refused = await log.client.post(URL, content=pack_records([b"x"]), headers=FRAMED)
    assert_problem(refused, 500, "corrupt_wal")
    for query in ("", "?from_lsn=1&wait=30", "?from_lsn=2"):  # no empty answer, as if all was read
        assert_problem(await log.client.get(f"{URL}{query}"), 500, "corrupt_wal")
    assert path.read_bytes() == data
    other = "/tenants/acme/databases/other"  # one database's damage stops no other
    await log.client.put(other, json={"engine": "append_only"})
    told = await log.client.post(f"{other}/records", content=pack_records([b"x"]), headers=FRAMED)
    assert told.status_code == 201


async def test_what_lies_before_damaged_wal_is_read_up_to_it(log):
    for number in range(3):
        await log.client.post(URL, content=pack_records([b"record %d" % number]), headers=FRAMED)
    await log.kill9()
    path = next((log.data_dir / "wal").rglob("*.wal"))
    data = bytearray(path.read_bytes())
    data[data.index(b"record 1")] ^= 1
    path.write_bytes(data)
    await log.start()
    known = await log.client.get(URL)
    assert known.content == pack_records([b"record 0"])
    assert (known.headers["Bop-Last-Lsn"], known.headers["Bop-Next-Lsn"]) == ("1", "2")
    assert_problem(await log.client.get(f"{URL}?from_lsn=2"), 500, "corrupt_wal")


async def test_a_manifest_older_than_the_wal_takes_nothing_from_it(log):
    """A backup was put back, and records were acknowledged after it was made (I1, I14)."""
    await log.client.post(URL, content=pack_records([b"published"]), headers=FRAMED)
    job = (await log.client.post("/checkpoints", json={"tenant": "acme", "database": "log"})).json()
    assert (await log.client.get(f"/jobs/{job['id']}?wait=30")).json()["state"] == "completed"
    backup = (await log.client.post("/admin/manifest/backup")).json()["path"]
    for _ in range(2):
        await log.client.post(URL, content=pack_records([b"later"]), headers=FRAMED)
    await log.terminate()
    shutil.rmtree(log.data_dir / "manifest")
    shutil.copytree(backup, log.data_dir / "manifest")
    [path] = (log.data_dir / "wal").rglob("*.wal")
    data = path.read_bytes()
    report = await fsck(Settings(data_dir=log.data_dir))
    assert [(one.invariant, "older" in one.detail) for one in report.findings] == [("I1", True)]
    await log.start()
    assert (await log.client.get(LOG)).json()["health"]["state"] == "corrupt_wal"
    refused = await log.client.post(URL, content=pack_records([b"x"]), headers=FRAMED)
    assert_problem(refused, 500, "corrupt_wal")
    read = await log.client.get(
        f"{LOG}/records?from_lsn=1", headers={"Accept": FRAMED["Content-Type"]}
    )
    assert read.content == pack_records([b"published"])
    assert path.read_bytes() == data


async def test_a_single_append_that_the_manifest_does_not_know_is_taken_over(log):
    """As above; but nothing in the file says that it was acknowledged."""
    await log.client.post(URL, content=pack_records([b"published"]), headers=FRAMED)
    job = (await log.client.post("/checkpoints", json={"tenant": "acme", "database": "log"})).json()
    assert (await log.client.get(f"/jobs/{job['id']}?wait=30")).json()["state"] == "completed"
    backup = (await log.client.post("/admin/manifest/backup")).json()["path"]
    later = await log.client.post(URL, content=pack_records([b"later"]), headers=FRAMED)
    await log.terminate()
    shutil.rmtree(log.data_dir / "manifest")
    shutil.copytree(backup, log.data_dir / "manifest")
    assert (await fsck(Settings(data_dir=log.data_dir))).findings == ()
    for records in ([b"published", b"later"], [b"published", b"later", b"more"]):
        await log.start()
        database = (await log.client.get(LOG)).json()
        assert database["health"]["state"] == "ok"
        assert database["next_lsn"] == later.json()["last_lsn"] + len(records) - 1
        read = await log.client.get(
            f"{LOG}/records?from_lsn=1", headers={"Accept": FRAMED["Content-Type"]}
        )
        assert read.content == pack_records(records)
        await log.client.post(URL, content=pack_records([b"more"]), headers=FRAMED)
        await log.terminate()
    assert (await fsck(Settings(data_dir=log.data_dir))).findings == ()


async def test_lost_wal_is_told_and_its_lsns_are_never_given_out_again(log):
    for _ in range(3):
        await log.client.post(URL, content=pack_records([b"lost"]), headers=FRAMED)
    await log.terminate()
    for path in (log.data_dir / "wal").rglob("*.wal"):
        path.unlink()
    await log.start()
    database = (await log.client.get(LOG)).json()
    assert database["health"] == {"state": "wal_lost", "lost_from_lsn": 1}
    assert database["next_lsn"] > 3
    refused = await log.client.post(URL, content=pack_records([b"x"]), headers=FRAMED)
    assert_problem(refused, 409, "wal_lost")
    accepted = await log.client.post(f"{LOG}/acknowledge-loss")
    assert accepted.json()["health"]["state"] == "ok"
    told = await log.client.post(URL, content=pack_records([b"x"]), headers=FRAMED)
    assert told.json()["first_lsn"] >= database["next_lsn"]
    await log.restart()
    assert (await log.client.get(LOG)).json()["health"]["state"] == "ok"


async def test_a_second_service_on_the_directory_does_not_start(
    log: ServerProcess, make_server: MakeServer
):
    second = make_server("other", settings={"BOP_DATA_DIR": str(log.data_dir)})
    await second.start(wait="launched")
    assert await second.wait_exit() != 0
    assert "data directory" in second.log_tail()
    assert (await log.client.get("/readyz")).status_code == 200


async def test_a_second_service_on_the_prefix_does_not_start(make_server: MakeServer, tmp_path):
    remote = {"BOP_REMOTE_URL": f"file://{tmp_path / 'shared'}"}
    first, second = make_server("one", settings=remote), make_server("two", settings=remote)
    await first.start()
    await second.start(wait="launched")
    assert await second.wait_exit() != 0
    assert "--take-over" in second.log_tail()

    await first.client.put(LOG, json={"engine": "append_only"})
    await first.client.post(URL, content=pack_records([b"x"]), headers=FRAMED)
    await second.start(arguments=("serve", "--take-over"))
    body = {"tenant": "acme", "database": "log"}
    await first.client.post("/checkpoints", json=body)
    assert await first.wait_exit() == 1  # it met the higher epoch before it published
    assert not list((tmp_path / "shared").rglob("generations/**/*.zst"))


async def test_an_empty_directory_does_not_begin_a_second_history(
    make_server: MakeServer, tmp_path
):
    remote = {"BOP_REMOTE_URL": f"file://{tmp_path / 'shared'}"}
    first, second = make_server("one", settings=remote), make_server("two", settings=remote)
    await first.start()
    await first.client.put(LOG, json={"engine": "append_only"})
    await first.client.post(URL, content=pack_records([b"x"]), headers=FRAMED)
    job = (
        await first.client.post("/checkpoints", json={"tenant": "acme", "database": "log"})
    ).json()
    await first.client.get(f"/checkpoints/{job['id']}?wait=30")
    await first.terminate()
    await second.start(wait="launched")
    assert await second.wait_exit() != 0
    assert "bop-checkpoint recover" in second.log_tail()


async def test_appends_are_taken_while_s3_is_down(make_server: MakeServer, seaweed):
    with socket.socket() as nobody:  # bound, never listening: connections are refused
        nobody.bind(("127.0.0.1", 0))
        server = make_server(
            settings={
                "BOP_REMOTE_URL": f"s3://{seaweed.bucket()}/down",
                "BOP_S3_ENDPOINT_URL": f"http://127.0.0.1:{nobody.getsockname()[1]}",
                "BOP_S3_REGION": seaweed.region,
                "BOP_REMOTE_ATTEMPTS": "2",
                **seaweed.environment(),
            }
        )
        await server.start(wait="alive")
        ready = await server.client.get("/readyz")
        assert ready.status_code == 503
        assert "remote" in json.dumps(ready.json()["reasons"])
        await server.client.put(LOG, json={"engine": "append_only"})
        told = await server.client.post(URL, content=pack_records([b"x"]), headers=FRAMED)
        assert told.status_code == 201
        job = (
            await server.client.post("/checkpoints", json={"tenant": "acme", "database": "log"})
        ).json()
        assert job["state"] == "pending"
        await server.terminate()
    server.settings["BOP_S3_ENDPOINT_URL"] = seaweed.endpoint
    await server.start()
    done = (await server.client.get(f"/checkpoints/{job['id']}?wait=30")).json()
    assert done["state"] == "completed"


async def test_one_tenants_slow_body_holds_up_nobody(log: ServerProcess):
    _, writer = await asyncio.open_connection("127.0.0.1", log.port)
    writer.write(
        b"POST " + URL.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Type: " + RECORDS.encode()
        + b"\r\nContent-Length: 5000\r\n\r\nxx"
    )  # fmt: skip
    await writer.drain()

    async def appended() -> bool:
        answer = await log.client.post(URL, content=pack_records([b"x"]), headers=FRAMED)
        return answer.status_code == 201

    await wait_until(appended, timeout=5)
    writer.close()
    await writer.wait_closed()
