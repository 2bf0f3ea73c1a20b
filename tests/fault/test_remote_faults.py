"""S3 faults through a proxy before SeaweedFS. Each test names its row of the fault table."""

import asyncio
import contextlib
import http.client
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from app.core.base.clock import SeededRandomness, SystemClock
from app.core.base.errors import CorruptBlob, OutcomeUnknown, OwnershipLost, RemoteUnavailable
from app.core.base.tasks import BlockingPool
from app.core.coordination.ownership import PrefixOwnership
from app.core.formats.crc64 import crc64, encode_crc64
from app.core.stores.remote.metered import Metered
from app.core.stores.remote.probe import inspect_endpoint, probe
from app.core.stores.remote.protocol import (
    RemoteMisconfigured,
    RemoteStore,
    RemoteThrottled,
)
from app.core.stores.remote.requests import ConcurrencyLimit, Retrier, RetryBudget, RetryPolicy
from app.core.stores.remote.retrying import Retrying
from app.core.stores.remote.s3 import S3RemoteStore
from app.core.stores.remote.s3_client import S3Options
from tests.helpers.fault_proxy import (
    Answer,
    Blackhole,
    FaultProxy,
    FlipBit,
    Hold,
    LoseAnswer,
    ReplaceAnswer,
    ResetAnswer,
    ResetRequest,
    Rule,
    Shorten,
    Stall,
    Throttle,
    Truncate,
)
from tests.helpers.remote import EventLog, bytes_body, file_body
from tests.helpers.seaweed import SeaweedS3
from tests.helpers.wait import wait_until

MIB = 1024 * 1024
IDLE_SECONDS = 1.0
"""Where the deadline is what is tested; elsewhere a busy machine must not meet it."""


@pytest.fixture(scope="module")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedS3]:
    """A server of this module's own: it is stopped and continued here."""
    with SeaweedS3.running(tmp_path_factory.mktemp("seaweed") / "server") as server:
        yield server


@pytest.fixture(autouse=True)
def _credentials(seaweed: SeaweedS3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in seaweed.environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
async def proxy(seaweed: SeaweedS3) -> AsyncIterator[FaultProxy]:
    async with FaultProxy.running("127.0.0.1", seaweed.port) as running:
        yield running
        assert running.problems == []


class Bench:
    """A store through the proxy, with the parts that a test looks into."""

    def __init__(self, store: RemoteStore, log: EventLog, limit: ConcurrencyLimit) -> None:
        self.store = store
        self.log = log
        self.limit = limit

    @property
    def retries(self) -> int:
        return len(self.log.named("remote.retried"))


@contextlib.asynccontextmanager
async def bench_on(
    endpoint: str,
    bucket: str,
    *,
    attempts: int = 4,
    budget: float = 100.0,
    single_put_bytes_max: int = 1 << 30,
    idle_timeout_seconds: float = 20.0,
    request_timeout_seconds: float = 60.0,
    list_page_count: int = 1000,
) -> AsyncIterator[Bench]:
    log = EventLog()
    retrier = Retrier(
        RetryPolicy(attempts_max=attempts, backoff_base_seconds=0.01, backoff_cap_seconds=0.05),
        budget=RetryBudget(capacity=budget),
        clock=SystemClock(),
        randomness=SeededRandomness(3),
        events=log.events,
    )
    options = S3Options(
        bucket=bucket,
        prefix="p",
        endpoint_url=endpoint,
        addressing="path",
        connect_timeout_seconds=5.0,
        idle_timeout_seconds=idle_timeout_seconds,
        request_timeout_seconds=request_timeout_seconds,
        single_put_bytes_max=single_put_bytes_max,
        part_bytes=5 * MIB,
        list_page_count=list_page_count,
    )
    async with AsyncExitStack() as stack:
        pool = BlockingPool("test", threads=4)
        stack.callback(pool.close_blocking)
        inner = await S3RemoteStore.open(options, retrier=retrier, pool=pool)
        stack.push_async_callback(inner.aclose)
        limit = ConcurrencyLimit(ceiling=16)
        metered = Metered(inner, clock=SystemClock(), events=log.events)
        yield Bench(Retrying(metered, retrier=retrier, limit=limit), log, limit)


@pytest.fixture
def bucket(seaweed: SeaweedS3) -> str:
    return seaweed.bucket()


@pytest.fixture
async def bench(proxy: FaultProxy, bucket: str) -> AsyncIterator[Bench]:
    async with bench_on(proxy.endpoint, bucket) as made:
        yield made


@pytest.fixture
async def impatient(proxy: FaultProxy, bucket: str) -> AsyncIterator[Bench]:
    async with bench_on(proxy.endpoint, bucket, idle_timeout_seconds=IDLE_SECONDS) as made:
        yield made


@pytest.fixture
async def direct(seaweed: SeaweedS3, bucket: str) -> AsyncIterator[RemoteStore]:
    """The truth: the same bucket, past the proxy."""
    async with bench_on(seaweed.endpoint, bucket) as made:
        yield made.store


# --- writing ----------------------------------------------------------------------------------


async def test_upload_timeout_is_retried_then_fails_cleanly(
    proxy: FaultProxy, impatient: Bench, direct: RemoteStore
) -> None:
    """Row 1: uploads time out; jittered retries, then a clean retryable failure."""
    rule = proxy.add(Rule(method="PUT", action=Blackhole(), times=None))
    begun = time.monotonic()
    with pytest.raises(RemoteUnavailable) as caught:
        await impatient.store.put_blob("blob", bytes_body(b"x"))
    assert not isinstance(caught.value, RemoteMisconfigured)
    assert rule.met == 4
    assert impatient.retries == 3
    assert time.monotonic() - begun < 4 * IDLE_SECONDS + 3
    assert await direct.head_blob("blob") is None
    waits = [entry["wait_seconds"] for entry in impatient.log.named("remote.retried")]
    assert len(set(waits)) == 3


async def test_upload_timeout_then_success(proxy: FaultProxy, impatient: Bench) -> None:
    """Row 1: the second attempt succeeds."""
    proxy.add(Rule(method="PUT", action=Blackhole(), times=1))
    await impatient.store.put_blob("blob", bytes_body(b"x"))
    assert await impatient.store.get_blob("blob") == b"x"


async def test_a_stalled_upload_is_given_up(
    proxy: FaultProxy, impatient: Bench, tmp_path: Path
) -> None:
    """Row 1: the server stops reading in mid-body. aiohttp has no timeout for that; ours fires."""
    body = file_body(tmp_path / "large", os.urandom(24 * MIB))
    proxy.add(Rule(method="PUT", action=Blackhole(read=False), times=1))
    begun = time.monotonic()
    await impatient.store.put_blob("large", body)
    assert time.monotonic() - begun < 20
    assert impatient.retries >= 1


async def test_a_slow_upload_that_moves_is_not_given_up(
    proxy: FaultProxy, bucket: str, tmp_path: Path
) -> None:
    """Row 1: idle means no byte, not slow."""
    body = file_body(tmp_path / "large", os.urandom(24 * MIB))
    proxy.add(Rule(method="PUT", action=Throttle(bytes_per_second=8 * MIB), times=1))
    async with bench_on(proxy.endpoint, bucket, idle_timeout_seconds=2.0) as bench:
        begun = time.monotonic()
        await bench.store.put_blob("large", body)
        assert time.monotonic() - begun > 2.0
        assert bench.retries == 0


async def test_a_request_that_crawls_meets_its_total_deadline(
    proxy: FaultProxy, bucket: str, tmp_path: Path
) -> None:
    """Row 1: a body that moves, but never ends in time."""
    body = file_body(tmp_path / "large", os.urandom(24 * MIB))
    proxy.add(Rule(method="PUT", action=Throttle(bytes_per_second=4 * MIB), times=None))
    async with bench_on(proxy.endpoint, bucket, attempts=1, request_timeout_seconds=2.0) as bench:
        begun = time.monotonic()
        with pytest.raises(OutcomeUnknown):
            await bench.store.put_blob("large", body)
        assert time.monotonic() - begun < 4


@pytest.mark.parametrize("answer", [Answer.slow_down(), Answer.internal_error()])
async def test_5xx_is_retried(proxy: FaultProxy, bench: Bench, answer: Answer) -> None:
    """Row 24: 500 and 503 SlowDown."""
    proxy.add(Rule(method="PUT", action=answer, times=2))
    await bench.store.put_blob("blob", bytes_body(b"x"))
    assert bench.retries == 2
    assert await bench.store.get_blob("blob") == b"x"


async def test_throttling_lowers_concurrency(proxy: FaultProxy, bench: Bench) -> None:
    """Row 24: SlowDown halves the number of requests in flight, success raises it again."""
    proxy.add(Rule(method="PUT", action=Answer.slow_down(), times=1))
    await bench.store.put_blob("blob", bytes_body(b"x"))
    lowered = bench.limit.limit
    assert lowered == 8
    for _ in range(20):
        await bench.store.head_blob("blob")
    assert bench.limit.limit > lowered


async def test_the_retry_budget_ends_a_storm(proxy: FaultProxy, bucket: str) -> None:
    """Row 24: with the budget spent, a call costs one request."""
    async with bench_on(proxy.endpoint, bucket, attempts=10, budget=6.0) as bench:
        proxy.add(Rule(method="PUT", action=Answer.slow_down(), times=None))
        for number in range(10):
            with pytest.raises(RemoteThrottled):
                await bench.store.put_blob(f"blob-{number}", bytes_body(b"x"))
        assert proxy.count("PUT") == 10 + 6


async def test_429_is_retried(proxy: FaultProxy, bench: Bench) -> None:
    """Row 25: the SDK's classifier does not know 429; ours does."""
    proxy.add(Rule(action=Answer.too_many_requests(), times=2))
    await bench.store.put_blob("blob", bytes_body(b"x"))
    assert bench.retries == 2
    assert bench.limit.limit < 16


@pytest.mark.parametrize("after_bytes", [0, 3 * MIB])
async def test_resets_in_the_request_are_bounded(
    proxy: FaultProxy, bench: Bench, direct: RemoteStore, tmp_path: Path, after_bytes: int
) -> None:
    """Row 26: exactly as many attempts as configured, on fresh and on reused connections."""
    await bench.store.put_blob("warm", bytes_body(b"x"))
    proxy.clear()
    body = file_body(tmp_path / "blob", os.urandom(6 * MIB))
    proxy.add(Rule(method="PUT", action=ResetRequest(after_bytes=after_bytes), times=None))
    with pytest.raises(OutcomeUnknown):
        await bench.store.put_blob("blob", body)
    assert proxy.count("PUT") == 4
    assert await direct.head_blob("blob") is None


async def test_a_reset_on_a_reused_connection_is_counted(proxy: FaultProxy, bench: Bench) -> None:
    """Row 26: aiohttp repeats idempotent requests by itself; here it must not."""
    await bench.store.put_blob("blob", bytes_body(b"x"))
    proxy.clear()
    proxy.add(Rule(action=ResetAnswer(), method="HEAD", times=None))
    proxy.add(Rule(action=ResetRequest(), method="GET", times=None))
    with pytest.raises(RemoteUnavailable):
        await bench.store.get_blob("blob")
    assert proxy.count("GET") == 4


async def test_put_done_answer_lost(proxy: FaultProxy, bench: Bench, tmp_path: Path) -> None:
    """Row 27: the object is looked up and adopted, not uploaded again."""
    body = file_body(tmp_path / "blob", os.urandom(2 * MIB))
    proxy.add(Rule(method="PUT", action=LoseAnswer(), times=1))
    info = await bench.store.put_blob("blob", body)
    assert (info.bytes, info.crc64) == (body.bytes, body.crc64)
    assert proxy.count("PUT") == 1
    assert proxy.count("HEAD") == 1


async def test_a_different_object_is_not_adopted(
    proxy: FaultProxy, bench: Bench, direct: RemoteStore
) -> None:
    """Row 27: what is there of the same length, but not ours, is overwritten."""
    await direct.put_blob("blob", bytes_body(b"old"))
    proxy.add(Rule(method="PUT", action=ResetRequest(), times=1))
    await bench.store.put_blob("blob", bytes_body(b"new"))
    assert await direct.get_blob("blob") == b"new"
    assert proxy.count("PUT") == 2


async def test_an_unknown_outcome_that_cannot_be_read_back_stays_unknown(
    proxy: FaultProxy, bench: Bench
) -> None:
    """Row 27: lost answer, then the store is gone: the caller must hear `unknown`."""
    proxy.add(Rule(method="PUT", action=LoseAnswer(), times=1))
    proxy.add(Rule(method="HEAD", action=ResetRequest(), times=None))
    with pytest.raises(OutcomeUnknown):
        await bench.store.put_blob("blob", bytes_body(b"x"))


async def test_412_on_our_own_object_is_adopted(proxy: FaultProxy, bench: Bench) -> None:
    """Row 28: the answer was lost, the retry meets our own object."""
    proxy.add(Rule(method="PUT", action=LoseAnswer(), times=1))
    info = await bench.store.put_if_absent("once", bytes_body(b"ours"))
    assert info is not None
    assert await bench.store.get_blob("once") == b"ours"


async def test_412_by_a_repeating_middlebox_is_adopted(proxy: FaultProxy, bench: Bench) -> None:
    """Row 28: something between repeated our PUT and passes on the second answer."""
    failed = Answer(status=412, code="PreconditionFailed")
    proxy.add(Rule(method="PUT", action=ReplaceAnswer(answer=failed), times=1))
    assert await bench.store.put_if_absent("once", bytes_body(b"ours")) is not None


async def test_412_on_a_foreign_object_is_a_loss(
    proxy: FaultProxy, bench: Bench, direct: RemoteStore
) -> None:
    """Row 28: the answer was lost, and someone else's object of the same length is there."""
    await direct.put_blob("once", bytes_body(b"them"))
    proxy.add(Rule(method="PUT", action=LoseAnswer(), times=1))
    assert await bench.store.put_if_absent("once", bytes_body(b"ours")) is None
    assert await direct.get_blob("once") == b"them"


async def test_put_if_match_with_a_lost_answer(proxy: FaultProxy, bench: Bench) -> None:
    """Row 28: as above, for If-Match."""
    first = await bench.store.put_if_absent("cell", bytes_body(b"one"))
    assert first is not None
    proxy.add(Rule(method="PUT", action=LoseAnswer(), times=1))
    info = await bench.store.put_if_match("cell", bytes_body(b"two"), etag=first.etag)
    assert info is not None
    assert await bench.store.get_blob("cell") == b"two"


LARGE = 12 * MIB


@pytest.fixture
async def parts_bench(proxy: FaultProxy, bucket: str) -> AsyncIterator[Bench]:
    async with bench_on(proxy.endpoint, bucket, single_put_bytes_max=8 * MIB) as made:
        yield made


async def test_multipart_completion_answer_lost(
    proxy: FaultProxy, parts_bench: Bench, tmp_path: Path
) -> None:
    """Row 29: read back, adopted; the parts go up once."""
    body = file_body(tmp_path / "large", os.urandom(LARGE))
    proxy.add(Rule(method="POST", path="uploadId=", action=LoseAnswer(), times=1))
    info = await parts_bench.store.put_blob("large", body)
    assert (info.bytes, info.crc64) == (body.bytes, body.crc64)
    assert proxy.count("PUT", "partNumber=") == 3
    assert proxy.count("POST", "uploads") == 1


ERROR_IN_200 = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>InternalError</Code>'
    b"<Message>We encountered an internal error.</Message></Error>"
)


async def test_multipart_completion_error_inside_200(
    proxy: FaultProxy, parts_bench: Bench, direct: RemoteStore, tmp_path: Path
) -> None:
    """Row 29: 200 with an error in its body, and nothing completed: it starts anew."""
    body = file_body(tmp_path / "large", os.urandom(LARGE))
    failed = Answer(status=200, body=ERROR_IN_200)
    proxy.add(Rule(method="POST", path="uploadId=", action=failed, times=1))
    await parts_bench.store.put_blob("large", body)
    found = await direct.head_blob("large")
    assert found is not None
    assert found.crc64 == body.crc64
    assert proxy.count("POST", "uploads") == 2


async def test_multipart_completion_error_inside_200_although_done(
    proxy: FaultProxy, parts_bench: Bench, tmp_path: Path
) -> None:
    """Row 29: 200 with an error in its body, but the object is there: adopted."""
    body = file_body(tmp_path / "large", os.urandom(LARGE))
    failed = ReplaceAnswer(answer=Answer(status=200, body=ERROR_IN_200))
    proxy.add(Rule(method="POST", path="uploadId=", action=failed, times=1))
    info = await parts_bench.store.put_blob("large", body)
    assert info.crc64 == body.crc64
    assert proxy.count("POST", "uploads") == 1


async def test_409_on_completion_starts_anew(
    proxy: FaultProxy, parts_bench: Bench, tmp_path: Path
) -> None:
    """Row 30: 409 ConditionalRequestConflict."""
    body = file_body(tmp_path / "large", os.urandom(LARGE))
    conflict = Answer(status=409, code="ConditionalRequestConflict")
    proxy.add(Rule(method="POST", path="uploadId=", action=conflict, times=1))
    info = await parts_bench.store.put_blob("large", body)
    assert info.crc64 == body.crc64
    assert proxy.count("POST", "uploads") == 2
    assert proxy.count("DELETE", "uploadId=") == 1


async def test_a_part_is_tried_again_by_itself(
    proxy: FaultProxy, parts_bench: Bench, tmp_path: Path
) -> None:
    """Row 26: a broken part does not start the whole upload anew."""
    body = file_body(tmp_path / "large", os.urandom(LARGE))
    proxy.add(Rule(method="PUT", path="partNumber=2", action=ResetRequest(after_bytes=MIB)))
    await parts_bench.store.put_blob("large", body)
    assert proxy.count("PUT", "partNumber=") == 4
    assert proxy.count("POST", "uploads") == 1


async def test_a_bit_flips_in_an_upload(
    proxy: FaultProxy, bench: Bench, direct: RemoteStore, tmp_path: Path
) -> None:
    """The store refuses what does not match the checksum; the second attempt is sound."""
    data = os.urandom(2 * MIB)
    body = file_body(tmp_path / "blob", data)
    proxy.add(Rule(method="PUT", action=FlipBit(offset=MIB, of="request"), times=1))
    await bench.store.put_blob("blob", body)
    assert bench.retries == 1
    assert await direct.get_blob("blob") == data


async def test_an_upload_damaged_again_and_again_is_our_damage(
    proxy: FaultProxy, bench: Bench, direct: RemoteStore
) -> None:
    """Wrong checksum on upload: two attempts, then a typed error, and nothing is stored."""
    proxy.add(Rule(method="PUT", action=FlipBit(offset=0, of="request"), times=None))
    with pytest.raises(CorruptBlob):
        await bench.store.put_blob("blob", bytes_body(b"content"))
    assert proxy.count("PUT") == 2
    assert await direct.head_blob("blob") is None


async def test_a_put_that_lands_after_its_cancellation_is_an_orphan(
    proxy: FaultProxy, bench: Bench, direct: RemoteStore
) -> None:
    """Row 37: the caller is gone, the object appears all the same, and can be deleted."""
    landing = threading.Event()
    proxy.add(Rule(method="PUT", action=Hold(until=landing), times=1))
    upload = asyncio.get_running_loop().create_task(
        bench.store.put_blob("blob", bytes_body(b"late"))
    )
    await proxy.seen(1, "PUT")
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload
    assert await direct.head_blob("blob") is None
    landing.set()
    await wait_until(lambda: direct.head_blob("blob"), describe="the late PUT lands")
    assert list(await direct.delete_blobs(["blob"])) == []
    assert await direct.head_blob("blob") is None


async def test_a_cancelled_upload_gives_its_slot_back(proxy: FaultProxy, bench: Bench) -> None:
    """Row 37: nothing stays reserved."""
    proxy.add(Rule(method="PUT", action=Blackhole(), times=1))
    upload = asyncio.get_running_loop().create_task(bench.store.put_blob("blob", bytes_body(b"x")))
    await proxy.seen(1, "PUT")
    assert bench.limit.in_flight == 1
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload
    assert bench.limit.in_flight == 0


async def test_a_stopped_server_meets_our_deadline(
    seaweed: SeaweedS3, bucket: str, tmp_path: Path
) -> None:
    """Row 31: the server accepts and stays silent, before any 100-continue or answer."""
    body = file_body(tmp_path / "blob", os.urandom(2 * MIB))
    async with bench_on(
        seaweed.endpoint, bucket, attempts=1, idle_timeout_seconds=IDLE_SECONDS
    ) as bench:
        await bench.store.put_blob("before", bytes_body(b"x"))
        seaweed.pause()
        try:
            begun = time.monotonic()
            with pytest.raises(RemoteUnavailable):
                await bench.store.put_blob("blob", body)
            with pytest.raises(RemoteUnavailable):
                await bench.store.head_blob("before")
            with pytest.raises(RemoteUnavailable):
                [info async for info in bench.store.list_blobs("")]
            assert time.monotonic() - begun < 4 * IDLE_SECONDS + 2
        finally:
            seaweed.resume()
    async with bench_on(seaweed.endpoint, bucket) as bench:
        await bench.store.put_blob("blob", body)


async def test_nobody_listens(bucket: str) -> None:
    """A refused connection is a clean failure: no write can have happened."""
    async with bench_on("http://127.0.0.1:9", bucket, attempts=2) as bench:
        with pytest.raises(RemoteUnavailable) as caught:
            await bench.store.put_blob("blob", bytes_body(b"x"))
        assert not isinstance(caught.value, OutcomeUnknown)
        assert bench.retries == 1
        with pytest.raises(RemoteUnavailable):
            await probe(bench.store, randomness=SeededRandomness(1))


# --- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "action", [ResetAnswer(after_bytes=MIB), Truncate(after_bytes=MIB), Stall(after_bytes=MIB)]
)
async def test_a_get_that_breaks_resumes_by_range(
    proxy: FaultProxy, impatient: Bench, action: ResetAnswer | Truncate | Stall
) -> None:
    """Row 33: GET cut or stalled; no byte is read twice or lost."""
    data = os.urandom(4 * MIB)
    await impatient.store.put_blob("blob", bytes_body(data))
    proxy.clear()
    proxy.add(Rule(method="GET", action=action, times=2))
    pieces = [piece async for piece in impatient.store.iter_blob("blob", first=5, length=3 * MIB)]
    assert b"".join(pieces) == data[5 : 5 + 3 * MIB]
    gets = [request for request in proxy.requests if request.method == "GET"]
    assert len(gets) == 3
    firsts = [int(request.headers["range"].split("=")[1].split("-")[0]) for request in gets]
    assert firsts[0] == 5
    assert firsts[0] < firsts[1] < firsts[2]


async def test_a_whole_get_that_breaks_resumes_by_range(proxy: FaultProxy, bench: Bench) -> None:
    """Row 33: a stream without a range goes on with one."""
    data = os.urandom(2 * MIB)
    await bench.store.put_blob("blob", bytes_body(data))
    proxy.add(Rule(method="GET", action=ResetAnswer(after_bytes=MIB), times=1))
    assert b"".join([piece async for piece in bench.store.iter_blob("blob")]) == data


async def test_get_blob_is_tried_again(proxy: FaultProxy, impatient: Bench) -> None:
    """Row 33: a small read is repeated as a whole."""
    data = os.urandom(MIB)
    await impatient.store.put_blob("blob", bytes_body(data))
    proxy.add(Rule(method="GET", action=Truncate(after_bytes=1000), times=1))
    proxy.add(Rule(method="GET", action=Stall(after_bytes=70_000), times=1))
    assert await impatient.store.get_blob("blob", first=1, length=MIB - 1) == data[1:]
    assert impatient.retries == 2


async def test_a_get_that_always_breaks_ends(proxy: FaultProxy, bench: Bench) -> None:
    """Row 33: attempts without progress are bounded."""
    await bench.store.put_blob("blob", bytes_body(os.urandom(MIB)))
    proxy.clear()
    proxy.add(Rule(method="GET", action=ResetAnswer(after_bytes=0), times=None))
    with pytest.raises(RemoteUnavailable):
        [piece async for piece in bench.store.iter_blob("blob")]
    assert proxy.count("GET") == 4


async def test_a_bit_flip_in_a_whole_get_is_found(proxy: FaultProxy, bench: Bench) -> None:
    """Row 34: a whole object is checked against the store's checksum, and fetched again once."""
    data = os.urandom(MIB)
    await bench.store.put_blob("blob", bytes_body(data))
    proxy.clear()
    proxy.add(Rule(method="GET", action=FlipBit(offset=77_777), times=1))
    assert await bench.store.get_blob("blob") == data
    assert proxy.count("GET") == 2
    proxy.add(Rule(method="GET", action=FlipBit(offset=77_777), times=None))
    with pytest.raises(CorruptBlob):
        await bench.store.get_blob("blob")
    with pytest.raises(CorruptBlob):
        [piece async for piece in bench.store.iter_blob("blob")]


async def test_a_bit_flip_in_a_ranged_get_is_left_to_the_blocks(
    proxy: FaultProxy, bench: Bench
) -> None:
    """Row 34: S3 names no checksum of a range; this store hands the bytes on as they came, and
    the block checksums above are what finds it. If this test ever fails, the store got better.
    """
    data = bytearray(os.urandom(100_000))
    await bench.store.put_blob("blob", bytes_body(bytes(data)))
    proxy.add(Rule(method="GET", action=FlipBit(offset=10), times=1))
    got = await bench.store.get_blob("blob", first=1000, length=100)
    data[1010] ^= 1
    assert got == bytes(data[1000:1100])


async def test_an_endpoint_that_ignores_ranges_is_named(proxy: FaultProxy, bench: Bench) -> None:
    await bench.store.put_blob("blob", bytes_body(b"0123456789"))
    whole = Answer(status=200, body=b"0123456789", headers=(("ETag", '"x"'),))
    proxy.add(Rule(method="GET", action=whole, times=None))
    with pytest.raises(RemoteMisconfigured, match="Range"):
        await bench.store.get_blob("blob", first=2, length=3)


# --- listing and deleting ---------------------------------------------------------------------


async def keys_of(store: RemoteStore) -> list[str]:
    return [info.key async for info in store.list_blobs("")]


@pytest.fixture
async def listed(proxy: FaultProxy, bucket: str) -> AsyncIterator[Bench]:
    """Ten objects in pages of three."""
    async with bench_on(proxy.endpoint, bucket, list_page_count=3) as made:
        for number in range(10):
            await made.store.put_blob(f"k{number}", bytes_body(b"x"))
        proxy.clear()
        yield made


@pytest.mark.parametrize("skip", [0, 2])
async def test_a_listing_that_fails_raises(proxy: FaultProxy, listed: Bench, skip: int) -> None:
    """Row 40: never a shorter listing in place of an error."""
    page = Rule(method="GET", path="list-type=2", skip=skip, times=None, action=ResetAnswer())
    proxy.add(page)
    with pytest.raises(RemoteUnavailable):
        await keys_of(listed.store)
    assert page.met == 4


async def test_a_page_is_tried_again_without_repeating_others(
    proxy: FaultProxy, listed: Bench
) -> None:
    """Row 40: exactly ten keys, each once."""
    proxy.add(Rule(method="GET", path="list-type=2", skip=1, times=2, action=Answer.slow_down()))
    assert sorted(await keys_of(listed.store)) == [f"k{number}" for number in range(10)]


@pytest.mark.parametrize("to_bytes", [0, 120, 400])
async def test_half_a_page_is_no_page(proxy: FaultProxy, listed: Bench, to_bytes: int) -> None:
    """Row 40: an answer that ends early, though its length says it is whole."""
    cut = Shorten(to_bytes=to_bytes)
    proxy.add(Rule(method="GET", path="list-type=2", skip=1, times=None, action=cut))
    with pytest.raises(RemoteUnavailable):
        await keys_of(listed.store)


async def test_a_page_that_does_not_say_whether_it_is_the_last(
    proxy: FaultProxy, listed: Bench
) -> None:
    """Row 40: no `IsTruncated`, or one without a way on."""
    start = b'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult>'
    for inner in (b"", b"<IsTruncated>true</IsTruncated>"):
        proxy.clear()
        partial = Answer(status=200, body=start + inner + b"</ListBucketResult>")
        proxy.add(Rule(method="GET", path="list-type=2", times=None, action=partial))
        with pytest.raises(RemoteUnavailable):
            await keys_of(listed.store)


async def test_a_deletion_is_retried(proxy: FaultProxy, bench: Bench) -> None:
    await bench.store.put_blob("blob", bytes_body(b"x"))
    proxy.add(Rule(method="POST", path="delete", action=LoseAnswer(), times=1))
    proxy.add(Rule(method="POST", path="delete", action=Answer.slow_down(), times=1))
    assert list(await bench.store.delete_blobs(["blob"])) == []
    assert await bench.store.head_blob("blob") is None


async def test_keys_that_could_not_be_deleted_are_named(proxy: FaultProxy, bench: Bench) -> None:
    refused = (
        b'<?xml version="1.0" encoding="UTF-8"?><DeleteResult><Error><Key>p/b</Key>'
        b"<Code>InternalError</Code><Message>no</Message></Error></DeleteResult>"
    )
    proxy.add(Rule(method="POST", path="delete", action=Answer(status=200, body=refused)))
    assert list(await bench.store.delete_blobs(["a", "b"])) == ["b"]


# --- the endpoint and the prefix --------------------------------------------------------------


async def test_the_probe_names_what_is_lacking(proxy: FaultProxy, bench: Bench) -> None:
    """Conditional writes that always answer success are no conditional writes."""
    sound = Answer(
        status=200,
        body=b"",
        headers=(("ETag", '"e"'), ("x-amz-checksum-crc64nvme", _encoded(b"second"))),
    )
    proxy.add(Rule(method="PUT", skip=1, times=1, action=sound))
    report = await inspect_endpoint(bench.store, randomness=SeededRandomness(1))
    assert any("If-None-Match on PUT is ignored" in text for text in report.lacks)
    proxy.add(Rule(method="PUT", skip=1, times=1, action=sound))
    with pytest.raises(RemoteMisconfigured, match="If-None-Match on PUT is ignored"):
        await probe(bench.store, randomness=SeededRandomness(1))


def _encoded(data: bytes) -> str:
    return encode_crc64(crc64(data))


def owner(store: RemoteStore, node_id: str, process_id: str, **more: bool) -> PrefixOwnership:
    return PrefixOwnership(
        store,
        node_id=node_id,
        process_id=process_id,
        host="host",
        take_over=more.get("take_over", False),
        clock=SystemClock(),
    )


async def test_two_services_on_one_prefix(bench: Bench, direct: RemoteStore) -> None:
    """Row 19: the older epoch ends at its next confirmation; the other goes on."""
    old, new = owner(direct, "node", "one"), owner(bench.store, "node", "two")
    assert await old.claim() == 1
    await old.confirm()
    assert await new.claim() == 2
    await new.confirm()
    with pytest.raises(OwnershipLost):
        await old.confirm()


async def test_a_race_for_the_prefix_gives_each_its_own_epoch(direct: RemoteStore) -> None:
    """Row 19: eight processes of one node claim at once."""
    claims = [owner(direct, "node", f"process {number}") for number in range(8)]
    epochs = await asyncio.gather(*(claim.claim() for claim in claims))
    assert sorted(epochs) == list(range(1, 9))
    confirmed = 0
    for claim in claims:
        with contextlib.suppress(OwnershipLost):
            await claim.confirm()
            confirmed += 1
            assert claim.epoch == 8
    assert confirmed == 1


@pytest.mark.parametrize("taken_before", [False, True])
async def test_a_claim_whose_answer_was_lost(
    proxy: FaultProxy, bench: Bench, taken_before: bool
) -> None:
    """Rows 19, 28: read back and recognised; the epoch is not raised twice."""
    if taken_before:
        await owner(bench.store, "node", "earlier").claim()
    proxy.add(Rule(method="PUT", path="owner.json", action=LoseAnswer(), times=1))
    claim = owner(bench.store, "node", "one")
    assert await claim.claim() == 1 + taken_before
    await claim.confirm()


async def test_an_outage_is_no_loss_of_the_prefix(proxy: FaultProxy, bench: Bench) -> None:
    """Row 19: unavailable is retryable; only a higher epoch ends the process."""
    claim = owner(bench.store, "node", "one")
    await claim.claim()
    proxy.add(Rule(action=Answer.slow_down(), times=None))
    with pytest.raises(RemoteUnavailable):
        await claim.confirm()
    proxy.clear()
    await claim.confirm()


def test_the_proxy_runs_in_a_thread_of_its_own(seaweed: SeaweedS3) -> None:
    """For servers in other processes: rules and counts are at hand from here."""

    def status(port: int) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("GET", "/status-probe")
            return connection.getresponse().status
        finally:
            connection.close()

    with FaultProxy.in_thread("127.0.0.1", seaweed.port) as proxy:
        assert status(proxy.port) == status(seaweed.port)
        proxy.add(Rule(path="/status-probe", action=Answer.too_many_requests(), skip=1))
        assert [status(proxy.port) for _ in range(3)] == [403, 429, 403]
        assert proxy.count("GET", "status-probe") == 4
    assert proxy.problems == []
