"""Appending: group commit, order, segments, pins, and what is refused."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from app.core.base.errors import (
    Backpressure,
    CorruptWal,
    DatabaseNotFound,
    InvariantViolation,
    LsnMismatch,
    ManifestFull,
    NotReady,
    WalLost,
)
from app.core.formats.segment import EngineCode, EntryType
from app.core.stores.wal import group_commit, planning
from app.core.stores.wal.log import AppendRequest, MemoryPayload, WalLog
from app.core.stores.wal.verification import verify_segment_blocking
from tests.unit.core.stores.wal.builders import (
    DB,
    Hold,
    Place,
    append,
    append_together,
    config,
    payload,
    read_all,
    request,
    settled,
)


@pytest.fixture
async def log(place: Place) -> AsyncIterator[WalLog]:
    async with place.log() as log:
        yield log


async def test_records_take_lsns_from_one_without_holes(log: WalLog) -> None:
    assert log.next_lsn == 1
    assert log.first_lsn is None
    first = await append(log, b"a", b"bb")
    second = await append(log, b"")
    assert (first.first_lsn, first.last_lsn, first.count, first.payload_bytes) == (1, 2, 2, 11)
    assert (second.first_lsn, second.last_lsn) == (3, 3)
    assert (log.next_lsn, log.durable_lsn, log.first_lsn) == (4, 3, 1)
    assert read_all(log) == {1: b"a", 2: b"bb", 3: b""}


async def test_appends_that_wait_share_one_flush(place: Place, log: WalLog) -> None:
    answers = await append_together(log, *(request(b"%d" % number) for number in range(100)))
    assert [answer.first_lsn for answer in answers] == list(range(1, 101))
    (flushed,) = place.log_of_events.fields("wal.flushed")
    assert flushed["requests"] == 100


async def test_a_group_is_bounded_in_bytes_and_count(
    place: Place, log: WalLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_commit, "GROUP_BYTES_MAX", 32)
    monkeypatch.setattr(group_commit, "GROUP_COUNT_MAX", 3)
    await append_together(
        log, *(request(b"x" * 10) for _ in range(4)), *(request(b"") for _ in range(7))
    )
    sizes = [fields["requests"] for fields in place.log_of_events.fields("wal.flushed")]
    assert sizes == [2, 3, 3, 3]


async def test_what_comes_during_a_flush_is_written_by_the_next(
    place: Place, log: WalLog, hold_at: Callable[[str], Hold]
) -> None:
    hold = hold_at("wal.after_write")
    first = asyncio.ensure_future(append(log, b"a"))
    await hold.reached()
    later = [asyncio.ensure_future(append(log, b"b")) for _ in range(5)]
    await asyncio.sleep(0)
    assert not first.done()
    assert log.durable_lsn == 0
    assert read_all(log) == {}
    hold.release()
    await asyncio.gather(first, *later)
    assert [fields["requests"] for fields in place.log_of_events.fields("wal.flushed")] == [1, 5]
    assert [(await one).first_lsn for one in later] == [2, 3, 4, 5, 6]


async def test_if_match_is_judged_in_the_order_of_the_queue(log: WalLog) -> None:
    first, refused, last = await append_together(
        log, request(b"a", b"b"), request(b"c", expected=2), request(b"d", expected=3)
    )
    assert first.last_lsn == 2
    assert isinstance(refused, LsnMismatch)
    assert refused.fields == {"next_lsn": 3}
    assert last.first_lsn == 3
    assert read_all(log) == {1: b"a", 2: b"b", 3: b"d"}


async def test_a_refused_append_alone_makes_no_segment(place: Place, log: WalLog) -> None:
    with pytest.raises(LsnMismatch):
        await append(log, b"a", expected=9)
    assert place.files() == []
    assert place.catalog.of() == ()


async def test_a_segment_ends_before_its_payload_would_pass_the_chunk_size(
    place: Place, log: WalLog
) -> None:
    for _ in range(5):
        await append(log, b"x" * 1020)  # 1024 framed: four fill the chunk
    await settled(log)
    (sealed,) = log.sealed_segments()
    assert (sealed.first_lsn, sealed.last_lsn, sealed.payload_bytes) == (1, 4, 4096)
    assert (sealed.entries, sealed.state, sealed.engine_name) == (4, "sealed", "append_only")
    assert sealed.file_bytes == sealed.path.stat().st_size
    assert verify_segment_blocking(sealed.path) == sealed.summary
    assert [row.state for row in place.catalog.of()] == ["sealed", "open"]
    assert [row.segment_id for row in place.catalog.of()] == [1, 5]
    assert log.wal_bytes == sum(path.stat().st_size for path in place.files())
    assert log.unsealed_bytes == place.files()[-1].stat().st_size


async def test_headers_of_tiny_records_do_not_grow_a_file_without_bound(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "HEADERS_BYTES_MIN", 1000)
    async with place.log(chunk_bytes=1000) as log:
        await append_together(log, *(request(b"") for _ in range(30)))
        await settled(log)
        (sealed,) = log.sealed_segments()
        assert 2000 - 84 < sealed.entries_end <= 2000


@pytest.mark.parametrize("chunk_bytes", [1, 64, 1000])
async def test_a_request_larger_than_a_segment_spans_several(
    place: Place, chunk_bytes: int
) -> None:
    records = [b"%03d" % number * 5 for number in range(40)]
    async with place.log(chunk_bytes=chunk_bytes) as log:
        appended = await append(log, *records, per_entry=2)
        assert (appended.first_lsn, appended.last_lsn, appended.count) == (1, 40, 40)
        assert list(read_all(log).values()) == records
        await settled(log)
        assert all(info.payload_bytes <= max(chunk_bytes, 38) for info in log.sealed_segments())
    async with place.log(chunk_bytes=chunk_bytes) as log:
        assert list(read_all(log).values()) == records
        assert log.next_lsn == 41


async def test_an_entry_larger_than_a_segment_has_one_for_itself(place: Place, log: WalLog) -> None:
    await append(log, b"a")
    await append(log, *[b""] * 5000)
    await append(log, b"b")
    assert [(row.first_lsn, row.ceiling_lsn) for row in place.catalog.of()] == [
        (1, 1 + 1024 + 1), (2, 2 + 5000 + 1), (5002, 5002 + 1024 + 1),
    ]  # fmt: skip
    assert log.next_lsn == 5003


async def test_no_row_before_the_data_is_durable_and_no_answer_before_the_row(
    place: Place, log: WalLog, hold_at: Callable[[str], Hold]
) -> None:
    hold = hold_at("wal.before_register")
    task = asyncio.ensure_future(append(log, b"a"))
    await hold.reached()
    assert place.catalog.of() == ()
    assert place.files()[0].stat().st_size == 64 + 80 + 5
    await asyncio.sleep(0)
    assert not task.done()
    hold.release()
    await task
    assert len(place.catalog.of()) == 1


async def test_seal_leaves_nothing_unsealed(place: Place, log: WalLog) -> None:
    await log.seal()
    assert log.sealed_segments() == ()
    task = asyncio.ensure_future(append(log, b"a\nb"))
    await asyncio.sleep(0)
    await log.seal()
    assert task.done()
    (info,) = log.sealed_segments()
    assert (info.last_lsn, info.line_safe, log.unsealed_bytes) == (1, False, 0)
    await log.seal()
    await append(log, b"c")
    await log.seal()
    assert [info.first_lsn for info in log.sealed_segments()] == [1, 2]
    assert [info.line_safe for info in log.sealed_segments()] == [False, True]
    assert read_all(log) == {1: b"a\nb", 2: b"c"}


async def test_reopening_goes_on_in_the_open_segment(place: Place) -> None:
    async with place.log() as log:
        await append(log, b"a")
    async with place.log() as log:
        assert (log.next_lsn, log.health) == (2, "ok")
        await append(log, b"b")
        assert read_all(log) == {1: b"a", 2: b"b"}
    assert len(place.files()) == 1


async def test_what_lies_in_a_new_segments_place_is_never_written_to(
    place: Place, log: WalLog, tmp_path: Path
) -> None:
    """It may be a link to the inode of a promoted chunk."""
    await append(log, b"a")
    await log.seal()
    promoted = tmp_path / "chunk"
    promoted.write_bytes(b"chunk")
    place.files()[0].with_name(f"{2:016d}.wal").hardlink_to(promoted)
    await append(log, b"b")
    assert promoted.read_bytes() == b"chunk"
    assert read_all(log) == {1: b"a", 2: b"b"}


async def test_a_floor_leaves_a_hole_between_segments_only(place: Place, log: WalLog) -> None:
    await append(log, b"a")
    log.raise_floor(100)
    assert (log.next_lsn, log.durable_lsn) == (100, 99)
    log.raise_floor(50)
    assert (await append(log, b"b", b"c")).first_lsn == 100
    await settled(log)
    assert [(info.first_lsn, info.last_lsn) for info in log.sealed_segments()] == [(1, 1)]
    assert read_all(log) == {1: b"a", 100: b"b", 101: b"c"}
    await log.aclose()
    async with place.log() as again:
        assert read_all(again) == {1: b"a", 100: b"b", 101: b"c"}
        assert again.next_lsn == 102


async def test_an_empty_log_starts_at_its_floor(place: Place) -> None:
    async with place.log(floor_lsn=77) as log:
        assert log.next_lsn == 77
        assert place.files() == []
        assert (await append(log, b"a")).first_lsn == 77


async def test_an_append_outlives_its_caller(log: WalLog, hold_at: Callable[[str], Hold]) -> None:
    hold = hold_at("wal.before_write")
    leaver = asyncio.ensure_future(append(log, b"gone"))
    await hold.reached()
    queued = asyncio.ensure_future(append(log, b"gone too"))
    await asyncio.sleep(0)
    leaver.cancel()
    queued.cancel()
    await asyncio.sleep(0)
    hold.release()
    assert (await append(log, b"here")).first_lsn == 3
    assert list(read_all(log).values()) == [b"gone", b"gone too", b"here"]


async def test_a_full_queue_refuses_at_once(log: WalLog, hold_at: Callable[[str], Hold]) -> None:
    log._queue = group_commit.AppendQueue(bytes_max=50, count_max=3)
    hold = hold_at("wal.before_write")
    tasks = [asyncio.ensure_future(append(log, b"first"))]
    await hold.reached()
    tasks.append(asyncio.ensure_future(append(log, b"x" * 100)))  # any size, where none waits
    await asyncio.sleep(0)
    with pytest.raises(Backpressure) as refused:
        await append(log, b"")
    assert refused.value.retry_after_seconds == 1
    hold.release()
    await asyncio.gather(*tasks)
    tasks = [asyncio.ensure_future(append(log, b"")) for _ in range(4)]
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(answer, Backpressure) for answer in answers] == [False, False, False, True]
    assert log.next_lsn == 6


async def test_waiting_for_an_lsn(log: WalLog) -> None:
    waiting = asyncio.ensure_future(log.wait_for(3))
    leaving = asyncio.ensure_future(log.wait_for(3))
    await append(log, b"a", b"b")
    assert not waiting.done()
    leaving.cancel()
    await append(log, b"c")
    await asyncio.wait_for(waiting, 5)
    await log.wait_for(1)
    assert leaving.cancelled()
    assert len(log._waiters) == 0


async def test_long_polls_that_leave_take_no_memory(log: WalLog) -> None:
    for lsn in range(1000):
        task = asyncio.ensure_future(log.wait_for(lsn + 10))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert len(log._waiters) == 0
    assert len(log._waiters._order) <= 65


async def test_closing_ends_long_polls_and_writes_what_is_queued(place: Place) -> None:
    async with place.store() as store:
        log = await store.open_log(config(), ())
        waiting = asyncio.ensure_future(log.wait_for(100))
        tasks = [asyncio.ensure_future(append(log, b"%d" % number)) for number in range(50)]
        await asyncio.sleep(0)
    assert [(await task).first_lsn for task in tasks] == list(range(1, 51))
    with pytest.raises(NotReady):
        await waiting
    with pytest.raises(NotReady):
        await append(log, b"late")
    async with place.log() as log:
        assert log.next_lsn == 51


async def test_pinned_segments_are_not_removed(place: Place, log: WalLog) -> None:
    for record in (b"a", b"b", b"c"):
        await append(log, record)
        await log.seal()
    with log.pin(2, 2) as pin:
        (pinned,) = pin.segments
        assert (pinned.segment_id, pinned.first_lsn, pinned.durable_last_lsn) == (2, 2, 2)
        assert pinned.sealed
        assert await log.remove([1, 2]) == (1,)
        assert pinned.path.exists()
    pin.release()  # again: nothing happens
    assert log.first_lsn == 2
    assert await log.remove([1, 2]) == (1, 2)  # the first was gone: its row may go
    assert [path.name for path in place.files()] == ["0000000000000003.wal"]
    assert log.wal_bytes == place.files()[0].stat().st_size
    assert read_all(log) == {3: b"c"}


async def test_an_open_segment_is_not_removed(place: Place, log: WalLog) -> None:
    await append(log, b"a")
    assert await log.remove([1]) == ()
    assert len(place.files()) == 1


async def test_a_pin_shows_what_was_durable_when_it_was_taken(log: WalLog) -> None:
    await append(log, b"a")
    with log.pin(1, 100) as pin:
        (pinned,) = pin.segments
        await append(log, b"b")
        assert (pinned.durable_last_lsn, pinned.sealed) == (1, False)
        assert pinned.entries_end == 64 + 80 + 5
        assert pinned.index.tolist() == [[1, 64]]
    assert log.pin(3, 100).segments == ()
    assert log.pin(0, 0).segments == ()


async def test_checkpointed_segments_say_so(place: Place, log: WalLog) -> None:
    await append(log, b"a")
    await log.seal()
    log.mark_checkpointed([1, 99])
    assert [info.state for info in log.sealed_segments()] == ["checkpointed"]


async def test_a_refused_row_takes_the_group_back(place: Place, log: WalLog) -> None:
    place.catalog.refusals.append(ManifestFull())
    answers = await append_together(log, request(b"a"), request(b"b"))
    assert [type(answer) for answer in answers] == [ManifestFull, ManifestFull]
    assert (log.next_lsn, place.files(), place.fatal) == (1, [], [])
    assert (await append(log, b"c")).first_lsn == 1
    assert read_all(log) == {1: b"c"}


async def test_a_refused_row_of_a_later_segment_takes_the_group_back(
    place: Place, log: WalLog
) -> None:
    await append(log, b"a")
    before = place.files()[0].read_bytes()
    place.catalog.refusals.append(ManifestFull())
    with pytest.raises(ManifestFull):
        await append(log, b"x" * 3000, b"y" * 3000, per_entry=1)
    assert [path.read_bytes() for path in place.files()] == [before]
    assert (await append(log, b"b")).first_lsn == 2
    assert read_all(log) == {1: b"a", 2: b"b"}


async def test_a_refused_seal_is_said_and_tried_again(place: Place, log: WalLog) -> None:
    await append(log, b"a")
    place.catalog.refusals.append(ManifestFull())
    with pytest.raises(ManifestFull):
        await log.seal()
    assert log.sealed_segments() == ()
    assert (await append(log, b"b")).first_lsn == 2
    await settled(log)
    assert [(info.first_lsn, info.last_lsn) for info in log.sealed_segments()] == [(1, 1)]
    assert read_all(log) == {1: b"a", 2: b"b"}


async def test_a_refused_seal_is_made_up_for_at_open(place: Place) -> None:
    async with place.log() as log:
        await append(log, b"a")
        place.catalog.refusals.append(ManifestFull())
        with pytest.raises(ManifestFull):
            await log.seal()
    async with place.log() as log:
        assert [row.state for row in place.catalog.of()] == ["sealed"]
        assert [info.state for info in log.sealed_segments()] == ["sealed"]
        assert (await append(log, b"b")).first_lsn == 2


async def test_a_payload_that_is_not_as_announced_is_refused(place: Place, log: WalLog) -> None:
    class Short(MemoryPayload):
        def load_blocking(self) -> bytes:
            return self.payload[:-1]

    await append(log, b"a")
    before = place.files()[0].read_bytes()
    whole = payload(b"b")
    short = Short(payload=whole.payload, count=1, line_safe=True)
    with pytest.raises(InvariantViolation):
        await log.append(AppendRequest(entries=(whole, short), entry_type=EntryType.RECORDS))
    assert place.files()[0].read_bytes() == before
    assert (await append(log, b"c")).first_lsn == 2
    assert place.fatal == []


@pytest.mark.parametrize("count", [0, 3])
async def test_an_entry_of_an_impossible_count_is_refused(log: WalLog, count: int) -> None:
    entry = MemoryPayload(payload=b"\0" * 8, count=count, line_safe=True)
    with pytest.raises(InvariantViolation):
        await log.append(AppendRequest(entries=(entry,)))
    with pytest.raises(InvariantViolation):
        await log.append(AppendRequest(entries=()))


async def test_logs_are_opened_once_and_dropped_whole(place: Place) -> None:
    async with place.store() as store:
        log = await store.open_log(config(), ())
        other = await store.open_log(config(db_id=8), ())
        with pytest.raises(InvariantViolation):
            await store.open_log(config(), ())
        assert set(store.logs()) == {log, other}
        await append(log, b"a")
        await append(other, b"b")
        task = asyncio.ensure_future(append(log, b"late"))
        await asyncio.sleep(0)
        await store.drop_log(DB)
        with pytest.raises(DatabaseNotFound):
            await task
        with pytest.raises(DatabaseNotFound):
            store.log(DB)
        with pytest.raises(DatabaseNotFound):
            await append(log, b"later")
        assert not (place.root / str(DB)).exists()
        await store.drop_log(DB)
        assert store.log(8) is other
        assert read_all(other) == {1: b"b"}


async def test_many_databases_flush_side_by_side(
    place: Place, hold_at: Callable[[str], Hold]
) -> None:
    """One that hangs in its fdatasync does not hold up another."""
    hold = hold_at("wal.after_write")
    async with place.store() as store:
        slow = await store.open_log(config(db_id=1), ())
        other = await store.open_log(config(db_id=2), ())
        task = asyncio.ensure_future(append(slow, b"slow"))
        await hold.reached()
        hold._place = "nowhere"
        await asyncio.wait_for(append(other, b"fast"), 10)
        assert not task.done()
        hold.release()
        await task


async def test_the_engine_is_in_the_header(place: Place) -> None:
    async with place.store() as store:
        libsql = await store.open_log(
            type(config())(db_id=DB, engine=EngineCode.LIBSQL, chunk_bytes=4096, floor_lsn=1), ()
        )
        entry = MemoryPayload(payload=bytes(24 + 512), count=1, line_safe=True)
        await libsql.append(AppendRequest(entries=(entry,), entry_type=EntryType.FRAMES))
        await libsql.seal()
        assert [info.engine_name for info in libsql.sealed_segments()] == ["libsql"]


async def test_unhealthy_logs_take_nothing(place: Place) -> None:
    async with place.log() as log:
        await append(log, b"a")
        await log.seal()
    for path in place.files():
        path.write_bytes(path.read_bytes()[:-1])
    async with place.log() as log:
        with pytest.raises(CorruptWal):
            await append(log, b"b")
        with pytest.raises(CorruptWal):
            await log.seal()
    for path in place.files():
        path.unlink()
    async with place.log() as log:
        with pytest.raises(WalLost) as lost:
            await append(log, b"b")
        assert lost.value.fields == {"lost_from_lsn": 1}


async def test_random_interleavings_keep_every_answer_true(place: Place) -> None:
    """Many callers, spans, seals and removals at once: each answer names its own records."""
    written: dict[int, bytes] = {}
    numbers = itertools.count()

    async def caller(log: WalLog, size: int) -> None:
        for _ in range(15):
            records = [b"%d" % next(numbers) * size for _ in range(1 + size % 4)]
            appended = await append(log, *records, per_entry=1)
            written.update(
                zip(range(appended.first_lsn, appended.last_lsn + 1), records, strict=True)
            )
            if size == 5:
                await log.seal()

    async with place.log(chunk_bytes=300) as log:
        await asyncio.gather(*(caller(log, size) for size in range(1, 12)))
        assert read_all(log) == written
        assert sorted(written) == list(range(1, len(written) + 1))
    async with place.log(chunk_bytes=300) as log:
        assert read_all(log) == written
