"""GET and HEAD of images and pages: states, ranges, preconditions, broken streams."""

from datetime import datetime

import pytest
from starlette.requests import Request

from app.core.base.errors import CorruptBlob, InvalidRequest, RemoteUnavailable
from app.core.services.pages import FoundPage
from app.core.services.states import AtGeneration, AtSnapshot, AtTime, Newest
from app.routers.exchange import ResponseBroken
from app.routers.selectors import selector_of
from tests.unit.routers.conftest import Running

APP = "/tenants/acme/databases/app"
IMAGE = f"{APP}/image"
PAGE = 4096
SIZE = 5 * PAGE


def content(seed, size=SIZE):
    return bytes((seed + at // 7) % 251 for at in range(size))


@pytest.fixture
def older(running: Running):
    running.service.add_database("acme", "app", engine="libsql")
    return running.service.add_image("acme", "app", content(1), generation=1)


@pytest.fixture
def newest(running: Running, older):
    return running.service.add_image("acme", "app", content(2), generation=2)


@pytest.fixture(autouse=True)
def everything_is_released(running: Running):
    yield
    assert running.service.open_streams == running.service.closed_streams


async def test_the_newest_image(client, newest):
    answer = await client.get(IMAGE)
    assert answer.status_code == 200
    assert answer.content == newest.data
    told = answer.headers
    assert (told["bop-generation"], told["bop-lsn"], told["etag"]) == ("2", "20", '"7-20"')
    assert told["content-length"] == str(SIZE)
    assert told["accept-ranges"] == "bytes"
    assert told["content-type"] == "application/vnd.sqlite3"


async def test_head_tells_the_same_and_sends_nothing(client, newest):
    got, looked = await client.get(IMAGE), await client.head(IMAGE)
    assert looked.status_code == 200
    assert looked.content == b""
    for name in ("content-length", "etag", "bop-generation", "bop-lsn", "accept-ranges"):
        assert looked.headers[name] == got.headers[name]
    ranged = await client.head(IMAGE, headers={"Range": "bytes=0-9"})
    assert (ranged.status_code, ranged.headers["content-length"]) == (200, str(SIZE))


@pytest.mark.parametrize(
    ("query", "generation"),
    [
        ("generation=1", 1),
        ("at=1970-01-01T00:00:01.500000Z", 1),
        ("at=1970-01-01T01:00:02%2B01:00", 2),
        ("at=1970-01-01T01:00:02+01:00", 2),
    ],
)
async def test_states(client, newest, query, generation):
    answer = await client.get(f"{IMAGE}?{query}")
    assert answer.status_code == 200, answer.text
    assert answer.headers["bop-generation"] == str(generation)
    assert answer.content == content(generation)


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ("generation=3", 410, "generation_expired"),
        ("snapshot=monday", 404, "snapshot_not_found"),
        ("generation=0", 422, "invalid_request"),
        ("generation=x", 422, "invalid_request"),
        ("generation=1&generation=1", 422, "invalid_request"),
        ("generation=1&snapshot=monday", 422, "invalid_request"),
        ("snapshot=NOT", 422, "invalid_request"),
        ("at=yesterday", 422, "invalid_request"),
        ("at=2026-11-23T21:05:00", 422, "invalid_request"),
        ("at=2026-13-23T21:05:00Z", 422, "invalid_request"),
    ],
)
async def test_states_that_are_not(client, newest, query, status, code):
    answer = await client.get(f"{IMAGE}?{query}")
    assert (answer.status_code, answer.json()["code"]) == (status, code)


async def test_a_range(client, newest):
    answer = await client.get(IMAGE, headers={"Range": "bytes=100-10099"})
    assert answer.status_code == 206
    assert answer.content == newest.data[100:10_100]
    assert answer.headers["content-range"] == f"bytes 100-10099/{SIZE}"
    assert answer.headers["content-length"] == "10000"
    assert answer.headers["etag"] == '"7-20"'


async def test_a_range_beyond_the_end(client, newest):
    answer = await client.get(IMAGE, headers={"Range": f"bytes={SIZE}-"})
    assert (answer.status_code, answer.json()["code"]) == (416, "range_not_satisfiable")
    assert answer.headers["content-range"] == f"bytes */{SIZE}"


async def test_readers_of_ranges_are_held_to_one_state(client, older, running):
    tag = (await client.head(IMAGE)).headers["etag"]
    ranged = {"Range": "bytes=0-9"}
    for held in ("If-Range", "If-Match"):
        answer = await client.get(IMAGE, headers={**ranged, held: tag})
        assert (answer.status_code, answer.content) == (206, older.data[:10])
    newest = running.service.add_image("acme", "app", content(2), generation=2)
    answer = await client.get(IMAGE, headers={**ranged, "If-Range": tag})
    assert (answer.status_code, answer.content) == (200, newest.data)
    answer = await client.get(IMAGE, headers={**ranged, "If-Match": tag})
    assert (answer.status_code, answer.json()["code"]) == (412, "precondition_failed")
    answer = await client.head(IMAGE, headers={"If-Match": tag})
    assert answer.status_code == 412


async def test_a_copy_that_is_still_right_is_not_sent_again(client, newest):
    answer = await client.get(IMAGE, headers={"If-None-Match": '"7-20"'})
    assert (answer.status_code, answer.content) == (304, b"")
    assert answer.headers["etag"] == '"7-20"'
    assert (await client.get(IMAGE, headers={"If-None-Match": '"7-10"'})).status_code == 200


async def test_an_empty_database_is_an_empty_file(client, running, older):
    running.service.add_image("acme", "app", b"", generation=3)
    answer = await client.get(IMAGE)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-length"] == "0"
    answer = await client.get(IMAGE, headers={"Range": "bytes=0-"})
    assert answer.status_code == 416


async def test_damage_in_the_first_piece_is_an_error(client, newest):
    newest.failing_at, newest.failure = 0, CorruptBlob("It is damaged.", key="chunk-0")
    answer = await client.get(IMAGE)
    assert (answer.status_code, answer.json()["code"]) == (500, "corrupt_blob")
    assert answer.json()["key"] == "chunk-0"
    newest.failure = RemoteUnavailable()
    answer = await client.get(IMAGE)
    assert (answer.status_code, answer.json()["code"]) == (503, "remote_unavailable")


async def test_damage_further_on_breaks_the_stream(client, newest):
    newest.failing_at, newest.failure = 10_000, CorruptBlob("It is damaged.")
    with pytest.raises(ResponseBroken):  # the server ends the connection
        await client.get(IMAGE)


async def test_records_have_no_image_and_no_pages(client):
    for path in ("image", "pages/1"):
        answer = await client.get(f"/tenants/acme/databases/events/{path}")
        assert (answer.status_code, answer.json()["code"]) == (409, "wrong_engine")


# --- pages


async def test_a_page(client, newest):
    answer = await client.get(f"{APP}/pages/2")
    assert answer.status_code == 200
    assert answer.content == newest.data[PAGE : 2 * PAGE]
    told = answer.headers
    assert (told["bop-tier"], told["bop-generation"], told["bop-lsn"]) == ("local", "2", "20")
    assert told["content-type"] == "application/octet-stream"
    assert told["content-length"] == str(PAGE)
    older = await client.get(f"{APP}/pages/2?generation=1")
    assert older.content == content(1)[PAGE : 2 * PAGE]
    assert older.headers["etag"] != told["etag"]


async def test_a_page_in_memory_is_given_without_a_read(client, service, newest):
    page = FoundPage(data=b"p" * PAGE, tier="page_cache", generation=2, lsn=20)
    service.services.pages.in_memory = page
    answer = await client.get(f"{APP}/pages/2")
    assert (answer.status_code, answer.content) == (200, page.data)
    assert answer.headers["bop-tier"] == "page_cache"
    assert answer.headers["etag"] == f'"{page.tag}"'
    ranged = await client.get(f"{APP}/pages/2", headers={"Range": "bytes=1-2"})
    assert (ranged.status_code, ranged.content) == (206, b"pp")
    assert ranged.headers["content-range"] == f"bytes 1-2/{PAGE}"
    older = await client.get(f"{APP}/pages/2?generation=1")  # memory knows only the newest
    assert older.headers["bop-tier"] == "local"
    metrics = (await client.get("/metrics")).text.splitlines()
    assert 'page_fetch_latency_seconds_count{tier="page_cache"} 2.0' in metrics
    assert f'read_bytes_served_total{{tier="page_cache"}} {float(2 * PAGE)}' in metrics


async def test_a_page_is_named_by_its_content(client, newest):
    tag = (await client.get(f"{APP}/pages/2")).headers["etag"]
    answer = await client.get(f"{APP}/pages/2", headers={"If-None-Match": tag})
    assert (answer.status_code, answer.content) == (304, b"")
    answer = await client.get(f"{APP}/pages/3", headers={"If-None-Match": tag})
    assert answer.status_code == 200
    answer = await client.get(f"{APP}/pages/3", headers={"If-Match": tag})
    assert answer.status_code == 412
    answer = await client.get(f"{APP}/pages/2", headers={"Range": "bytes=0-99"})
    assert (answer.status_code, answer.content) == (206, newest.data[PAGE : PAGE + 100])
    looked = await client.head(f"{APP}/pages/2")
    assert (looked.headers["etag"], looked.headers["content-length"]) == (tag, str(PAGE))


@pytest.mark.parametrize(
    ("page_no", "status", "code"),
    [
        ("6", 404, "page_not_found"),
        ("4294967294", 404, "page_not_found"),
        ("0", 422, "invalid_request"),
        ("-1", 422, "invalid_request"),
        ("4294967295", 404, "page_not_found"),
        ("99999999999999999", 404, "page_not_found"),
        ("99999999999999999999999", 422, "invalid_request"),
        ("x", 422, "invalid_request"),
        ("1.0", 422, "invalid_request"),
        ("\u0661", 422, "invalid_request"),
    ],
)
async def test_pages_that_are_not(client, newest, page_no, status, code):
    answer = await client.get(f"{APP}/pages/{page_no}")
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    if status == 422:
        assert answer.json()["errors"][0]["loc"] == ["path", "page_no"]


# --- selectors


def asked(query):
    return Request({"type": "http", "query_string": query.encode(), "headers": []})


def test_selectors():
    assert selector_of(asked(""), takes_time=True) == Newest()
    assert selector_of(asked("other=1"), takes_time=True) == Newest()
    assert selector_of(asked("generation=12"), takes_time=True) == AtGeneration(12)
    assert selector_of(asked("snapshot=a.b"), takes_time=False) == AtSnapshot("a.b")


@pytest.mark.parametrize("query", ["at=2026-11-23T21:05:00Z", "at=x", "generation=1&at=x"])
def test_a_time_is_never_passed_over_where_none_is_taken(query):
    with pytest.raises(InvalidRequest):
        selector_of(asked(query), takes_time=False)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("2026-11-23T21:05:00Z", "2026-11-23T21:05:00+00:00"),
        ("2026-11-23t21:05:00.5z", "2026-11-23T21:05:00.500000+00:00"),
        ("2026-11-23 21:05:00.123456789Z", "2026-11-23T21:05:00.123456+00:00"),
        ("2026-11-23T21:05:00-02:30", "2026-11-23T23:35:00+00:00"),
        ("1969-12-31T23:59:59Z", "1969-12-31T23:59:59+00:00"),
    ],
)
def test_times(text, same):
    found = selector_of(asked(f"at={text}"), takes_time=True)
    moment = datetime.fromisoformat(same)
    assert found == AtTime(int(moment.timestamp()) * 1_000_000 + moment.microsecond)


@pytest.mark.parametrize(
    "text", ["", "0", "20261123T210500Z", "2026-11-23", "2026-W01-1T00:00:00Z"]
)
def test_no_times(text):
    with pytest.raises(InvalidRequest):
        selector_of(asked(f"at={text}"), takes_time=True)
