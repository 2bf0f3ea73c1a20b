"""Putting a restored file in its place, where something is in the way."""

import errno
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from app.replication import restore as module
from app.replication.posix_locks import user_blocking
from app.replication.restore import DatabaseInUse, TargetExists


@pytest.fixture
def part(tmp_path):
    part = tmp_path / ".a.db.x.part"
    part.write_bytes(b"new")
    return part


@pytest.fixture
def target(tmp_path):
    return tmp_path / "a.db"


def put(part, target, *, replace):
    module._put_in_place_blocking(part, target, replace)


def names(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def fail(code):
    def failing(*_):
        raise OSError(code, os.strerror(code))

    return failing


def test_all_of_the_old_database_goes(part, target, tmp_path):
    for suffix in ("", "-wal", "-shm", "-journal"):
        Path(f"{target}{suffix}").write_bytes(b"old")
    put(part, target, replace=True)
    assert names(tmp_path) == {"a.db": b"new"}


def test_a_file_that_cannot_be_replaced_keeps_its_log(part, target, tmp_path, monkeypatch):
    """As one that is mounted by itself: its commits may all be in the log."""
    for suffix in ("", "-wal", "-shm"):
        Path(f"{target}{suffix}").write_bytes(suffix.encode() or b"old")
    before = names(tmp_path)
    monkeypatch.setattr(Path, "replace", fail(errno.EBUSY))
    with pytest.raises(OSError, match="busy"):
        put(part, target, replace=True)
    assert names(tmp_path) == before


def test_a_log_that_cannot_go_leaves_the_others(part, target, tmp_path, monkeypatch):
    for suffix in ("", "-wal", "-shm"):
        Path(f"{target}{suffix}").write_bytes(suffix.encode() or b"old")
    before = names(tmp_path)
    rename = Path.rename

    def fail_for_the_index(path, to):
        if path.name.endswith("db-shm"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fail_for_the_index)
    with pytest.raises(OSError, match="busy"):
        put(part, target, replace=True)
    assert names(tmp_path) == before


def test_what_came_meanwhile_is_not_replaced(part, target, tmp_path):
    target.write_bytes(b"other")
    with pytest.raises(TargetExists):
        put(part, target, replace=False)
    assert names(tmp_path)["a.db"] == b"other"


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_file_systems_without_hard_links_will_do(part, target, tmp_path, monkeypatch, code):
    monkeypatch.setattr(os, "link", fail(code))
    put(part, target, replace=False)
    assert names(tmp_path) == {"a.db": b"new"}


def test_other_trouble_with_links_is_told(part, target, monkeypatch):
    monkeypatch.setattr(os, "link", fail(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        put(part, target, replace=False)
    assert not target.exists()


HOLD = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("SELECT count(*) FROM t").fetchone()
print("open", flush=True)
sys.stdin.read()
"""


def test_a_database_that_an_application_has_open_is_not_replaced(part, target, tmp_path):
    """It would go on writing to a file without a name, and nobody would see what is lost."""
    with closing(sqlite3.connect(target)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE t (a)")
    assert user_blocking(target) is user_blocking(tmp_path / "missing") is None
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, target], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout.readline() == b"open\n"
        with pytest.raises(DatabaseInUse) as caught:
            put(part, target, replace=True)
        assert caught.value.pid == child.pid
        child.stdin.close()
    put(part, target, replace=True)
    assert names(tmp_path)["a.db"] == b"new"


def test_mode_and_owner_stay(part, target):
    target.write_bytes(b"old")
    target.chmod(0o640)
    owner = (12345, 54321) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    os.chown(target, *owner)
    descriptor = os.open(part, os.O_RDWR)
    module._take_over_owner(descriptor, target)
    os.close(descriptor)
    put(part, target, replace=True)
    status = target.stat()
    assert (status.st_mode & 0o777, status.st_uid, status.st_gid) == (0o640, *owner)


def test_a_new_file_has_the_mode_that_the_umask_leaves(part, target):
    before = os.umask(0o027)
    try:
        descriptor = os.open(part, os.O_RDWR)
        module._take_over_owner(descriptor, target)
        os.close(descriptor)
    finally:
        os.umask(before)
    assert part.stat().st_mode & 0o777 == 0o640
