"""The application's disk is full: its log cannot be emptied. On a small tmpfs of its own."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from app.replication.plan import Limits
from tests.helpers import sqlite_writer
from tests.helpers.following import NAME, committed, followed, wait_until
from tests.helpers.ports import free_port
from tests.helpers.small_disk import mounted_tmpfs
from tests.helpers.stub_libsql import StubLibsql

MIB = 1024 * 1024


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_tmpfs(tmp_path / "disk", size_mib=8) as disk:
        yield disk


def fill_up(application: sqlite3.Connection) -> int:
    """The last transaction that was committed."""
    application.execute("CREATE TABLE filler (a)")
    tx = 0
    with suppress(sqlite3.OperationalError):
        for tx in range(1, 1000):
            application.execute("BEGIN")
            application.execute("INSERT INTO done VALUES (?, 0)", (tx,))
            application.execute("INSERT INTO filler VALUES (randomblob(100000))")
            application.execute("COMMIT")
    if application.in_transaction:
        application.execute("ROLLBACK")
    (last,) = application.execute("SELECT max(tx) FROM done").fetchone()
    assert last == tx - 1, "it ended with a full disk"
    return int(last)


async def test_the_last_commits_that_a_full_disk_took_are_sent(small_disk):
    """The log cannot be copied into the database file, which would grow; that is no reason to keep
    commits back. An image of it can be made, too.
    """
    path = small_disk / "app.db"
    sqlite_writer.prepare(str(path), 4096)
    limits = Limits(checkpoint_bytes=MIB)
    with (
        StubLibsql(free_port()) as stub,
        closing(sqlite3.connect(path, isolation_level=None, timeout=10)) as application,
    ):
        application.execute("PRAGMA wal_autocheckpoint=0")
        async with followed(path, stub.url, limits=limits) as following:
            await wait_until(lambda: "caught_up" in following.kinds())
            last = fill_up(application)
            await wait_until(lambda: committed(stub) == last)
            await wait_until(lambda: "waiting" in following.kinds())
            assert "full" in next(e.detail for e in following.told if e.event == "waiting")
            del stub.databases[NAME]
        async with followed(path, stub.url, limits=limits):
            await wait_until(lambda: committed(stub) == last)
