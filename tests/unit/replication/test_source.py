"""One live file: the lock, the log, the image. All without a network."""

import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from app.replication import open_files
from app.replication.source import (
    LogMoved,
    NotFollowable,
    Source,
    SourceBusy,
    SourceProblem,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.db"


@pytest.fixture
def application(path):
    with closing(sqlite3.connect(path, isolation_level=None, timeout=0)) as connection:
        connection.execute("PRAGMA page_size=1024")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE t (a)")
        yield connection


@pytest.fixture
def source(path, application):
    source = Source.open_blocking(path)
    source.take_lock_blocking()
    yield source
    source.close_blocking()


def insert(application, count=1):
    for _ in range(count):
        application.execute("INSERT INTO t VALUES (randomblob(3000))")


def image_of(source):
    image = source.image_blocking()
    pieces, at = [], 0
    while piece := source.read_image_blocking(image, at):
        pieces.append(piece)
        at += len(piece)
    return image, b"".join(pieces)


def content(application):
    """The pages as SQLite itself serialises them."""
    return application.serialize()


def test_nobody_restarts_the_log_while_the_lock_is_held(source, application):
    salts = source.lock.salts
    insert(application, 5)
    for _ in range(3):
        application.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        insert(application, 3)
    log = source.log_blocking()
    assert log.salts == salts
    source.let_go_blocking()
    application.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    insert(application)
    assert source.log_blocking().salts != salts


def test_a_copied_log_is_restarted_once_and_not_again(source, application):
    insert(application, 5)
    before = source.log_blocking()
    carried = source.sqlite_checkpoint_blocking(
        salts=before.salts, offset=before.end, carried_bytes_max=0
    )
    assert carried is not None
    assert source.lock.end == before.end
    insert(application)
    first = source.log_blocking()
    assert first.salts[0] == before.salts[0] + 1
    for _ in range(3):
        application.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        insert(application)
    assert source.log_blocking().salts == first.salts


def test_frames_not_yet_sent_are_carried_across(source, application):
    insert(application, 2)
    offset = source.log_blocking().end
    insert(application, 2)
    log = source.log_blocking()
    expected = source.read_log_blocking(log.salts, offset, log.end)
    assert not source.sqlite_checkpoint_blocking(
        salts=log.salts, offset=offset, carried_bytes_max=10
    )
    assert source.lock is not None
    carried = source.sqlite_checkpoint_blocking(
        salts=log.salts, offset=offset, carried_bytes_max=1 << 20
    )
    insert(application)
    assert carried.data == expected
    with pytest.raises(LogMoved):
        source.read_log_blocking(log.salts, offset, log.end)


def test_an_uncommitted_frame_is_not_part_of_the_log(source, application):
    insert(application)
    end = source.log_blocking().end
    application.execute("PRAGMA cache_size=5")
    application.execute("BEGIN")
    insert(application, 50)
    assert Path(f"{source.path}-wal").stat().st_size > end
    assert source.log_blocking().end == end
    application.execute("ROLLBACK")


@pytest.mark.parametrize("copied", [False, True])
def test_an_image_is_one_commit_whatever_happens_meanwhile(source, application, copied):
    insert(application, 20)
    if copied:
        log = source.log_blocking()
        source.sqlite_checkpoint_blocking(salts=log.salts, offset=log.end, carried_bytes_max=0)
    expected = content(application)
    image = source.image_blocking()
    assert bool(image.frames_of_pages) is not copied
    application.execute("UPDATE t SET a = randomblob(2000)")
    application.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    insert(application, 30)
    application.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
    got = b""
    while piece := source.read_image_blocking(image, len(got)):
        got += piece
    assert got == expected
    assert content(application) != expected


def test_an_image_of_an_empty_log(path):
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE t (a)")
    expected = path.read_bytes()
    source = Source.open_blocking(path)
    try:
        image, got = image_of(source)
        assert (image.log.frames, image.log.end, image.log.page_size) == (0, 0, 4096)
        assert got == expected
    finally:
        source.close_blocking()


def test_closing_leaves_the_log_where_it_is(path):
    """An application's last connection would copy the log and delete it."""
    source = None
    with closing(sqlite3.connect(path, isolation_level=None)) as application:
        application.execute("PRAGMA journal_mode=WAL")
        application.execute("CREATE TABLE t (a)")
        source = Source.open_blocking(path)
        source.take_lock_blocking()
    log = source.log_blocking()
    source.close_blocking()
    again = Source.open_blocking(path)
    assert again.log_blocking() == log
    assert log.frames > 0
    again.close_blocking()


def test_the_checksums_of_a_frame(source, application):
    insert(application)
    log = source.log_blocking()
    assert source.checksums_at_blocking(log, log.end) == log.checksums
    assert source.checksums_at_blocking(log, log.end - 1) is None
    assert source.checksums_at_blocking(log, log.end + log.frame_bytes) is None
    assert source.checksums_at_blocking(log, 0) is None


def test_a_writer_that_keeps_its_lock_is_in_the_way_of_a_checkpoint_alone(
    source, application, monkeypatch
):
    monkeypatch.setattr("app.replication.source.WRITE_LOCK_TRIES", 3)
    insert(application)
    expected = content(application)
    application.execute("BEGIN IMMEDIATE")
    application.execute("INSERT INTO t VALUES (randomblob(3000))")
    log, lock = source.log_blocking(), source.lock
    with pytest.raises(SourceBusy, match="locked"):
        source.sqlite_checkpoint_blocking(salts=log.salts, offset=log.end, carried_bytes_max=0)
    assert source.lock is lock, "the lock that was held is held on"
    image, got = image_of(source)
    assert (image.log.end, got) == (log.end, expected)
    source.let_go_blocking()
    source.take_lock_blocking()
    assert source.lock == log
    application.execute("ROLLBACK")


def test_a_writer_without_a_pause_is_kept_out_for_a_moment(source, application, monkeypatch):
    """Where the log never stands still, the lock is taken with writers locked out."""
    insert(application)
    source.let_go_blocking()
    look = source.log_blocking

    def look_and_write():
        try:
            insert(application)
        except sqlite3.OperationalError as error:
            assert error.sqlite_errorcode == sqlite3.SQLITE_BUSY  # noqa: PT017
        return look()

    monkeypatch.setattr(source, "log_blocking", look_and_write)
    source.take_lock_blocking()
    monkeypatch.undo()
    assert source.lock == source.log_blocking()


def test_an_image_of_a_log_that_another_one_copies_and_restarts(source, application, monkeypatch):
    """Between the lock and the look at the log that follows it."""
    insert(application, 5)
    log = source.log_blocking()
    assert source.sqlite_checkpoint_blocking(salts=log.salts, offset=log.end, carried_bytes_max=0)
    expected = content(application)
    hand_over = source._is_handed_over

    def hand_over_and_write(before):
        done = hand_over(before)
        insert(application, 20)
        return done

    monkeypatch.setattr(source, "_is_handed_over", hand_over_and_write)
    image, got = image_of(source)
    assert image.log.end == log.end
    assert source.log_blocking().salts != log.salts, "it was restarted"
    assert got == expected


def test_a_log_that_was_cut_is_no_image(source, application, path):
    insert(application, 5)
    os.truncate(f"{path}-wal", source.log_blocking().end - 100)
    with pytest.raises(OSError, match="cut"):
        source.image_blocking()


def test_an_index_that_is_half_written_is_mended(source, application, path):
    first = os.pread(source._index_fd, 48, 0)
    insert(application)
    log = source.log_blocking()
    index = os.open(f"{path}-shm", os.O_RDWR)  # left open: closing it drops SQLite's locks
    os.pwrite(index, first, 0)
    assert source.log_blocking() is None
    source.mend_index_blocking()
    assert source.log_blocking() == log


def test_what_cannot_be_followed(tmp_path, path):
    with pytest.raises(SourceProblem, match="No such file"):
        Source.open_blocking(path)
    path.touch()
    with pytest.raises(SourceProblem, match="empty"):
        Source.open_blocking(path)
    path.write_bytes(b"x" * 4096)
    with pytest.raises(NotFollowable, match="not a SQLite database"):
        Source.open_blocking(path)
    old = tmp_path / "old.db"
    with closing(sqlite3.connect(old)) as connection:
        connection.execute("CREATE TABLE t (a)")
    with pytest.raises(NotFollowable, match="WAL mode"):
        Source.open_blocking(old)
    Source.open_blocking(old, set_wal=True).close_blocking()
    assert old.read_bytes()[18:20] == b"\x02\x02"


def test_a_file_is_followed_once_under_whatever_name(source, application, path, tmp_path):
    """Closing a second descriptor of it would drop the lock of the first, unnoticed."""
    insert(application)
    salts = source.lock.salts
    other = tmp_path / "b.db"
    other.hardlink_to(path)
    for name in (path, other):
        with pytest.raises(SourceProblem, match="followed already"):
            Source.open_blocking(name)
    application.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    insert(application)
    assert source.log_blocking().salts == salts, "its lock is there"
    source.close_blocking()
    again = Source.open_blocking(path)
    again.close_blocking()


def test_looking_into_a_file_that_is_renamed_at_that_moment_keeps_its_lock(
    source, application, path, monkeypatch
):
    insert(application)
    salts = source.lock.salts
    monkeypatch.setattr(open_files, "file_id", lambda _: None)  # as it was before the rename
    assert open_files.begins_with_blocking(path, b"whatever it holds")
    monkeypatch.undo()
    for _ in range(2):
        application.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        insert(application)
    assert source.log_blocking().salts == salts, "its lock is there"


TRUNCATE = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], timeout=20)
print(connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0])
"""


def test_another_process_that_waits_for_the_log_gets_it(source, application, path):
    """As sqld does when it starts after a crash: without it, it does not start."""
    insert(application, 2)
    offset = source.log_blocking().end
    insert(application, 5)
    source.take_lock_blocking()
    before = source.lock
    expected = source.read_log_blocking(before.salts, offset, before.end)
    assert source.waiting_pid_blocking() is None
    with subprocess.Popen([sys.executable, "-c", TRUNCATE, path], stdout=subprocess.PIPE) as child:
        deadline = time.monotonic() + 20
        while child.poll() is None and time.monotonic() < deadline:
            is_free = source.lock.backfilled == source.lock.frames
            if source.waiting_pid_blocking() == child.pid and not is_free:
                carried = step_aside(source, before, offset)
                if carried is None:
                    break  # it has the log already
                assert (carried.data, carried.end) == (expected, before.end)
            assert source.lock.salts == before.salts
            assert source.lock.end == before.end
            time.sleep(0.01)
        assert child.communicate(timeout=20)[0] == b"0\n", "not busy"
    assert source.log_blocking().frames == 0
    insert(application)
    assert source.log_blocking().salts != before.salts
    assert source.lock.end == before.end, "the new log follows it"


def test_stepping_aside_never_lets_go_of_the_log(source, application, path, monkeypatch):
    """Whatever happens between the looks at it: here, somebody truncates it each time."""
    insert(application, 3)
    source.take_lock_blocking()
    before = source.lock
    look = source.log_blocking

    def look_and_truncate():
        seen = look()
        application.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return seen

    monkeypatch.setattr(source, "log_blocking", look_and_truncate)
    for _ in range(3):
        if step_aside(source, before, before.end) is None:
            break
    monkeypatch.undo()
    assert source.lock.end == before.end
    assert source.lock.salts == before.salts
    insert(application)
    first = source.log_blocking().salts
    assert first != before.salts, "it was restarted"
    application.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    insert(application)
    assert source.log_blocking().salts == first, "once, and not again: nothing was missed"


def test_a_log_that_grows_meanwhile_is_not_stepped_aside_of(source, application, monkeypatch):
    insert(application, 3)
    source.take_lock_blocking()
    before = source.lock
    look = source.log_blocking

    def look_and_write():
        insert(application)
        return look()

    monkeypatch.setattr(source, "log_blocking", look_and_write)
    assert step_aside(source, before, before.end) is None
    assert source.lock == before
    monkeypatch.undo()
    assert step_aside(source, before, before.end, at_most=10) is None, "too much to carry"
    carried = step_aside(source, before, before.end)
    assert source.lock.end == carried.end == source.log_blocking().end


def step_aside(source, log, offset, at_most=1 << 20):
    return source.step_aside_blocking(salts=log.salts, offset=offset, carried_bytes_max=at_most)


def test_a_writer_alone_is_not_waited_for(source, application, path):
    insert(application, 5)
    write = (
        "import sqlite3, sys; connection = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "connection.execute('BEGIN IMMEDIATE'); print('in', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", write, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout.readline() == b"in\n"
        assert source.waiting_pid_blocking() is None
        child.stdin.close()
