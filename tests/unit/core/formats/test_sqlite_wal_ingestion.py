"""Every rule of `POST …/wal` that is decided before the frames are looked at."""

from dataclasses import replace

import pytest

from app.core.formats.damage import Damage
from app.core.formats.sqlite_wal import WalPosition, parse_wal_header
from app.core.formats.sqlite_wal_ingestion import (
    HEAD_BYTES,
    AcceptFrom,
    AlreadyStored,
    IngestionState,
    NothingWhole,
    PageSizeMismatch,
    WalGap,
    WalRequest,
    decide_ingestion,
)
from app.core.formats.sqlite_wal_scanner import ScanEnd, WalScanner
from tests.helpers.sqlite_logs import log_of, real_log, some_commits, wal_database

PAGE = 512
FRAME = 24 + PAGE
EMPTY = IngestionState(page_size=PAGE, last_lsn=None)


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> tuple[bytes, bytes]:
    """A log and the one that SQLite wrote after it, neither with foreign frames."""
    path = tmp_path_factory.mktemp("logs") / "db"
    with wal_database(path, page_size=PAGE) as connection:
        some_commits(connection)
        first = log_of(path)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("INSERT INTO t VALUES (randomblob(2000))")
        return first, log_of(path)


@pytest.fixture(scope="module")
def first(logs) -> bytes:
    return logs[0]


@pytest.fixture(scope="module")
def second(logs) -> bytes:
    return logs[1]


def position_after(log: bytes, frames: int) -> WalPosition:
    at = 32 + (frames - 1) * FRAME
    return replace(
        parse_wal_header(log), offset=at + FRAME,
        checksum1=int.from_bytes(log[at + 16 : at + 20], "big"),
        checksum2=int.from_bytes(log[at + 20 : at + 24], "big"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def stored(first) -> IngestionState:
    """The first log was stored up to its second commit: one frame and two, say."""
    scanner = WalScanner(parse_wal_header(first), skip_bytes=32)
    scanner.feed(first[: 32 + 7 * FRAME])
    _, result = scanner.finish()
    return IngestionState(page_size=PAGE, last_lsn=70, position=result.position)


def decide(state, log, offset=0, *, after_lsn=None, length=None, known=True):
    body = log[offset:] if length is None else log[offset : offset + length]
    request = WalRequest(
        offset=offset, head=body[:HEAD_BYTES], after_lsn=after_lsn,
        body_bytes=len(body) if known else None,
    )  # fmt: skip
    return decide_ingestion(state, request)


# --- offset 0 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("after_lsn", [None, 0])
def test_an_empty_database_takes_a_log_from_its_start(first, after_lsn):
    assert decide(EMPTY, first, after_lsn=after_lsn) == AcceptFrom(
        position=parse_wal_header(first), skip_bytes=32, must_continue=False
    )


def test_an_empty_database_holds_no_state_that_a_log_could_start_from(first):
    assert decide(EMPTY, first, after_lsn=5) == WalGap(last_lsn=None, position=None)


def test_a_log_that_starts_from_the_last_lsn_is_taken(stored, second):
    assert decide(stored, second, after_lsn=70) == AcceptFrom(
        position=parse_wal_header(second), skip_bytes=32, must_continue=False
    )


@pytest.mark.parametrize("after_lsn", [None, 0, 69, 71])
def test_another_log_from_any_other_state_is_a_gap(stored, second, after_lsn):
    assert decide(stored, second, after_lsn=after_lsn) == WalGap(
        last_lsn=70, position=stored.position
    )


@pytest.mark.parametrize("after_lsn", [None, 12, 70])
@pytest.mark.parametrize("known", [True, False])
def test_the_same_log_sent_again_is_recognised_whatever_else_is_said(
    stored, first, after_lsn, known
):
    assert decide(stored, first, after_lsn=after_lsn, known=known) == AcceptFrom(
        position=stored.position, skip_bytes=stored.position.offset, must_continue=False
    )


def test_the_beginning_of_the_stored_log_is_stored(stored, first):
    found = decide(stored, first, length=32 + FRAME)
    assert found == AlreadyStored(position=stored.position)
    assert decide(stored, first, length=32) == found


def test_after_an_image_without_a_position_a_log_needs_the_images_lsn(first):
    after_image = IngestionState(page_size=PAGE, last_lsn=9)
    assert isinstance(decide(after_image, first, after_lsn=9), AcceptFrom)
    assert decide(after_image, first) == WalGap(last_lsn=9, position=None)
    assert decide(after_image, first, 32) == WalGap(last_lsn=9, position=None)


def test_another_page_size_is_said_before_a_gap(stored, tmp_path):
    log = real_log(tmp_path / "db", some_commits, page_size=1024)
    expected = PageSizeMismatch(stored=512, sent=1024)
    assert decide(EMPTY, log) == expected
    assert decide(stored, log) == expected


def test_a_header_that_is_cut_off_is_left_for_the_next_call(stored, first):
    for length in range(32):
        assert decide(EMPTY, first, length=length) == NothingWhole(offset=0, position=None)
    assert decide(stored, first, length=8) == NothingWhole(offset=0, position=stored.position)


def test_a_header_that_is_none_is_damage(stored):
    for state in (EMPTY, stored):
        with pytest.raises(Damage, match="magic"):
            decide(state, bytes(64))


# --- offset > 0 -------------------------------------------------------------------------------


def test_a_log_goes_on_where_it_ended(stored, first):
    assert decide(stored, first, stored.position.offset) == AcceptFrom(
        position=stored.position, skip_bytes=0, must_continue=True
    )


def test_resent_frames_are_skipped_and_the_rest_taken(stored, first):
    end = stored.position.offset
    for frames in range(1, stored.position.frames + 1):
        offset = end - frames * FRAME
        assert decide(stored, first, offset) == AcceptFrom(
            position=stored.position, skip_bytes=frames * FRAME, must_continue=False
        )
    assert decide(stored, first, 32, length=FRAME) == AlreadyStored(position=stored.position)


def test_a_body_that_ends_with_the_last_stored_frame_is_compared_with_it(stored, first):
    end = stored.position.offset
    found = decide(stored, first, end - FRAME, length=FRAME)
    assert isinstance(found, AcceptFrom)
    for damage, expected in ((0, ScanEnd.WHOLE), (1, ScanEnd.GAP)):
        body = bytearray(first[end - FRAME : end])
        body[16] ^= damage
        scanner = WalScanner(found.position, skip_bytes=found.skip_bytes)
        scanner.feed(body)
        _, result = scanner.finish()
        assert (result.end, result.frames) == (expected, 0)


def test_beyond_the_stored_end_is_a_gap(stored, first):
    gap = WalGap(last_lsn=70, position=stored.position)
    assert decide(stored, first, stored.position.offset + FRAME) == gap
    assert decide(EMPTY, first, 32) == WalGap(last_lsn=None, position=None)


def test_between_frames_is_a_gap(stored, first):
    gap = WalGap(last_lsn=70, position=stored.position)
    for offset in (1, 24, 31, 33, 32 + FRAME - 1, stored.position.offset + 1):
        assert decide(stored, first, offset) == gap


@pytest.mark.parametrize("after_lsn", [None, 70])
def test_frames_of_another_log_are_a_gap(stored, second, after_lsn):
    """`after_lsn` vouches for a log from its start, and for nothing else."""
    assert decide(stored, second, 32, after_lsn=after_lsn) == WalGap(
        last_lsn=70, position=stored.position
    )


def test_less_than_a_frame_header_says_nothing_but_where_the_log_ended(stored, first):
    end = stored.position.offset
    for length in range(24):
        assert decide(stored, first, end, length=length) == NothingWhole(
            offset=end, position=stored.position
        )
    assert isinstance(decide(stored, first, end - FRAME, length=5), WalGap)
    assert isinstance(decide(stored, first, end + FRAME, length=5), WalGap)
    assert isinstance(decide(EMPTY, first, 32, length=5), WalGap)


# --- logs that were replaced ------------------------------------------------------------------


@pytest.fixture(scope="module")
def moved_on(stored, second) -> IngestionState:
    return IngestionState(
        page_size=PAGE, last_lsn=80, position=position_after(second, 1),
        replaced_logs=(stored.position,),
    )  # fmt: skip


@pytest.mark.parametrize("offset", [0, 32, 32 + FRAME])
def test_a_late_repeat_for_a_replaced_log_is_stored_already(moved_on, stored, first, offset):
    end = stored.position.offset
    for stop in (end, end - FRAME):
        found = decide(moved_on, first, offset, length=stop - offset)
        assert found == AlreadyStored(position=stored.position)


@pytest.mark.parametrize("offset", [0, 32, 32 + FRAME])
def test_more_of_a_replaced_log_is_a_gap(moved_on, stored, first, offset):
    gap = WalGap(last_lsn=80, position=moved_on.position)
    assert decide(moved_on, first, offset, length=stored.position.offset - offset + 1) == gap
    assert decide(moved_on, first, offset, length=FRAME, known=False) == gap
    assert decide(moved_on, first, offset, after_lsn=80) == gap
    assert decide(moved_on, first, stored.position.offset) == gap


def test_behind_an_image_without_a_position_a_replaced_log_may_start_anew(stored, first):
    """Where the client says so, of the image's own LSN; otherwise it is a repetition, or a gap."""
    nowhere = IngestionState(page_size=PAGE, last_lsn=80, replaced_logs=(stored.position,))
    gap = WalGap(last_lsn=80, position=None)
    whole = AcceptFrom(position=parse_wal_header(first), skip_bytes=32, must_continue=False)
    end = stored.position.offset
    for length in (end, len(first)):
        assert decide(nowhere, first, 0, length=length, after_lsn=80) == whole
    for after_lsn in (None, 79, 81):
        repeat = decide(nowhere, first, 0, length=end, after_lsn=after_lsn)
        assert repeat == AlreadyStored(position=stored.position)
        assert decide(nowhere, first, 0, length=end + FRAME, after_lsn=after_lsn) == gap
    assert decide(nowhere, first, end, after_lsn=80) == gap


# --- together with the scanner ----------------------------------------------------------------


def test_a_client_that_repeats_and_overlaps_stores_each_frame_once(first):
    """Every body of whole frames, sent twice, from every offset that the state allows."""
    state = EMPTY
    kept = bytearray()
    for stop in range(32, len(first) + 1, FRAME):
        for offset in {0, 32, max(32, len(kept) + 32 - FRAME), len(kept) + 32}:
            if state.position is None and offset:
                continue
            body = first[offset:stop]
            decision = decide(state, first, offset, length=len(body))
            match decision:
                case AcceptFrom():
                    scanner = WalScanner(
                        decision.position, skip_bytes=decision.skip_bytes,
                        must_continue=decision.must_continue,
                    )  # fmt: skip
                    runs = scanner.feed(body)
                    last, result = scanner.finish()
                    assert result.end is ScanEnd.WHOLE
                    kept += b"".join(run.data for run in runs + last)[: result.frames * FRAME]
                    if result.frames:
                        lsn = (state.last_lsn or 0) + result.frames
                        state = replace(state, last_lsn=lsn, position=result.position)
                case AlreadyStored() | NothingWhole():
                    pass
                case _:
                    pytest.fail(f"{decision} for {offset}…{stop}")
    assert bytes(kept) == first[32:]
    assert state.last_lsn == len(kept) // FRAME
