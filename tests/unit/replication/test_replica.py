"""What the service's answers mean for who follows a database."""

from pathlib import Path

import httpx
import pytest

from app.client import BopClient, ProblemError, RetryPolicy
from app.replication import replica as module
from app.replication.plan import Limits, Position
from app.replication.replica import AWAY_SECONDS, GAPS_MAX, Refused, Replica, Target
from app.replication.shares import Shares
from app.replication.wal_index import Log

FRAME = 4096 + 24
LOG = Log(salts=(7, 70), page_size=4096, frames=40, page_count=9, checksums=(1, 2), backfilled=0)
DESCRIBED = {
    "tenant": "acme", "database": "a", "db_id": 1, "engine": "libsql", "page_size": 4096,
    "chunk_bytes": 65536, "compression": "zstd", "state": "active", "generation": 0,
    "first_lsn": 1, "next_lsn": 10, "checkpointed_lsn": 0, "page_count": 9, "wal_bytes": 0,
    "created_at": "2026-01-01T00:00:00Z", "forked_from": None,
    "health": {"state": "ok", "lost_from_lsn": None},
}  # fmt: skip
LIMITS = Limits(request_bytes=2 * FRAME, request_bytes_max=8 * FRAME)


def at(frames):
    return 32 + frames * FRAME


class Service:
    def __init__(self):
        self.answers = []

    def __call__(self, request):
        return self.answers.pop(0)


def stored(frames, *, before):
    new = frames > before
    return httpx.Response(
        200,
        json={
            "accepted_offset": at(frames) if frames else 0,
            "salt1": 7,
            "salt2": 70,
            "first_lsn": before + 1 if new else None,
            "last_lsn": frames if new else None,
            "frames": frames - before,
            "commits": int(new),
            "page_count": 9,
        },
    )


def problem(status, code, **extras):
    headers = {"Content-Type": "application/problem+json"}
    if "retry_after" in extras:
        headers["Retry-After"] = extras.pop("retry_after")
    body = {"code": code, "status": status, "title": code, "detail": f"{code}!", **extras}
    return httpx.Response(status, json=body, headers=headers)


@pytest.fixture
def service():
    return Service()


@pytest.fixture
def told():
    return []


@pytest.fixture
async def replica(service, told):
    client = BopClient(
        "http://bop.test",
        transport=httpx.MockTransport(service),
        retry=RetryPolicy(attempts_max=1),
    )
    async with client:
        target = Target(path=Path("a.db"), tenant="acme", database="a")
        replica = Replica(
            target, client, tell=told.append, limits=LIMITS, shares=Shares(carried_bytes=0)
        )
        replica.position = replica.confirmed = Position(last_lsn=4, salts=LOG.salts, offset=at(4))
        replica.status.last_lsn = 4
        yield replica


async def send(replica):
    offset = replica.position.offset
    end = replica.request_end(LOG, offset, LOG.end)
    is_new = await replica.send_wal(
        b"frames", offset=offset, end=end, log_end=LOG.end, after_lsn=None
    )
    return (end - at(0)) // FRAME, is_new


async def judged(replica, *, was_image=False):
    """What is made of a refusal."""
    with pytest.raises(ProblemError) as caught:
        await send(replica)
    replica.judge(caught.value, page_size=4096, was_image=was_image)


async def test_requests_grow_with_a_transaction_and_shrink_behind_it(replica, service):
    service.answers = [
        stored(0, before=0),  # no commit within frames 4 to 6: 0 is "nothing of this log yet"
        stored(4, before=4),
        stored(12, before=4),
        stored(14, before=12),
    ]
    assert await send(replica) == (6, False)
    assert await send(replica) == (8, False)
    assert await send(replica) == (12, True)
    assert replica.position.offset == at(12)
    assert await send(replica) == (14, True)
    assert replica.status.sent_bytes == 10 * FRAME


async def test_a_transaction_that_no_request_holds_means_an_image(replica, service):
    service.answers = [stored(4, before=4) for _ in range(2 + GAPS_MAX)]
    for frames in (6, 8, 12, 12, 12):
        assert replica.image_reason is None
        assert await send(replica) == (frames, False)
    assert replica.image_reason == "the service takes no frame of the log"


async def test_an_answer_that_does_not_come_leaves_the_place_unknown(replica, service):
    service.answers = [problem(503, "not_ready", retry_after="7")]
    await judged(replica)
    assert replica.position is None
    assert replica.confirmed.offset == at(4), "at least that"
    assert replica.is_away
    assert 6 < replica.away_seconds <= 7
    assert replica.status.away


async def test_what_the_service_is_back_with_counts(replica, service, told):
    replica.go_away("so")
    place = {"last_lsn": 9, "offset": at(9), "salt1": 7, "salt2": 70}
    service.answers = [
        httpx.Response(200, json=DESCRIBED),
        httpx.Response(200, json=DESCRIBED),
        problem(409, "wal_gap", **place, checksum1=3, checksum2=4),
    ]
    await replica.ask_position(LOG)
    assert replica.position == Position(last_lsn=9, salts=LOG.salts, offset=at(9), checksums=(3, 4))
    assert not replica.is_away, "what was not answered had taken effect"
    assert [event.event for event in told] == ["service_away", "service_back"]


async def test_a_service_that_answers_and_takes_nothing_is_asked_ever_less(replica, service):
    waits = []
    for _ in AWAY_SECONDS:
        service.answers = [problem(507, "quota_exhausted")]
        replica.position = replica.confirmed
        await judged(replica)
        waits.append(round(replica.away_seconds, 2))
        is_first = len(waits) == 1
        service.answers = [
            *(httpx.Response(200, json=DESCRIBED) for _ in range(1 + is_first)),
            problem(409, "wal_gap", last_lsn=4, offset=at(4), salt1=7, salt2=70),
        ]
        await replica.ask_position(LOG)
    assert waits == pytest.approx(AWAY_SECONDS, abs=0.05)
    assert not replica.is_given_up
    replica.position = replica.confirmed
    service.answers = [problem(507, "quota_exhausted")]
    await judged(replica)
    assert replica.is_given_up


async def test_who_does_not_stay_does_not_wait_for_a_minute_and_another_one(replica, service):
    for is_given_up in (False, True):
        service.answers = [problem(507, "quota_exhausted", retry_after="60")]
        replica.position = replica.confirmed
        await judged(replica)
        assert replica.is_given_up is is_given_up


async def test_a_body_that_is_too_large_is_halved(replica, service, monkeypatch):
    """The service's limit may be lower than the usual request, and a proxy's, too."""
    monkeypatch.setattr(module, "REQUEST_BYTES_MIN", FRAME)
    service.answers = [problem(413, "body_too_large"), stored(5, before=4), stored(6, before=5)]
    await judged(replica)
    assert (replica.image_reason, replica.position) == (None, None)
    for frames in (5, 6):
        replica.position = replica.confirmed
        assert await send(replica) == (frames, True)


async def test_a_wal_gap_that_does_not_say_where_is_not_from_the_service(replica, service):
    service.answers = [problem(409, "wal_gap")]
    await judged(replica)
    assert replica.is_away


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(408, text="<html>"),
        problem(422, "invalid_request", errors=[{"loc": ["body"], "msg": "", "type": "timeout"}]),
    ],
)
async def test_a_body_that_came_too_slowly_is_sent_again(replica, service, answer):
    service.answers = [answer]
    await judged(replica)
    assert replica.is_away


async def test_what_a_proxy_shows_to_browsers_is_not_told(replica, service):
    service.answers = [httpx.Response(403, text="<html>no</html>")]
    with pytest.raises(Refused, match="no bop-checkpoint service: 403 Forbidden"):
        await judged(replica)


async def test_gaps_without_end_mean_an_image(replica, service):
    place = {"last_lsn": 4, "offset": at(4), "salt1": 7, "salt2": 70}
    sums = {"checksum1": 3, "checksum2": 4}
    service.answers = [problem(409, "wal_gap", **place, **sums) for _ in range(GAPS_MAX)]
    for _ in range(GAPS_MAX):
        assert replica.image_reason is None
        await judged(replica)
    assert replica.image_reason == "the service refuses to go on where it says it is"


@pytest.mark.parametrize("code", ["wal_invalid", "transaction_too_large", "body_too_large"])
async def test_a_log_that_is_not_taken_means_an_image(replica, service, code):
    service.answers = [problem(413, code), problem(413, code)]
    await judged(replica)
    assert replica.image_reason is not None
    replica.position = replica.confirmed
    with pytest.raises(Refused):
        await judged(replica, was_image=True)


@pytest.mark.parametrize(
    ("status", "code"),
    [(403, "forbidden"), (409, "page_size_mismatch"), (409, "wal_lost"), (404, "not_found")],
)
async def test_what_asking_again_does_not_change_is_refused(replica, service, status, code):
    service.answers = [problem(status, code)]
    with pytest.raises(Refused) as caught:
        await judged(replica)
    assert caught.value.code == code
