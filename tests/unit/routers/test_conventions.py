"""What holds for every request: problems, ids, traces, paging, and the edge itself."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.base.clock import SeededRandomness
from app.core.base.errors import ErrorKind, InvalidRequest, InvariantViolation
from app.routers.exchange import joined_trace
from app.routers.headers import negotiated
from app.routers.paging import decode_cursor, encode_cursor
from app.routers.problems import STATUS
from tests.unit.routers.asgi import RawExchange
from tests.unit.routers.conftest import Running

DATABASES = "/tenants/acme/databases"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def test_every_kind_of_error_has_a_status():
    assert set(STATUS) == set(ErrorKind)


async def test_a_problem_has_its_members(client):
    answer = await client.get(f"{DATABASES}/nothing", headers={"X-Request-ID": "abc"})
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem.pop("detail")
    assert problem == {
        "type": "urn:bop:problem:database_not_found",
        "title": "No such database",
        "status": 404,
        "code": "database_not_found",
        "request_id": "abc",
    }


async def test_unknown_path(client):
    answer = await client.get("/nothing")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert (await client.get(f"{DATABASES}/")).status_code == 404  # never a redirect


async def test_wrong_method_names_all_that_the_path_takes(client):
    answer = await client.patch(f"{DATABASES}/events/records")
    assert (answer.status_code, answer.json()["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "GET, HEAD, POST"
    assert (await client.delete("/checkpoints")).headers["allow"] == "GET, POST"


async def test_validation_errors_say_where(client):
    answer = await client.put(f"{DATABASES}/x", json={"engine": "other", "colour": 1})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    errors = {tuple(one["loc"]): one for one in answer.json()["errors"]}
    assert set(errors) == {("body", "engine"), ("body", "colour")}
    assert all(set(one) == {"loc", "msg", "type"} for one in errors.values())
    detail = answer.json()["detail"]
    assert "body.engine: Input should be 'append_only' or 'libsql'" in detail
    assert "body.colour: Extra inputs are not permitted" in detail


async def test_the_detail_says_what_is_wrong_in_plain_words(client):
    answer = await client.put(f"{DATABASES}/x", json={"engine": "libsql", "page_size": 4097})
    assert answer.json()["detail"] == (
        "The request is not valid. body: page_size must be a power of two."
    )
    many = {"engine": "libsql", "a": 1, "b": 1, "c": 1, "d": 1}
    answer = await client.put(f"{DATABASES}/x", json=many)
    assert answer.json()["detail"].endswith("; 1 more.")
    assert len(answer.json()["errors"]) == 4


async def test_every_refusal_as_invalid_says_what_is_wrong(running: Running):
    running.service.failing["databases.create"] = InvalidRequest("Not so.", colour="red")
    answer = await running.client.put(f"{DATABASES}/x", json={"engine": "append_only"})
    assert answer.json()["errors"] == [{"loc": [], "msg": "Not so.", "type": "value_error"}]
    assert answer.json()["colour"] == "red"


@pytest.mark.parametrize(
    "body", [b"{", b"", b"[]", b"nul", b"\xff", b"[" * 100_000, b'{"tenant": %s}' % (b"9" * 5000)]
)
async def test_broken_json(client, body):
    answer = await client.post(
        "/checkpoints", content=body, headers={"Content-Type": "application/json"}
    )
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert answer.json()["errors"][0]["loc"][0] == "body"


async def test_json_needs_no_content_type_but_no_other_one(client):
    body = json.dumps({"tenant": "acme", "database": "events"}).encode()
    assert (await client.post("/checkpoints", content=body)).status_code == 202
    answer = await client.post("/checkpoints", content=body, headers={"Content-Type": "text/csv"})
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    "path",
    [
        f"{DATABASES}/events/acknowledge-loss", "/jobs/x/cancel", "/checkpoints/x/cancel",
        "/admin/queue/drain", "/admin/queue/resume", "/admin/manifest/backup",
        "/admin/approvals/x/approve", "/admin/approvals/x/reject", "/admin/gc/run",
        "/admin/janitor/run",
    ],
)  # fmt: skip
async def test_where_a_body_may_be_left_out_unknown_fields_are_refused_too(client, path):
    refused = await client.post(path, json={"colour": 1})
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")
    assert {one["type"] for one in refused.json()["errors"]} == {"extra_forbidden"}
    form = {"Content-Type": "application/x-www-form-urlencoded"}  # as `curl -d ''` has it
    statuses = [
        (await client.post(path)).status_code,
        (await client.post(path, json={})).status_code,
        (await client.post(path, content=b"", headers=form)).status_code,
    ]
    assert len(set(statuses)) == 1
    assert statuses[0] not in {415, 422}


async def test_an_unhandled_error_is_a_problem_without_its_inside(running: Running):
    running.service.failing["databases.create"] = RuntimeError("secret inside")
    answer = await running.client.put(f"{DATABASES}/x", json={"engine": "append_only"})
    assert (answer.status_code, answer.json()["code"]) == (500, "internal")
    assert answer.headers["content-type"] == "application/problem+json"
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    (failed,) = [fields for name, _, fields in running.logged if name == "http.failed"]
    assert "secret inside" in failed["error"]


async def test_a_broken_invariant_is_told_without_its_inside(running: Running):
    running.service.failing["databases.create"] = InvariantViolation("inner secret", row="secret")
    answer = await running.client.put(f"{DATABASES}/x", json={"engine": "append_only"})
    assert (answer.status_code, answer.json()["code"]) == (500, "internal")
    assert "secret" not in answer.text
    answered = [fields for name, _, fields in running.logged if name == "http.answered"]
    assert "inner secret" in answered[-1]["error"]


@pytest.mark.parametrize("given_id", ["abc-1", "A" * 128, "0.1~2:3/4=5@6+7_8"])
async def test_request_ids_are_echoed_and_logged(running: Running, given_id):
    path = f"{DATABASES}/events/records"
    headers = {"X-Request-ID": given_id, "Content-Type": "application/octet-stream"}
    answer = await running.client.post(path, content=b"x", headers=headers)
    assert answer.headers["x-request-id"] == given_id
    assert [name for name, _, _ in running.logged] == ["http.answered"]


@pytest.mark.parametrize("given_id", ["", "a b", "A" * 129, "é", 'x"y', "<x>"])
async def test_unsafe_request_ids_are_replaced(client, given_id):
    answer = await client.get("/jobs", headers={"X-Request-ID": given_id.encode()})
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


async def test_nameless_small_appends_are_not_logged_but_refused_ones_are(running: Running):
    path, headers = f"{DATABASES}/events/records", {"Content-Type": "application/octet-stream"}
    assert (await running.client.post(path, content=b"x", headers=headers)).status_code == 201
    assert running.logged == []
    await running.client.post(path, content=b"x", headers={**headers, "If-Match": '"9"'})
    assert [(name, fields["status"]) for name, _, fields in running.logged] == [
        ("http.answered", 412)
    ]


async def test_probes_are_logged_only_when_they_fail(running: Running):
    for path in ("/healthz", "/readyz", "/metrics"):
        assert (await running.client.get(path)).status_code == 200
    assert running.logged == []
    running.service.begin_shutdown()
    await running.client.get("/readyz")
    assert [name for name, _, _ in running.logged] == ["http.answered"]


async def test_traceparent_is_joined(client):
    parent = f"00-{TRACE}-00f067aa0ba902b7-01"
    answer = await client.get("/jobs", headers={"traceparent": parent})
    version, trace, span, flags = answer.headers["traceparent"].split("-")
    assert (version, trace, flags) == ("00", TRACE, "01")
    assert span != "00f067aa0ba902b7"
    assert "traceparent" not in (await client.get("/jobs")).headers


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"00",
        f"00-{'0' * 32}-00f067aa0ba902b7-01".encode(),
        f"00-{TRACE}-{'0' * 16}-01".encode(),
        f"ff-{TRACE}-00f067aa0ba902b7-01".encode(),
        f"00-{TRACE}-00f067aa0ba902b7-01-more".encode(),
        f"00-{TRACE.upper()}-00f067aa0ba902b7-01".encode(),
    ],
)
def test_invalid_traceparents_are_ignored(header):
    assert joined_trace(header, SeededRandomness(1)) is None


def test_a_traceparent_of_a_later_version_is_read_as_far_as_known():
    header = f"01-{TRACE}-00f067aa0ba902b7-01-more".encode()
    joined = joined_trace(header, SeededRandomness(1))
    assert joined is not None
    assert joined.trace_id == TRACE


# --- lists


async def test_pages_follow_each_other(client, service):
    for number in range(7):
        service.add_database("acme", f"db{number}")
    names, path, pages = [], f"{DATABASES}?limit=3", 0
    while path:
        answer = await client.get(path)
        page = answer.json()
        names += [item["database"] for item in page["items"]]
        pages += 1
        link = answer.headers.get("link")
        assert (link is None) == (page["next_cursor"] is None)
        path = re.fullmatch(r'<(.+)>; rel="next"', link).group(1) if link else None
        if path:
            assert "limit=3" in path
            assert page["next_cursor"] in path
    assert names == [*(f"db{number}" for number in range(7)), "events"]
    assert pages == 3


async def test_a_full_last_page_has_no_next(client, service):
    service.add_database("acme", "more")
    page = (await client.get(f"{DATABASES}?limit=2")).json()
    assert list(page) == ["items", "next_cursor"]
    assert page["next_cursor"] is None


@pytest.mark.parametrize("limit", ["0", "1001", "x", "-1"])
async def test_limits_of_lists(client, limit):
    answer = await client.get(f"{DATABASES}?limit={limit}")
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["loc"] == ["query", "limit"]


@pytest.mark.parametrize(
    "cursor",
    [
        "x", "!!", "NQ", "eyJhIjoxfQ",
        *(encode_cursor(key, path=DATABASES) for key in (5, ["a"], -1)),
        encode_cursor("a", path="/tenants/other/databases"), encode_cursor("a", path="/jobs"),
        "a" * 513,
    ],
)  # fmt: skip
async def test_foreign_cursors_are_refused(client, cursor):
    answer = await client.get(DATABASES, params={"cursor": cursor})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


@given(st.one_of(st.text(), st.integers(0, 2**63 - 1)))
def test_cursors_come_back(key):
    cursor = encode_cursor(key, path="/list")
    assert re.fullmatch("[A-Za-z0-9_-]*", cursor)
    assert decode_cursor(cursor, type(key), path="/list") == key
    with pytest.raises(InvalidRequest):
        decode_cursor(cursor, type(key), path="/other")


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        (None, "a/b"),
        ("", "a/b"),
        ("*/*", "a/b"),
        ("c/d", "c/d"),
        ("C/D", "c/d"),
        ("a/*;q=0.5, c/d", "c/d"),
        ("a/b;q=0, */*", "c/d"),
        ("text/html, */*;q=0.1", "a/b"),
        ("c/*, a/b;q=0.9", "c/d"),
        ("c/d;q=nonsense", "c/d"),
    ],
)
def test_negotiation(accept, chosen):
    assert negotiated(accept, ("a/b", "c/d")) == chosen


# --- the edge


async def test_a_client_that_leaves_a_long_poll_frees_it(running: Running):
    job = running.service.add_job()
    raw = RawExchange("GET", f"/jobs/{job.job_id}", query="wait=60").body(b"")
    raw.leave()
    await raw.run(running.app)
    assert raw.sent == []
    assert running.service.waiting == 0
    (line,) = [fields for name, _, fields in running.logged if name == "http.answered"]
    assert line["status"] is None


async def test_not_ready_before_the_service_is_open(running: Running):
    running.desk.close()
    assert (await running.client.get("/readyz")).json()["status"] == "starting"
    answer = await running.client.get("/jobs")
    assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
    assert answer.headers["retry-after"] == "1"


@pytest.mark.parametrize("key", [-1, 2**63, 2**70])
def test_no_key_is_so_large_or_below_zero(key):
    with pytest.raises(InvalidRequest):
        decode_cursor(encode_cursor(key, path=""), int, path="")
    with pytest.raises(InvalidRequest):
        decode_cursor(encode_cursor([1, key], path=""), tuple[int, int], path="")
