"""Limits, memory, spooling and disconnects of request bodies."""

import asyncio
import gc
import gzip
from pathlib import Path

import pytest

from app.core.base.clock import SeededRandomness, SystemClock
from app.core.base.errors import BodyTooLarge, DiskFull, InvalidRequest, MalformedRecords
from app.core.formats.record_framing import LineFramer, pack_records
from app.routers import bodies, exchange
from app.routers.auth import LOCAL
from app.routers.bodies import BodyLimits, BodyMemory, BodyReader, RecordBody, Spool
from app.routers.exchange import ClientGone, Exchange, Principal
from tests.helpers.fake_clock import FakeClock
from tests.helpers.wait import wait_until
from tests.unit.routers.asgi import RawExchange
from tests.unit.routers.conftest import Running

PATH = "/tenants/acme/databases/events/records"
LINES = {"Content-Type": "application/x-ndjson"}


@pytest.fixture
async def small(tmp_path: Path):
    """The app with small limits."""
    async with Running(
        data_dir=tmp_path,
        max_append_bytes=1000,
        max_json_bytes=200,
        body_idle_timeout_seconds=0.05,
    ) as running:
        running.service.add_database("acme", "events")
        yield running


@pytest.mark.parametrize(
    ("path", "content_type"), [(PATH, "application/x-ndjson"), ("/checkpoints", "application/json")]
)
async def test_a_body_that_is_encoded_is_refused_not_stored(
    small: Running, path: str, content_type: str
):
    """Compressed lines would be taken for records."""
    headers = {"Content-Type": content_type, "Content-Encoding": "gzip"}
    body = gzip.compress(b'{"n": 1}\n')
    answer = await small.client.post(path, content=body, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")
    assert small.service.record_contents() == []
    headers["Content-Encoding"] = "identity"
    answer = await small.client.post(path, content=body, headers=headers)
    assert answer.status_code != 415


async def test_a_declared_body_over_the_limit_is_refused_unread(small: Running):
    raw = RawExchange("POST", PATH, headers={**LINES, "Content-Length": "1001"})
    raw.body(b"x" * 1001)
    await raw.run(small.app)
    assert raw.status == 413
    assert raw.json["code"] == "body_too_large"
    assert raw.json["max_append_bytes"] == 1000
    assert raw.reads == 0


async def test_an_endless_body_is_refused_as_it_passes_the_limit(small: Running):
    raw = RawExchange("POST", PATH, headers={**LINES, "Transfer-Encoding": "chunked"})
    for _ in range(4):
        raw.body(b"x" * 400, more=True)
    raw.body(b"")
    await raw.run(small.app)
    assert raw.status == 413
    assert raw.headers["connection"] == "close"
    assert raw.complete
    assert small.service.record_contents() == []
    assert small.desk.memory.used_bytes == 0


async def test_a_body_of_just_the_limit_is_taken(small: Running):
    answer = await small.client.post(PATH, content=b"x" * 1000, headers=LINES)
    assert answer.status_code == 201


async def test_a_silent_body_is_refused(small: Running, monkeypatch):
    monkeypatch.setattr(exchange, "BRIEF_LINGER_SECONDS", 0.05)
    raw = RawExchange("POST", PATH, headers={**LINES, "Transfer-Encoding": "chunked"})
    raw.body(b"a\n", more=True)
    await raw.run(small.app)
    assert raw.status == 422
    assert raw.json["code"] == "invalid_request"
    assert raw.headers["connection"] == "close"
    assert raw.complete
    assert small.service.record_contents() == []
    assert small.desk.memory.used_bytes == 0


async def test_a_client_gone_in_the_middle_of_the_body_leaves_nothing(small: Running):
    raw = RawExchange("POST", PATH, headers={**LINES, "Content-Length": "100"})
    raw.body(b"a\nb\n", more=True).leave()
    await raw.run(small.app)
    assert raw.sent == []
    assert small.service.record_contents() == []
    assert small.desk.memory.used_bytes == 0


async def test_json_bodies_have_a_limit_of_their_own(small: Running):
    path = "/checkpoints"
    answer = await small.client.post(path, json={"tenant": "acme", "reason": "x" * 300})
    assert answer.status_code == 413
    assert answer.json()["max_json_bytes"] == 200


async def test_a_refused_body_is_read_away_so_that_the_answer_is_seen(small: Running):
    """The answer is whole before the rest of the body is thrown away, and ends after it."""
    raw = RawExchange("POST", PATH, headers={**LINES, "Content-Length": "100000"})
    for _ in range(9):
        raw.body(b"x" * 10_000, more=True)
    raw.body(b"x" * 10_000)
    await raw.run(small.app)
    assert raw.status == 413
    assert raw.reads == 10
    assert [message.get("more_body") for message in raw.sent[1:]] == [True, False]


def refused_after(raw: RawExchange, principal: Principal | None) -> Exchange:
    made = Exchange(raw.scope, raw.receive, raw.send, SeededRandomness(1))
    made.principal = principal
    return made


@pytest.mark.parametrize(
    ("principal", "headers", "reads"),
    [
        (None, {"Content-Length": "100000"}, 3),
        (LOCAL, {"Content-Length": "100000"}, 10),
        (LOCAL, {"Transfer-Encoding": "chunked"}, 3),
    ],
)
async def test_only_who_is_known_and_says_how_much_is_read_to_the_end(
    monkeypatch, principal, headers, reads
):
    monkeypatch.setattr(exchange, "BRIEF_LINGER_BYTES", 30_000)
    raw = RawExchange("POST", PATH, headers=headers)
    for _ in range(9):
        raw.body(b"x" * 10_000, more=True)
    raw.body(b"x" * 10_000)
    made = refused_after(raw, principal)
    await made.send({"type": "http.response.start", "status": 401, "headers": []})
    await made.send({"type": "http.response.body", "body": b"no"})
    assert raw.reads == reads
    assert [message.get("more_body") for message in raw.sent[1:]] == [True, False]


async def test_who_sends_too_slowly_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(exchange, "LINGER_GRACE_SECONDS", -0.001)
    raw = RawExchange("POST", PATH, headers={"Content-Length": "100000"})
    for _ in range(10):
        raw.body(b"x", more=True)
    made = refused_after(raw, LOCAL)
    await made.send({"type": "http.response.start", "status": 413, "headers": []})
    await made.send({"type": "http.response.body", "body": b"no"})
    assert raw.reads < 3
    assert not raw.sent[-1]["more_body"]


def reader_of(raw: RawExchange, *, bytes_max=10_000_000, clock=None, rate=0) -> BodyReader:
    made = Exchange(raw.scope, raw.receive, raw.send, SeededRandomness(1))
    limits = BodyLimits(
        bytes_max=bytes_max,
        limit_name="max_append_bytes",
        idle_timeout_seconds=5,
        bytes_per_second_min=rate,
    )
    return BodyReader(made, limits, clock=clock or SystemClock())


async def test_a_dripping_body_is_refused_after_its_grace():
    clock = FakeClock()
    raw = RawExchange("POST", PATH)
    reader = reader_of(raw, clock=clock, rate=100)
    raw.body(b"x" * 10, more=True).body(b"x", more=True).body(b"x" * 100_000, more=True)
    clock.advance(59)
    assert await reader.read_piece() == b"x" * 10  # slow, but within the grace
    clock.advance(2)
    with pytest.raises(InvalidRequest) as refused:
        await reader.read_piece()
    assert refused.value.fields["body_bytes_per_second_min"] == 100
    assert refused.value.fields["errors"]


async def test_a_fast_body_may_take_its_time():
    clock = FakeClock()
    raw = RawExchange("POST", PATH)
    reader = reader_of(raw, clock=clock, rate=100)
    clock.advance(100)
    raw.body(b"x" * 10_001, more=True).body(b"y")
    assert len(await reader.read_whole()) == 10_002


async def test_reading_past_the_end_gives_none():
    raw = RawExchange("POST", PATH).body(b"x")
    reader = reader_of(raw)
    assert await reader.read_piece() == b"x"
    assert await reader.read_piece() is None


async def test_limit_is_exact():
    raw = RawExchange("POST", PATH).body(b"12345")
    assert await reader_of(raw, bytes_max=5).read_whole() == b"12345"
    raw = RawExchange("POST", PATH).body(b"123456")
    with pytest.raises(BodyTooLarge):
        await reader_of(raw, bytes_max=5).read_whole()


# --- memory and spool


@pytest.fixture
def spool(tmp_path: Path):
    spool = Spool(tmp_path / "spool")
    yield spool
    spool.close_blocking()


async def let_go_of(directory: Path) -> None:
    """A pool's thread lets go of what it worked on a moment after its result is seen."""
    gc.collect()
    await wait_until(lambda: open_files(directory) == 0)


def open_files(directory: Path) -> int:
    found = 0
    for fd in Path("/proc/self/fd").iterdir():
        try:
            found += str(fd.readlink()).startswith(str(directory))
        except FileNotFoundError:
            continue
    return found


def payload_of(body: RecordBody) -> bytes:
    return b"".join(entry.load_blocking() for entry in body.entries)


async def read_lines(raw: RawExchange, memory: BodyMemory, spool: Spool, *, hashed=False):
    return RecordBody(
        reader_of(raw),
        LineFramer(record_bytes_max=1000, entry_target_bytes=100),
        memory=memory,
        spool=spool,
        hashed=hashed,
    )


async def test_a_body_within_the_budget_stays_in_memory(spool, tmp_path):
    memory = BodyMemory(1000)
    raw = RawExchange("POST", PATH).body(b"a\nb", more=True).body(b"b\n")
    async with await read_lines(raw, memory, spool) as body:
        await body.read()
        assert memory.used_bytes == 5 + 2 * 4  # a line's length is kept beside it
        assert payload_of(body) == pack_records([b"a", b"bb"])
        assert not (tmp_path / "spool").exists()
    assert memory.used_bytes == 0


async def test_a_body_beyond_the_budget_is_spooled_and_the_same(spool, tmp_path):
    records = [b"%d" % number * 10 for number in range(500)]
    data = b"".join(one + b"\n" for one in records)
    memory, bodies_read, hashes = BodyMemory(300), [], []
    for budget in (memory, BodyMemory(10**6)):
        raw = RawExchange("POST", PATH)
        for start in range(0, len(data), 97):
            raw.body(data[start : start + 97], more=True)
        raw.body(b"")
        async with await read_lines(raw, budget, spool, hashed=True) as body:
            await body.read()
            assert budget.used_bytes <= 10**6
            bodies_read.append(payload_of(body))
            hashes.append(body.body_hash)
            if budget is memory:
                assert memory.used_bytes <= 300
                assert open_files(tmp_path / "spool") == 2
                assert list((tmp_path / "spool").iterdir()) == []  # no name: a crash leaves none
                assert sum(entry.count for entry in body.entries) == len(records)
        del body
    assert bodies_read[0] == bodies_read[1] == pack_records(records)
    assert hashes[0] == hashes[1]
    assert memory.used_bytes == 0
    await let_go_of(tmp_path / "spool")


async def test_entries_outlive_their_request_for_a_writer_that_still_reads(spool, tmp_path):
    raw = RawExchange("POST", PATH).body(b"one\ntwo\n")
    async with await read_lines(raw, BodyMemory(1), spool) as body:
        await body.read()
        entries = list(body.entries)
    assert b"".join(entry.load_blocking() for entry in entries) == pack_records([b"one", b"two"])
    del entries
    await let_go_of(tmp_path / "spool")


async def test_a_spooled_body_that_is_malformed_or_abandoned_leaves_nothing(spool, tmp_path):
    memory = BodyMemory(3)
    raw = RawExchange("POST", PATH).body(b"abcdef", more=True)
    raw.leave()
    with pytest.raises(ClientGone):
        async with await read_lines(raw, memory, spool) as body:
            await body.read()
    framer = bodies.framer_for(bodies.RECORDS, record_bytes_max=100)
    raw = RawExchange("POST", PATH).body(b"\x09\x00\x00\x00abc")
    with pytest.raises(MalformedRecords):
        async with RecordBody(
            reader_of(raw), framer, memory=memory, spool=spool, hashed=False
        ) as body:
            await body.read()
    del body
    assert memory.used_bytes == 0
    await let_go_of(tmp_path / "spool")


async def test_a_full_disk_under_the_spool_is_told_as_such(spool, monkeypatch):
    def full(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    raw = RawExchange("POST", PATH).body(b"abc\n")
    monkeypatch.setattr(bodies.os, "write", full)
    with pytest.raises(DiskFull):
        async with await read_lines(raw, BodyMemory(1), spool) as body:
            await body.read()


async def test_a_slow_body_holds_up_nobody(small: Running):
    """Another append ends while a slow one is in the middle of its body."""
    raw = RawExchange("POST", PATH, headers={**LINES, "Content-Length": "4"})
    raw.body(b"a\n", more=True)
    slow = asyncio.create_task(raw.run(small.app))
    await raw.first_read.wait()
    assert (await small.client.post(PATH, content=b"fast", headers=LINES)).status_code == 201
    raw.body(b"b\n")
    await slow
    assert small.service.record_contents() == [b"fast", b"a", b"b"]
