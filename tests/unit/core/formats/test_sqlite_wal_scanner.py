"""The scanner over logs that SQLite wrote, whole, torn, damaged and cut into any pieces."""

import sqlite3
import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.formats.sqlite_wal import parse_wal_header
from app.core.formats.sqlite_wal_scanner import ScanEnd, WalScanner
from tests.helpers.sqlite_logs import (
    commit_sizes,
    frame_offsets,
    log_of,
    newest_pages,
    real_log,
    reencoded,
    slow_scan,
    some_commits,
    wal_database,
)

FRAME = 24 + 512


def scan(log, *, position=None, offset=0, skip=32, must_continue=False, pieces=None, block=1 << 20):
    scanner = WalScanner(
        position or parse_wal_header(log),
        skip_bytes=skip, must_continue=must_continue, block_bytes=block,
    )  # fmt: skip
    body = memoryview(log)[offset:]
    runs = []
    for piece in pieces or [len(body)]:
        runs += scanner.feed(body[:piece])
        body = body[piece:]
    runs += scanner.feed(body)
    last, result = scanner.finish()
    return runs + last, result


def raw(runs) -> bytes:
    return b"".join(run.data for run in runs)


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> bytes:
    return real_log(tmp_path_factory.mktemp("log") / "db", some_commits, page_size=512)


@pytest.fixture(scope="module")
def orders(log) -> dict[str, bytes]:
    return {"little": log, "big": reencoded(log, "big")}


def assert_as_slow(log, **arguments):
    start, must = arguments.get("start", 32), arguments.get("must_continue", False)
    end, verified, committed = slow_scan(log, start=start, must_continue=must)
    runs, result = scan(log)
    assert result.end is end
    assert (sum(map(len, runs)), result.frames, result.frame) == (verified, committed, verified + 1)
    assert raw(runs) == log[32 : 32 + len(raw(runs))]
    assert result.position.offset == 32 + committed * (24 + result.position.page_size)
    return result


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("page_size", [512, 1024, 4096, 65536])
def test_a_log_that_sqlite_wrote_is_verified_whole(tmp_path, page_size, order):
    log = real_log(tmp_path / "db", some_commits, page_size=page_size)
    log = reencoded(log, order) if order == "big" else log
    result = assert_as_slow(log)
    sizes = commit_sizes(log)
    assert (result.end, result.commits, result.page_count) == (ScanEnd.WHOLE, 4, sizes[-1])
    last = frame_offsets(log)[-1]
    assert result.position == replace(
        parse_wal_header(log), offset=len(log),
        checksum1=struct.unpack_from(">I", log, last + 16)[0],
        checksum2=struct.unpack_from(">I", log, last + 20)[0],
    )  # fmt: skip


def test_runs_say_what_their_frames_say(log):
    runs, _ = scan(log, block=3 * FRAME)
    assert [len(run) for run in runs[:-1]] == [3] * (len(runs) - 1)
    for run in runs:
        for index in range(len(run)):
            at = run.offset + index * FRAME
            assert struct.unpack_from(">2I", log, at) == (
                run.page_nos[index], run.commit_sizes[index],
            )  # fmt: skip
            assert run.page(index) == log[at + 24 : at + FRAME]
    first = runs[0]
    assert first.frames(1, 3) == log[32 + FRAME : 32 + 3 * FRAME]
    assert first.committed == max((i + 1 for i in range(3) if first.commit_sizes[i]), default=0)


def rebuilt(before: bytes, log: bytes, page_size: int) -> bytes:
    """The database after a checkpoint, made from the file before and the newest pages."""
    runs, result = scan(log)
    page_nos = np.concatenate([run.page_nos for run in runs])[: result.frames]
    image = bytearray(before.ljust(result.page_count * page_size, b"\0"))
    frames = raw(runs)
    for index in newest_pages(page_nos, page_count=result.page_count, page_size=page_size):
        at = index * (24 + page_size) + 24
        start = (int(page_nos[index]) - 1) * page_size
        image[start : start + page_size] = frames[at : at + page_size]
    return bytes(image[: result.page_count * page_size])


def fill(connection: sqlite3.Connection) -> None:
    connection.execute("CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY, x)")
    for size in (10, 5_000, 300_000, 70_000):
        connection.execute("INSERT INTO t (x) VALUES (randomblob(?))", (size,))


def rolled_back(connection: sqlite3.Connection) -> None:
    fill(connection)
    connection.execute("BEGIN")
    fill(connection)  # spills into the log, then is overwritten
    connection.execute("ROLLBACK")
    connection.execute("INSERT INTO t (x) VALUES (randomblob(9000))")


def vacuumed(connection: sqlite3.Connection) -> None:
    fill(connection)
    connection.execute("DELETE FROM t WHERE id > 1")
    connection.execute("VACUUM")


def shrunk_by_itself(connection: sqlite3.Connection) -> None:
    fill(connection)
    connection.execute("DELETE FROM t WHERE id > 1")
    connection.execute("INSERT INTO t (x) VALUES (1)")


@pytest.mark.parametrize("auto_vacuum", [0, 1])
@pytest.mark.parametrize("page_size", [512, 4096, 65536])
@pytest.mark.parametrize("steps", [fill, rolled_back, vacuumed, shrunk_by_itself])
def test_newest_pages_of_a_log_are_what_sqlite_checkpoints(tmp_path, steps, page_size, auto_vacuum):
    path = tmp_path / "db"
    with wal_database(path, page_size=page_size, auto_vacuum=auto_vacuum) as connection:
        fill(connection)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        before = path.read_bytes()
        steps(connection)
        log = log_of(path)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        assert rebuilt(before, log, page_size) == path.read_bytes()


def test_auto_vacuum_leaves_frames_above_the_commits_database_size(tmp_path):
    """The case the dropping of pages is for does occur."""
    log = real_log(tmp_path / "db", shrunk_by_itself, page_size=512, auto_vacuum=1)
    runs, result = scan(log)
    assert np.concatenate([run.page_nos for run in runs]).max() > result.page_count


@pytest.mark.parametrize("order", ["little", "big"])
def test_a_tail_torn_at_every_byte_is_left_for_the_next_call(orders, order):
    log = orders[order]
    sizes = commit_sizes(log)
    for length in range(32, len(log)):
        _, result = scan(log[:length])
        whole, rest = divmod(length - 32, FRAME)
        committed = max((n for n in range(whole + 1) if n and sizes[n - 1]), default=0)
        assert result.end is (ScanEnd.TORN if rest else ScanEnd.WHOLE)
        assert (result.frames, result.position.offset) == (committed, 32 + committed * FRAME)
        assert result.page_count == (sizes[committed - 1] if committed else None)


def test_a_last_frame_of_the_right_length_but_half_written_is_a_torn_tail(log):
    for kept in range(0, FRAME, 37):
        torn = log[: len(log) - FRAME + kept].ljust(len(log), b"\xff")
        result = assert_as_slow(torn)
        assert result.end is (ScanEnd.TORN if kept >= 16 else ScanEnd.LOG_ENDED)


def test_a_flipped_bit_in_any_frame(log):
    """Found wherever it is; of a frame that a later commit builds on, it is no torn tail."""
    ends = set()
    last = len(frame_offsets(log))
    for number, at in enumerate(frame_offsets(log), start=1):
        for byte in (0, 3, 4, 7, 8, 15, 16, 19, 20, 23, 24, 25, 300, FRAME - 1):
            damaged = bytearray(log)
            damaged[at + byte] ^= 1 << byte % 8
            result = assert_as_slow(bytes(damaged))
            assert result.frame == number
            ends.add(result.end)
            if byte >= 24 and number < last:
                assert result.end is ScanEnd.INVALID
            if number == last:
                assert result.end is (ScanEnd.LOG_ENDED if 8 <= byte < 16 else ScanEnd.TORN)
    assert ends == {ScanEnd.INVALID, ScanEnd.TORN, ScanEnd.LOG_ENDED}


@pytest.mark.parametrize("block", [1, 2 * FRAME, 1 << 20])
def test_damage_is_seen_as_such_across_blocks(log, block):
    damaged = bytearray(log)
    damaged[32 + 40] ^= 1
    runs, result = scan(damaged, block=block)
    assert (runs, result.end, result.frame, result.frames) == ([], ScanEnd.INVALID, 1, 0)


def test_a_failed_frame_without_a_commit_after_it_is_a_torn_tail(log):
    last = [n for n, size in enumerate(commit_sizes(log)) if size][-2:]
    damaged = bytearray(log[: 32 + last[1] * FRAME])  # all but the commit frame of the last
    damaged[32 + (last[0] + 1) * FRAME + 99] ^= 1
    result = assert_as_slow(bytes(damaged))
    assert (result.end, result.frames) == (ScanEnd.TORN, last[0] + 1)


def test_a_page_number_of_zero_is_no_frame(log):
    """Even where it chains, as SQLite has it."""
    numbered = bytearray(log)
    numbered[32:36] = bytes(4)
    result = assert_as_slow(reencoded(bytes(numbered), "little"))
    assert (result.end, result.frame) == (ScanEnd.INVALID, 1)


def test_frames_of_an_older_log_end_the_log(tmp_path):
    path = tmp_path / "db"
    with wal_database(path, page_size=512) as connection:
        some_commits(connection)
        connection.execute("PRAGMA wal_checkpoint(RESTART)")
        old = log_of(path)
        connection.execute("INSERT INTO t VALUES (2)")
        log = log_of(path)
    assert len(log) == len(old)
    assert log[-FRAME:] == old[-FRAME:]
    result = assert_as_slow(log)
    assert (result.end, result.commits) == (ScanEnd.LOG_ENDED, 1)
    scanner = WalScanner(parse_wal_header(log), skip_bytes=32, block_bytes=1)
    scanner.feed(log)
    assert scanner.ended


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pieces_and_blocks_of_any_size_give_the_same(log, data):
    damaged = bytearray(log)
    if data.draw(st.booleans(), label="damage it"):
        damaged[data.draw(st.integers(32, len(log) - 1), label="at")] ^= 1
    damaged = bytes(damaged[: data.draw(st.integers(32, len(log)), label="length")])
    pieces = data.draw(st.lists(st.integers(0, 3 * FRAME), max_size=30), label="pieces")
    block = data.draw(st.sampled_from([1, FRAME, 2 * FRAME + 5, 1 << 20]), label="block")
    expected_runs, expected = scan(damaged)
    runs, result = scan(damaged, pieces=pieces, block=block)
    assert result == expected
    assert raw(runs) == raw(expected_runs)
    end, verified, committed = slow_scan(damaged)
    assert (result.end, sum(map(len, runs)), result.frames) == (end, verified, committed)


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("told", [True, False])
def test_a_log_goes_on_from_any_commit(orders, order, told):
    """Also where nobody told the byte order, as with an image's position."""
    log = orders[order]
    _, whole = scan(log)
    for number, size in enumerate(commit_sizes(log), start=1):
        if size == 0 or 32 + number * FRAME == len(log):
            continue
        _, part = scan(log[: 32 + number * FRAME])
        position = part.position if told else replace(part.position, order=None)
        _, rest = scan(log, position=position, offset=position.offset, skip=0, must_continue=True)
        assert (rest.position, rest.page_count) == (whole.position, whole.page_count)
        assert (rest.frames, rest.frame) == (whole.frames - number, whole.frame)
        assert rest.end is ScanEnd.WHOLE


def second_commit(log) -> int:
    return 32 + (np.flatnonzero(commit_sizes(log))[1] + 1).item() * FRAME


def test_a_first_frame_that_does_not_continue_is_a_gap(log):
    end = second_commit(log)
    _, part = scan(log[:end])
    for byte in (0, 9, 17, 30):  # page number, salts, checksum, page
        damaged = bytearray(log)
        damaged[end + byte] ^= 1
        runs, result = scan(damaged, position=part.position, offset=end, skip=0, must_continue=True)
        assert (runs, result.end, result.position) == ([], ScanEnd.GAP, part.position)
    for later in range(end + FRAME, len(log), FRAME):
        _, result = scan(log, position=part.position, offset=later, skip=0, must_continue=True)
        assert result.end is ScanEnd.GAP


def test_nothing_after_the_position_is_no_gap(log):
    _, part = scan(log[: second_commit(log)])
    for length in (0, 1, FRAME - 1):
        end = part.position.offset
        _, result = scan(
            log[: end + length], position=part.position, offset=end, skip=0, must_continue=True
        )
        assert result.end is (ScanEnd.TORN if length else ScanEnd.WHOLE)
        assert (result.frames, result.position) == (0, part.position)


@pytest.mark.parametrize("offset", [0, 32, 32 + FRAME, 32 + 2 * FRAME])
@pytest.mark.parametrize("piece", [1, 7, FRAME, 1 << 20])
def test_resent_frames_are_skipped(log, offset, piece):
    end = second_commit(log)
    _, part = scan(log[:end])
    pieces = [piece] * (len(log) // piece)
    runs, result = scan(
        log, position=part.position, offset=offset, skip=end - offset, pieces=pieces
    )
    assert raw(runs) == log[end:]
    assert result.position.offset == len(log)
    assert runs[0].offset == end


@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_resent_frames_of_another_history_are_a_gap(log, piece):
    """Same salts, other frames: a power loss took commits back that were stored here."""
    end = second_commit(log)
    _, part = scan(log[:end])
    other = bytearray(log)
    other[32 + 50] ^= 1
    other = reencoded(bytes(other), "little")
    pieces = [piece] * (len(log) // piece)
    runs, result = scan(other, position=part.position, skip=end, pieces=pieces)
    assert (runs, result.end, result.position) == ([], ScanEnd.GAP, part.position)


@given(st.binary(max_size=3000), st.booleans())
def test_hostile_bytes_are_never_frames(log, body, must_continue):
    runs, result = scan(body, position=parse_wal_header(log), skip=0, must_continue=must_continue)
    assert (runs, result.frames, result.page_count) == ([], 0, None)


def test_each_run_owns_its_bytes(log):
    runs, _ = scan(log, block=FRAME)
    assert raw(runs) == log[32:]
    assert len({id(run.data.obj) for run in runs}) == len(runs)


def test_its_repr_says_how_far_it_is(log):
    scanner = WalScanner(parse_wal_header(log), skip_bytes=32)
    assert repr(scanner) == "<WalScanner scanning frames=0 committed=32>"
    scanner.feed(log)
    scanner.finish()
    assert repr(scanner).startswith("<WalScanner whole frames=")
