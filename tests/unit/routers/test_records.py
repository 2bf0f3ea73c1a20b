import asyncio
import struct

import pytest

from app.core.base.errors import (
    Backpressure,
    CorruptWal,
    DiskFull,
    QuotaExhausted,
    RemoteUnavailable,
    WalLost,
)
from app.core.formats.record_framing import pack_records, unpack_records
from tests.helpers.wait import wait_until
from tests.unit.routers.conftest import Running

PATH = "/tenants/acme/databases/events/records"
OCTETS = {"Content-Type": "application/octet-stream"}
LINES = {"Content-Type": "application/x-ndjson"}
FRAMED = {"Content-Type": "application/vnd.bop.records"}


async def post(client, content, headers=OCTETS, **extra):
    return await client.post(PATH, content=content, headers={**headers, **extra})


async def test_one_record_is_appended_and_its_own_bytes_are_counted(client, service):
    answer = await post(client, b"hello")
    assert answer.status_code == 201
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {"first_lsn": 1, "last_lsn": 1, "count": 1, "bytes": 5}
    assert service.record_contents() == [b"hello"]


@pytest.mark.parametrize(
    ("body", "records"),
    [
        (b"a\nb\n", [b"a", b"b"]),
        (b"a\nb", [b"a", b"b"]),
        (b"a\n\nb\n", [b"a", b"", b"b"]),
        (b"a\r\nb", [b"a\r", b"b"]),
        (b"\n", [b""]),
    ],
)
async def test_lines(client, service, body, records):
    answer = await post(client, body, LINES)
    assert answer.json()["count"] == len(records)
    assert service.record_contents() == records


async def test_framed_records_in_one_request_get_consecutive_lsns(client, service):
    records = [b"", b"one", b"with\nnewline"]
    answer = await post(client, pack_records(records), FRAMED)
    assert answer.json() == {"first_lsn": 1, "last_lsn": 3, "count": 3, "bytes": 15}
    assert service.record_contents() == records


async def test_media_type_parameters_and_case_do_not_matter(client):
    answer = await post(client, b"a\n", {"Content-Type": "Application/X-NDJSON; charset=utf-8"})
    assert answer.status_code == 201


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"", LINES),
        (b"", FRAMED),
        (b"\x05\x00\x00\x00hel", FRAMED),
        (b"\x05\x00", FRAMED),
    ],
)
async def test_malformed_bodies_store_nothing(client, service, body, headers):
    answer = await post(client, body, headers)
    assert answer.status_code == 400
    assert answer.json()["code"] == "malformed_records"
    assert service.record_contents() == []


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/json"])
async def test_other_media_types_are_refused(client, service, content_type):
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = await client.post(PATH, content=b"x", headers=headers)
    assert answer.status_code == 415
    assert answer.json()["code"] == "unsupported_media_type"
    assert "application/x-ndjson" in answer.json()["supported"]
    assert service.record_contents() == []


async def test_record_too_large(client, service):
    service.record_bytes_max = 8
    answer = await post(client, b"123456789")
    assert answer.status_code == 413
    assert answer.json()["code"] == "record_too_large"
    assert answer.json()["max_record_bytes"] == 8
    answer = await post(client, struct.pack("<I", 9) + b"123456789", FRAMED)
    assert answer.json()["code"] == "record_too_large"


async def test_if_match(client):
    assert (await post(client, b"a", **{"If-Match": '"1"'})).status_code == 201
    answer = await post(client, b"b", **{"If-Match": '"1"'})
    assert answer.status_code == 412
    assert answer.json()["code"] == "lsn_mismatch"
    assert answer.json()["next_lsn"] == 2


@pytest.mark.parametrize("value", ["1", '"x"', "*", 'W/"1"', '"1", "2"', '""', '"-1"', '"\uff11"'])
async def test_unreadable_if_match_is_refused(client, service, value):
    answer = await post(client, b"b", **{"If-Match": value.encode()})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["loc"] == ["header", "If-Match"]
    assert service.record_contents() == []


async def test_idempotency_key_appends_once_and_is_bound_to_its_body(client, service):
    key = {"Idempotency-Key": "k1"}
    first = await post(client, b"a", **key)
    again = await post(client, b"a", **key)
    other = await post(client, b"b", **key)
    assert again.status_code == 201
    assert again.json() == first.json()
    assert other.status_code == 422
    assert other.json()["code"] == "idempotency_key_reused"
    assert service.record_contents() == [b"a"]


async def test_idempotency_key_belongs_to_its_database(client, service):
    service.add_database("acme", "other")
    key = {"Idempotency-Key": "k1", **OCTETS}
    await client.post(PATH, content=b"a", headers=key)
    await client.post("/tenants/acme/databases/other/records", content=b"a", headers=key)
    (mine,) = service.stored["acme", "events"].keys
    (others,) = service.stored["acme", "other"].keys
    assert mine != others


async def test_without_a_key_nothing_is_hashed(client, service, monkeypatch):
    seen = []
    append = service.services.records.append

    async def spying(*args, **kwargs):
        seen.append((kwargs["key_hash"], kwargs["body_hash"]))
        return await append(*args, **kwargs)

    monkeypatch.setattr(service.services.records, "append", spying)
    await post(client, b"a")
    await post(client, b"a", **{"Idempotency-Key": "k"})
    assert seen[0] == (None, None)
    assert [len(one) for one in seen[1]] == [16, 16]


@pytest.mark.parametrize("key", [b"", b"a b", b"a\x7f", "é".encode(), b"k" * 256])
async def test_unusable_idempotency_keys_are_refused(client, service, key):
    answer = await post(client, b"a", **{"Idempotency-Key": key})
    assert answer.status_code == 422
    assert service.record_contents() == []


async def test_names_in_the_path_are_checked(client):
    answer = await client.post("/tenants/AC/databases/events/records", content=b"a", headers=OCTETS)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["loc"] == ["path", "tenant"]


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (Backpressure(retry_after_seconds=7), 429, "backpressure", "7"),
        (Backpressure(), 429, "backpressure", "1"),
        (QuotaExhausted(), 507, "quota_exhausted", "1"),
        (DiskFull(), 507, "disk_full", "1"),
        (WalLost(lost_from_lsn=5), 409, "wal_lost", None),
        (CorruptWal(), 500, "corrupt_wal", None),
        (RemoteUnavailable(), 503, "remote_unavailable", "1"),
    ],
)
async def test_errors_of_the_service(client, service, error, status, code, retry_after):
    service.failing["records.append"] = error
    answer = await post(client, b"a")
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers.get("retry-after") == retry_after


async def test_wrong_engine_and_missing_database_answer_before_the_body_is_read(client, service):
    service.add_database("acme", "pages", "libsql")
    read = 0

    async def body():
        nonlocal read
        read += 1
        yield b"x"

    for name, code in (("pages", "wrong_engine"), ("nothing", "database_not_found")):
        answer = await client.post(
            f"/tenants/acme/databases/{name}/records", content=body(), headers=OCTETS
        )
        assert answer.json()["code"] == code
    service.failing["records.append"] = AssertionError("must not be reached")


# --- reading


async def fill(client, *records: bytes) -> None:
    await post(client, pack_records(records), FRAMED)


async def test_records_are_read_back(client, service):
    await fill(client, b"a", b"b\nb", b"c")
    answer = await client.get(PATH)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/vnd.bop.records"
    assert unpack_records(answer.content) == [b"a", b"b\nb", b"c"]
    assert answer.headers["bop-first-lsn"] == "1"
    assert answer.headers["bop-last-lsn"] == "3"
    assert answer.headers["bop-next-lsn"] == "4"
    assert service.closed_streams == service.open_streams == 1


@pytest.mark.parametrize(
    ("query", "records"),
    [
        ("from_lsn=2", [b"b", b"c"]),
        ("to_lsn=2", [b"a", b"b"]),
        ("from_lsn=2&to_lsn=2", [b"b"]),
        ("limit=1", [b"a"]),
        ("from_lsn=4", []),
        ("from_lsn=100", []),
    ],
)
async def test_ranges(client, query, records):
    await fill(client, b"a", b"b", b"c")
    answer = await client.get(f"{PATH}?{query}")
    assert unpack_records(answer.content) == records
    assert ("bop-first-lsn" in answer.headers) == bool(records)


async def test_lines_are_negotiated(client):
    await fill(client, b"a", b"b")
    answer = await client.get(PATH, headers={"Accept": "application/x-ndjson"})
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert answer.content == b"a\nb\n"


async def test_records_with_newlines_are_not_lines(client):
    await fill(client, b"a\nb")
    answer = await client.get(PATH, headers={"Accept": "application/x-ndjson"})
    assert answer.status_code == 406
    assert answer.json()["code"] == "not_line_records"


async def test_nothing_acceptable(client):
    answer = await client.get(PATH, headers={"Accept": "text/html"})
    assert answer.status_code == 406
    assert answer.json()["code"] == "not_acceptable"


@pytest.mark.parametrize("query", ["from_lsn=0", "from_lsn=x", "limit=0", "wait=61", "wait=nan"])
async def test_bad_queries(client, query):
    answer = await client.get(f"{PATH}?{query}")
    assert answer.status_code == 422
    assert answer.json()["code"] == "invalid_request"
    assert answer.json()["errors"][0]["loc"][0] == "query"


async def test_truncated_lsns_are_gone(client, service):
    service.stored["acme", "events"].first_lsn = 5
    answer = await client.get(f"{PATH}?from_lsn=4")
    assert answer.status_code == 410
    assert answer.json()["code"] == "lsn_truncated"
    assert (await client.get(PATH)).status_code == 200


async def test_head_gives_the_headers(client, service):
    await fill(client, b"a")
    answer = await client.head(PATH)
    assert answer.status_code == 200
    assert answer.headers["bop-last-lsn"] == "1"
    assert answer.content == b""
    assert service.closed_streams == 1


async def test_a_stream_that_fails_ends_the_connection_and_is_closed(running: Running):
    await fill(running.client, b"a", b"b", b"c")
    running.service.fail_stream_after = 1
    with pytest.raises(Exception, match="the disk went away"):
        await running.client.get(PATH)
    assert running.service.closed_streams == 1
    assert ("http.failed", "error") in [(name, level) for name, level, _ in running.logged]


async def test_waiting_ends_with_the_next_record(client, service):
    reading = asyncio.create_task(client.get(f"{PATH}?from_lsn=1&wait=60"))
    await wait_until(lambda: service.waiting)
    await fill(client, b"late")
    async with service.changed:
        service.changed.notify_all()
    assert unpack_records((await reading).content) == [b"late"]


async def test_waiting_ends_when_the_service_stops(running: Running):
    reading = asyncio.create_task(running.client.get(f"{PATH}?from_lsn=1&wait=60"))
    await wait_until(lambda: running.service.waiting)
    running.desk.begin_shutdown()
    answer = await reading
    assert answer.status_code == 503
    assert answer.json()["code"] == "not_ready"
    assert running.service.waiting == 0
