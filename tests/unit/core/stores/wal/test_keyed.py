"""Fault row 55: an idempotency key replayed during and after the first has one effect."""

import asyncio
import shutil
from pathlib import Path

import pytest

from app.core.base.errors import IdempotencyKeyReused, ManifestFull
from app.core.formats.segment import EntryFlag, EntryHeader, EntryType
from app.core.stores.wal.log import RememberedAppend
from app.core.stores.wal.remembered import REMEMBERED_COUNT_MAX, RememberedAppends
from app.core.stores.wal.tail_scan import KeyedRequests
from tests.helpers.fake_clock import FakeClock
from tests.unit.core.stores.wal.builders import (
    Place,
    append,
    append_together,
    read_all,
    request,
    settled,
)

DAY_SECONDS = 24 * 3600


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def place(tmp_path: Path, clock: FakeClock) -> Place:
    return Place(root=tmp_path / "wal", clock=clock)


async def test_a_replay_gets_the_first_answer(place: Place) -> None:
    async with place.log() as log:
        first = await append(log, b"a", b"b", key=b"k")
        again = await append(log, b"a", b"b", key=b"k")
        assert (first.replayed, again.replayed) == (False, True)
        assert (again.first_lsn, again.last_lsn, again.count, again.payload_bytes) == (1, 2, 2, 10)
        assert log.next_lsn == 3


async def test_a_replay_waits_for_the_first(place: Place) -> None:
    async with place.log() as log:
        first, second = await append_together(log, request(b"a", key=b"k"), request(b"a", key=b"k"))
        assert (first.first_lsn, second.first_lsn) == (1, 1)
        assert (first.replayed, second.replayed) == (False, True)
        assert log.next_lsn == 2


async def test_either_may_leave_without_taking_the_other_along(place: Place) -> None:
    async with place.log() as log:
        tasks = [asyncio.ensure_future(append(log, b"a", key=b"k")) for _ in range(3)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        tasks[1].cancel()
        assert (await tasks[2]).first_lsn == 1
        assert tasks[0].cancelled()
        assert (await append(log, b"a", key=b"k")).replayed


async def test_another_body_under_the_same_key_is_refused(place: Place) -> None:
    async with place.log() as log:
        during = await append_together(
            log, request(b"a", key=b"k"), request(b"x", key=b"k", body=b"other")
        )
        assert isinstance(during[1], IdempotencyKeyReused)
        with pytest.raises(IdempotencyKeyReused):
            await append(log, b"x", key=b"k", body=b"other")
        assert log.next_lsn == 2


async def test_a_replay_is_not_held_to_if_match(place: Place) -> None:
    async with place.log() as log:
        await append(log, b"a", key=b"k", expected=1)
        assert (await append(log, b"a", key=b"k", expected=1)).replayed


async def test_a_failed_first_is_no_answer(place: Place) -> None:
    async with place.log() as log:
        place.catalog.refusals.append(ManifestFull())
        failed = await append_together(log, request(b"a", key=b"k"), request(b"a", key=b"k"))
        assert [type(one) for one in failed] == [ManifestFull, ManifestFull]
        assert not (await append(log, b"a", key=b"k")).replayed


async def test_keys_outlive_a_restart(place: Place) -> None:
    async with place.log(chunk_bytes=10) as log:
        await append(log, b"spans", b"three", b"segments", key=b"long", per_entry=1)
        await append(log, b"tail", key=b"tail")
        await append(log, b"plain")
        await settled(log)
    for _ in range(2):
        async with place.log(chunk_bytes=10) as log:
            again = await append(log, b"", key=b"long")
            assert again.replayed
            assert (again.first_lsn, again.last_lsn, again.payload_bytes) == (1, 3, 30)
            assert (await append(log, b"", key=b"tail")).first_lsn == 4
            with pytest.raises(IdempotencyKeyReused):
                await append(log, b"", key=b"tail", body=b"other")
            assert log.next_lsn == 6
            await log.seal()


async def test_a_torn_keyed_append_is_not_remembered(place: Place) -> None:
    async with place.log() as log:
        await append(log, b"a")
        await append(log, b"b", key=b"k")
    path = place.files()[0]
    path.write_bytes(path.read_bytes()[:-1])
    async with place.log() as log:
        assert not (await append(log, b"b", key=b"k")).replayed
        assert read_all(log) == {1: b"a", 2: b"b"}


async def test_keys_outlive_their_segment_in_the_manifest(place: Place) -> None:
    async with place.log(chunk_bytes=10) as log:
        await append(log, b"begins in", b"the first", key=b"k", per_entry=1)
        await append(log, b"own", key=b"own")
        await log.seal()
        kept = log.remembered_of(1)
        assert [append.last_lsn for append in kept] == [2]
        assert log.remembered_of(2) == ()
        assert [append.first_lsn for append in log.remembered_of(3)] == [3]
        place.catalog.checkpoint(1)
        assert await log.remove([1]) == (1,)
        del place.catalog.rows[7][1]
    async with place.log(chunk_bytes=10, remembered=kept) as log:
        again = await append(log, b"", key=b"k")
        assert (again.first_lsn, again.last_lsn, again.replayed) == (1, 2, True)
        assert (await append(log, b"", key=b"own")).replayed
        assert [append.first_lsn for append in log.remembered_of(3)] == [3]
    shutil.rmtree(place.root)


async def test_keys_are_forgotten_after_a_day_of_monotonic_time(
    place: Place, clock: FakeClock
) -> None:
    async with place.log() as log:
        await append(log, b"a", key=b"k")
        clock.jump_wall(10 * DAY_SECONDS)  # decides nothing
        clock.advance(DAY_SECONDS - 1)
        assert (await append(log, b"a", key=b"k")).replayed
        clock.advance(2)
        assert not (await append(log, b"a", key=b"k")).replayed


async def test_age_counts_over_a_restart(place: Place, clock: FakeClock) -> None:
    async with place.log() as log:
        await append(log, b"a", key=b"old")
        clock.advance(DAY_SECONDS / 2)
        await append(log, b"b", key=b"new")
    clock.advance(DAY_SECONDS / 2 + 1)
    async with place.log() as log:
        assert (await append(log, b"b", key=b"new")).replayed
        assert not (await append(log, b"a", key=b"old")).replayed


def test_only_the_newest_are_kept(clock: FakeClock) -> None:
    remembered = RememberedAppends(clock, count_max=3)
    for number in range(5):
        remembered.add(
            RememberedAppend(
                key_hash=b"%d" % number, body_hash=b"", first_lsn=number, last_lsn=number,
                payload_bytes=4, appended_at_us=0,
            ),
            segment_id=1,
        )  # fmt: skip
    assert [remembered.get(b"%d" % number) is None for number in range(5)] == [
        True, True, False, False, False,
    ]  # fmt: skip
    assert [append.first_lsn for append in remembered.of_segment(1)] == [2, 3, 4]
    assert len(remembered) == 3


def test_recovery_holds_the_newest_keys_of_a_wal_that_has_many() -> None:
    requests = KeyedRequests()
    count = 3 * REMEMBERED_COUNT_MAX
    for lsn in range(1, count + 1):
        header = EntryHeader(
            type=EntryType.RECORDS, flags=EntryFlag.BEGINS | EntryFlag.ENDS | EntryFlag.KEYED,
            first_lsn=lsn, count=1, payload_bytes=5, durable_lsn=0, appended_at_us=0,
            key_hash=lsn.to_bytes(16, "big"),
        )  # fmt: skip
        requests.add(header, segment_id=1)
    found = [one.append.first_lsn for one in requests.found]
    assert found == list(range(count - 2 * REMEMBERED_COUNT_MAX + 1, count + 1))
