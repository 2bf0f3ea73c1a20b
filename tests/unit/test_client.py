import asyncio
import hashlib
import json
import struct
from urllib.parse import quote

import httpx
import pytest

from app.client import (
    BopClient,
    ProblemError,
    Record,
    RetryPolicy,
    ServiceUnreachable,
    StreamBroken,
    UnexpectedAnswer,
)
from app.client.jobs import event_data
from app.client.records import LINES, RecordDecoder
from app.core.base.clock import SeededRandomness
from tests.helpers.fake_api import FakeApi


class SteppingClock:
    """Sleeping takes no time, and is remembered."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    def wall_ns(self) -> int:
        return 1_760_000_000_000_000_000

    def monotonic(self) -> float:
        return sum(self.slept)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(0)


@pytest.fixture
def api() -> FakeApi:
    return FakeApi()


@pytest.fixture
def clock() -> SteppingClock:
    return SteppingClock()


@pytest.fixture
async def client(api, clock):
    async with BopClient(
        "http://bop.test",
        transport=api.transport(),
        clock=clock,
        randomness=SeededRandomness(7),
        retry=RetryPolicy(attempts_max=4),
    ) as client:
        yield client


async def test_create_says_whether_it_is_new(client, api):
    made, is_new = await client.databases.create("acme", "events", engine="append_only")
    assert (made.tenant, made.database, is_new) == ("acme", "events", True)
    assert json.loads(api.requests[-1].content) == {"engine": "append_only"}
    again, is_new = await client.databases.create("acme", "events", engine="append_only")
    assert (again, is_new) == (made, False)


async def test_problem_carries_code_status_and_extras(client, api):
    api.add_database("acme", "events", next_lsn=5)
    with pytest.raises(ProblemError) as caught:
        await client.records.append_one("acme", "events", b"x", expected_next_lsn=4)
    problem = caught.value
    assert (problem.code, problem.status, problem.title) == ("lsn_mismatch", 412, "lsn mismatch")
    assert problem.extras == {"next_lsn": 5, "request_id": "r1"}
    assert len(api.requests) == 1


async def test_answers_that_are_no_problem_and_no_json_are_told_as_such(clock):
    def proxy(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/readyz":
            return httpx.Response(200, text="<html>welcome</html>")
        return httpx.Response(502, text="<html>bad gateway</html>")

    async with BopClient(
        "http://bop.test", transport=httpx.MockTransport(proxy), clock=clock
    ) as client:
        with pytest.raises(ProblemError) as caught:
            await client.databases.get("acme", "events")
        assert (caught.value.code, caught.value.status) == ("unexpected_answer", 502)
        assert "bad gateway" in caught.value.detail
        with pytest.raises(UnexpectedAnswer, match="no such JSON"):
            await client.operations.readiness()


async def test_an_answer_that_cannot_be_decoded_is_no_traceback():
    def proxy(_request):
        stream = httpx.ByteStream(b"this is no gzip")
        return httpx.Response(200, headers={"Content-Encoding": "gzip"}, stream=stream)

    async with BopClient("http://bop.test", transport=httpx.MockTransport(proxy)) as client:
        with pytest.raises(UnexpectedAnswer, match="not in the coding"):
            await client.databases.get("acme", "events")


async def test_token_is_sent(api):
    api.token = "secret"
    async with BopClient("http://bop.test", "secret", transport=api.transport()) as client:
        assert [one async for one in client.databases.list("acme")] == []
    async with BopClient("http://bop.test", transport=api.transport()) as client:
        with pytest.raises(ProblemError, match="unauthenticated"):
            await client.databases.get("acme", "events")


async def test_lists_follow_their_cursors(client, api):
    for number in range(5):
        api.add_database("acme", f"d{number}")
    api.page_items = 2
    names = [one.database async for one in client.databases.list("acme")]
    assert names == ["d0", "d1", "d2", "d3", "d4"]
    assert len(api.requests) == 3
    assert [one.database async for one in client.databases.list("acme", limit=3)] == names[:3]
    assert api.requests[-1].url.params["limit"] == "1"


@pytest.mark.parametrize("status", [429, 503, 507])
async def test_refused_writes_are_sent_again_after_retry_after(client, api, clock, status):
    api.add_database("acme", "events")
    api.refuse(status, "backpressure", retry_after="7")
    api.refuse(status, "backpressure")
    appended = await client.records.append_many("acme", "events", [b"a", b"b"])
    assert (appended.first_lsn, appended.last_lsn) == (1, 2)
    assert len(api.requests) == 3
    assert clock.slept[0] == 7
    assert 0 <= clock.slept[1] <= 0.4
    assert len({request.headers["Idempotency-Key"] for request in api.requests}) == 1


async def test_retry_after_may_be_a_date(client, api, clock):
    api.add_database("acme", "events")
    api.refuse(503, "not_ready", retry_after="Thu, 09 Oct 2025 08:53:30 GMT")  # clock + 10 s
    await client.databases.get("acme", "events")
    assert clock.slept == [10]


async def test_a_wait_that_is_too_long_is_not_waited_for(client, api, clock):
    api.refuse(503, "not_ready", retry_after="3600")
    with pytest.raises(ProblemError) as caught:
        await client.databases.get("acme", "events")
    assert caught.value.retry_after_seconds == 3600
    assert clock.slept == []


async def test_retries_end(client, api, clock):
    for _ in range(4):
        api.refuse(507, "quota_exhausted")
    with pytest.raises(ProblemError, match="quota_exhausted"):
        await client.databases.get("acme", "events")
    assert len(api.requests) == 4
    assert len(clock.slept) == 3


async def test_other_problems_are_not_retried(client, api):
    api.refuse(500, "corrupt_blob")
    with pytest.raises(ProblemError, match="corrupt_blob"):
        await client.databases.get("acme", "events")
    assert len(api.requests) == 1


async def test_an_append_whose_answer_was_lost_takes_effect_once(client, api):
    database = api.add_database("acme", "events")
    api.break_connection(after_effect=True)
    appended = await client.records.append_many("acme", "events", [b"a", b"b"])
    assert (appended.first_lsn, appended.count) == (1, 2)
    assert len(api.requests) == 2
    assert database.records == {1: b"a", 2: b"b"}


async def test_a_request_that_is_not_idempotent_is_not_sent_again_after_a_broken_connection(
    client, api
):
    api.break_connection()
    with pytest.raises(ServiceUnreachable, match="reset"):
        await client.jobs._calls.send("POST", "/checkpoints", json={})
    assert len(api.requests) == 1


async def test_unreachable_names_the_url_after_few_attempts(clock):
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("connection refused", request=request)

    async with BopClient(
        "http://bop.test:1234", transport=httpx.MockTransport(refuse), clock=clock
    ) as client:
        with pytest.raises(ServiceUnreachable) as caught:
            await client.databases.get("acme", "events")
    assert caught.value.url == "http://bop.test:1234"
    assert caught.value.reason == "connection refused"
    assert len(clock.slept) == 2


@pytest.mark.parametrize("url", ["", "localhost:8600", "ftp://host", "http://", "http://h:port"])
async def test_a_wrong_url_is_refused_at_once(url):
    with pytest.raises(ValueError, match="URL"):
        BopClient(url)


async def test_append_in_every_media_type(client, api, tmp_path):
    database = api.add_database("acme", "events")
    await client.records.append_one("acme", "events", b"one\nrecord")
    await client.records.append_many("acme", "events", iter([b"two", b"", b"\n"]))
    await client.records.append("acme", "events", b"x\ny", media_type=LINES)
    file = tmp_path / "log.ndjson"
    file.write_bytes(b"first\nlast")
    await client.records.append_file("acme", "events", file)
    assert list(database.records.values()) == [
        b"one\nrecord", b"two", b"", b"\n", b"x", b"y", b"first", b"last",
    ]  # fmt: skip
    assert api.requests[-1].headers["Content-Length"] == "10"
    assert "Transfer-Encoding" not in api.requests[-1].headers


async def test_a_file_is_read_anew_for_each_attempt(client, api, tmp_path):
    database = api.add_database("acme", "events")
    file = tmp_path / "log.ndjson"
    file.write_bytes(b"".join(b"%d\n" % number for number in range(100_000)))
    api.refuse(429, "backpressure")
    api.break_connection()
    appended = await client.records.append_file("acme", "events", file)
    assert appended.count == 100_000
    assert database.records[100_000] == b"99999"
    assert {len(request.content) for request in api.requests} == {file.stat().st_size}


async def test_records_come_back_with_their_lsns_across_gaps(client, api):
    api.add_records("acme", "events", b"a", b"", b"c" * 100)
    api.add_records("acme", "events", b"later\nmore", gap=1 << 32)
    found = [record async for record in client.records.iter("acme", "events")]
    late = 4 + (1 << 32)
    assert found == [
        Record(1, b"a"), Record(2, b""), Record(3, b"c" * 100), Record(late, b"later\nmore"),
    ]  # fmt: skip
    assert [one.lsn async for one in client.records.iter("acme", "events", from_lsn=2)] == [
        2, 3, late,
    ]  # fmt: skip
    assert [
        one.lsn async for one in client.records.iter("acme", "events", from_lsn=2, to_lsn=3)
    ] == [2, 3]
    assert [one.lsn async for one in client.records.iter("acme", "events", limit=2)] == [1, 2]
    assert [one.lsn async for one in client.records.iter("acme", "events", from_lsn=4)] == [late]
    assert [one async for one in client.records.iter("acme", "events", from_lsn=late + 1)] == []


async def test_a_gap_at_the_end_ends_the_reading(client, api):
    api.add_records("acme", "events", b"a")
    api.databases["acme", "events"].members["next_lsn"] += 1 << 32
    assert [one.lsn async for one in client.records.iter("acme", "events")] == [1]


async def test_reading_ends_at_the_newest_record_of_its_beginning(client, api):
    api.add_records("acme", "events", b"a")
    seen = []
    async for record in client.records.iter("acme", "events"):
        seen.append(record.lsn)
        api.add_records("acme", "events", b"one more")
    assert seen == [1]


@pytest.mark.parametrize("after_bytes", [0, 3, 4, 9, 14, 30])
async def test_a_broken_stream_goes_on_where_it_broke(client, api, after_bytes):
    records = [b"%05d" % number for number in range(5)]
    api.add_records("acme", "events", *records)
    api.break_stream(after_bytes=after_bytes)
    found = [record async for record in client.records.iter("acme", "events")]
    assert found == [Record(number + 1, data) for number, data in enumerate(records)]
    froms = [
        int(request.url.params["from_lsn"])
        for request in api.requests
        if request.url.path.endswith("records")
    ]
    assert froms == [1, 1 + after_bytes // 9]


async def test_a_stream_that_never_gets_further_is_given_up(client, api):
    api.add_records("acme", "events", b"a" * 50)
    for _ in range(4):
        api.break_stream(after_bytes=20)
    with pytest.raises(ServiceUnreachable, match="without sending complete"):
        async for _ in client.records.iter("acme", "events"):
            pass


async def test_a_stream_that_says_it_is_whole_and_is_not_is_broken(clock):
    def short(request: httpx.Request) -> httpx.Response:
        headers = {"Bop-First-Lsn": "1", "Bop-Last-Lsn": "2", "Bop-Next-Lsn": "3"}
        return httpx.Response(200, headers=headers, content=struct.pack("<I", 1) + b"a")

    async with BopClient(
        "http://bop.test",
        transport=httpx.MockTransport(short),
        clock=clock,
        retry=RetryPolicy(attempts_max=1),
    ) as client:
        with pytest.raises(StreamBroken, match="LSN 2"):
            async for _ in client.records.iter("acme", "events", from_lsn=1, to_lsn=2):
                pass


async def test_following_waits_for_records_to_come(client, api):
    api.add_records("acme", "events", b"a")
    seen = []
    async for record in client.records.iter("acme", "events", follow=True):
        seen.append(record.lsn)
        if len(seen) == 3:
            break
        api.add_records("acme", "events", b"next")
    assert seen == [1, 2, 3]
    assert float(api.requests[-1].url.params["wait"]) > 0


async def test_truncated_records_are_a_problem(client, api):
    api.add_records("acme", "events", b"a", b"b")
    api.databases["acme", "events"].members["first_lsn"] = 2
    with pytest.raises(ProblemError, match="lsn_truncated"):
        await anext(client.records.iter("acme", "events", from_lsn=1))


@pytest.mark.parametrize("piece_bytes", [1, 3, 4, 5, 64, 10_000])
def test_decoder_gives_the_same_records_however_they_are_cut(piece_bytes):
    records = [bytes([number % 256]) * (number * 7 % 90) for number in range(120)]
    body = b"".join(struct.pack("<I", len(record)) + record for record in records)
    decoder = RecordDecoder()
    found = []
    for at in range(0, len(body), piece_bytes):
        found += decoder.feed(body[at : at + piece_bytes])
    assert found == records
    assert not decoder.unfinished
    decoder.feed(b"\x05")
    assert decoder.unfinished


async def test_a_checkpoint_is_watched_to_its_end(client, api):
    api.add_records("acme", "events", b"a")
    job = await client.checkpoints.trigger("acme", "events", reason="test")
    assert job.state == "pending"
    assert json.loads(api.requests[-1].content)["reason"] == "test"
    states = [seen.state async for seen in client.checkpoints.watch(job.id)]
    assert states == ["pending", "in_flight", "completed"]


async def test_watching_goes_on_when_the_event_stream_breaks_off(client, api):
    job_id = api.add_job("pending", "in_flight", "in_flight", "in_flight", "completed")
    api.events_broken = True
    seen = [job async for job in client.checkpoints.watch(job_id)]
    assert seen[-1].ended
    assert len({job.progress.uploaded_bytes for job in seen}) == len(seen)
    assert sum(request.url.path.endswith("events") for request in api.requests) >= 2


async def test_jobs_are_polled_and_waited_for(client, api):
    job_id = api.add_job("pending", "in_flight", "completed", kind="verify_manifest")
    assert [job.state async for job in client.jobs.watch(job_id)] == [
        "pending", "in_flight", "completed",
    ]  # fmt: skip
    other = api.add_job("in_flight", "failed")
    ended = await client.jobs.wait(other)
    assert ended.error == {"code": "lease_timeout", "detail": "No lease."}
    assert float(api.requests[-1].url.params["wait"]) > 0
    with pytest.raises(ProblemError, match="job_already_ended"):
        await client.jobs.cancel(other)
    listed = client.jobs.list(tenant="acme", state="failed", limit=5)
    assert [job.id async for job in listed] == [job_id, other]
    asked = dict(api.requests[-1].url.params)
    assert asked == {"tenant": "acme", "state": "failed", "limit": "5"}


async def test_event_data_follows_the_standard():
    async def lines():
        for line in [": ping", "", "event: x", "data: a", "data:b", "", "data: cut off"]:
            yield line

    assert [data async for data in event_data(lines())] == ["a\nb"]


async def test_readiness_is_an_answer_also_when_not_ready(client, api):
    assert (await client.operations.readiness()).ready
    api.reasons = ["the prefix is not claimed"]
    found = await client.operations.readiness()
    assert (found.ready, found.reasons) == (False, ["the prefix is not claimed"])
    assert len(api.requests) == 2


async def test_operations_decode(client, api):
    api.changes = [
        {
            "sequence": number, "committed_at": "2026-11-23T21:05:00Z", "tenant": "acme",
            "database": "events", "generation": 1, "reason": "checkpoint.published", "ops": [{}],
        }
        for number in (1, 2, 3)
    ]  # fmt: skip
    found = [change.sequence async for change in client.operations.change_log(after=1)]
    assert found == [2, 3]
    api.findings = [{"invariant": "I2", "where": "a blob", "detail": "is gone"}]
    report = await client.operations.fsck()
    assert report.findings[0].invariant == "I2"
    assert (await client.operations.manifest_stats())["map_bytes"] == 1 << 36
    assert [lease async for lease in client.operations.leases()] == []
    api.add_database("acme", "events", health={"state": "wal_lost", "lost_from_lsn": 4})
    assert (await client.databases.acknowledge_loss("acme", "events")).health.state == "ok"
    durable = await client.databases.durable("acme", "events", min_lsn=0, wait_seconds=2.5)
    assert durable.checkpointed_lsn == 0
    assert api.requests[-1].url.params["wait"] == "2.5"


async def test_large_streams_hold_little(client, api):
    api.add_records("acme", "events", *(b"%08d" % number for number in range(20_000)))
    digest = hashlib.sha256()
    largest = 0
    async for batch in client.records.iter_batches("acme", "events"):
        largest = max(largest, len(batch.records))
        for record in batch.records:
            digest.update(record)
    assert largest <= 2
    wanted = hashlib.sha256(b"".join(b"%08d" % number for number in range(20_000)))
    assert digest.digest() == wanted.digest()


@pytest.mark.parametrize(
    "name", ["../../orders", "..", ".", "", "a/../..", "a?b=c", "a#b", "a%2fb", "a\nb"]
)
async def test_a_name_never_becomes_another_path(name):
    """`DELETE …/snapshots/../../orders` is `DELETE …/databases/orders`."""
    asked: list[str] = []

    def refuse(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.raw_path.decode())
        return httpx.Response(404)

    async with BopClient("http://bop.test", transport=httpx.MockTransport(refuse)) as client:
        for call in (
            client.history.delete_snapshot("acme", "events", name),
            client.databases.get("acme", name),
            client.jobs.cancel(name),
            client.limits.flags(name),
            client.admin.approve(name),
        ):
            with pytest.raises((ValueError, ProblemError)):
                await call
    segment = quote(name, safe="")
    places = [
        f"/tenants/acme/databases/events/snapshots/{segment}",
        f"/tenants/acme/databases/{segment}",
        f"/jobs/{segment}/cancel",
        f"/admin/tenants/{segment}/feature-flags",
        f"/admin/approvals/{segment}/approve",
    ]
    assert asked == ([] if name in {"", ".", ".."} else places)
