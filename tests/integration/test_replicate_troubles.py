"""`replicate` in trouble: locks that are held, disks that fail, a service that refuses, odd names.

One database's trouble is its own: the others that the process follows go on.
"""

import asyncio
import errno
import json
import os
import signal
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest

from app.replication import fleet as fleet_module
from app.replication import shares as shares_module
from app.replication.bell import IDLE_SECONDS
from app.replication.image import Image
from app.replication.plan import MIB, Limits
from app.replication.source import Source
from tests.helpers import sqlite_writer
from tests.helpers.following import (
    NAME,
    Process,
    assert_equal,
    committed,
    followed,
    replicate,
    wait_until,
)
from tests.helpers.stub_libsql import Refusal
from tests.helpers.wait import wait_until as wait_until_within


def connect(path: Path) -> "closing[sqlite3.Connection]":
    """An application that leaves its log alone."""
    application = sqlite3.connect(path, isolation_level=None, timeout=5, check_same_thread=False)
    application.execute("PRAGMA wal_autocheckpoint=0")
    return closing(application)


def insert(application: sqlite3.Connection, tx: int, *, filler: int = 0) -> None:
    application.execute("BEGIN")
    application.execute("INSERT INTO done VALUES (?, 0)", (tx,))
    if filler:
        application.execute("CREATE TABLE IF NOT EXISTS filler (a)")
        application.execute("INSERT INTO filler VALUES (zeroblob(?))", (filler,))
    application.execute("COMMIT")


# --- locks that are held


async def test_a_commit_is_sent_though_a_writer_keeps_the_log_from_being_emptied(database, stub):
    limits = Limits(checkpoint_bytes=256 * 1024)
    with connect(database) as application, connect(database) as other:
        async with followed(database, stub.url, limits=limits) as following:
            await wait_until(lambda: "caught_up" in following.kinds())
            insert(application, 1, filler=512 * 1024)
            other.execute("BEGIN IMMEDIATE")
            await wait_until(lambda: committed(stub) == 1)
            other.execute("COMMIT")
    assert stub.databases[NAME].images == 1
    assert_equal(stub, database)


async def test_a_database_is_sent_while_a_writer_holds_its_lock(
    tmp_path, database, stub, processes
):
    """A long transaction, as of an import, is nobody's reason to wait."""
    with connect(database) as application:
        insert(application, 1)
        application.execute("BEGIN IMMEDIATE")
        application.execute("INSERT INTO done VALUES (2, 0)")
        once = replicate(tmp_path, database, stub.url, "--once")
        processes.append(once)
        assert await asyncio.to_thread(once.wait) == 0, once.lines()
        assert committed(stub) == 1
        async with followed(database, stub.url) as following:
            await wait_until(lambda: "caught_up" in following.kinds())
            application.execute("COMMIT")
            await wait_until(lambda: committed(stub) == 2)
    assert stub.databases[NAME].images == 1, following.reasons()
    assert_equal(stub, database)


async def test_an_index_that_a_killed_writer_left_half_written_is_mended(database, stub):
    """Nobody else would: the application is gone, and its last commit counts."""
    with connect(database) as application:
        async with followed(database, stub.url) as following:
            await wait_until(lambda: "caught_up" in following.kinds())
            index = os.open(f"{database}-shm", os.O_RDWR)  # left open: closing drops SQLite's locks
            first = os.pread(index, 48, 0)
            insert(application, 1)
            await wait_until(lambda: committed(stub) == 1)
            os.pwrite(index, first, 0)  # the second copy is written before the first one
            await wait_until(lambda: os.pread(index, 48, 0) == os.pread(index, 48, 48))
            insert(application, 2)
            await wait_until(lambda: committed(stub) == 2)
    assert stub.databases[NAME].images == 1, following.reasons()
    assert_equal(stub, database)


async def test_an_image_that_is_too_slow_does_not_let_the_log_fill_the_disk(
    database, stub, monkeypatch
):
    limits = Limits(unsent_bytes=64 * 1024)
    read, tx = Source.read_image_blocking, 1
    with connect(database) as application:
        insert(application, tx, filler=2 * MIB)

        def read_while_it_writes(source: Source, image: Image, offset: int) -> bytes:
            nonlocal tx
            for _ in range(4 if tx < 21 else 0):
                tx += 1
                application.execute("DELETE FROM filler")
                insert(application, tx, filler=2 * MIB)
            return read(source, image, offset)

        monkeypatch.setattr(Source, "read_image_blocking", read_while_it_writes)
        async with followed(database, stub.url, limits=limits) as following:
            await wait_until(lambda: committed(stub) == 21)
            assert "outgrew" in next(e.detail for e in following.told if e.event == "let_go")
    assert_equal(stub, database)


# --- disks that fail


async def test_a_disk_that_fails_under_one_database_leaves_the_others_alone(
    tmp_path, stub, monkeypatch
):
    directory = tmp_path / "many"
    directory.mkdir()
    for name in ("a", "b"):
        sqlite_writer.prepare(str(directory / f"{name}.db"), 4096)
    failing = True
    read = Source.read_log_blocking

    def read_or_fail(source: Source, *args: object) -> bytes:
        if failing and source.path.name == "a.db":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(source, *args)

    monkeypatch.setattr(Source, "read_log_blocking", read_or_fail)
    with connect(directory / "a.db") as one, connect(directory / "b.db") as two:
        async with followed(directory, stub.url, name="acme") as following:
            await wait_until(lambda: following.kinds().count("caught_up") == 2)
            insert(one, 1)
            await wait_until(lambda: "waiting" in following.kinds())
            insert(two, 1)
            await wait_until(lambda: committed(stub, "acme/b") == 1)
            failing = False
            await wait_until(lambda: committed(stub, "acme/a") == 1)
    assert "Input/output error" in next(e.detail for e in following.told if e.event == "waiting")
    assert stub.databases["acme/a"].images == 1


async def test_a_log_that_was_cut_under_one_database_leaves_the_others_alone(tmp_path, stub):
    directory = tmp_path / "many"
    directory.mkdir()
    for name in ("a", "b"):
        sqlite_writer.prepare(str(directory / f"{name}.db"), 4096)
    with connect(directory / "a.db") as one, connect(directory / "b.db") as two:
        insert(one, 1)
        os.truncate(f"{directory / 'a.db'}-wal", 1000)
        async with followed(directory, stub.url, name="acme") as following:
            insert(two, 1)
            await wait_until(lambda: committed(stub, "acme/b") == 1)
            await wait_until(lambda: "waiting" in following.kinds())
    assert committed(stub, "acme/a") == -1, "what is not there was not sent"


@pytest.mark.parametrize(("output", "code"), [("full", 0), ("closed", 1)])
async def test_what_is_told_and_cannot_be_written_is_no_traceback(
    tmp_path, database, stub, processes, output, code
):
    """A full disk stops nothing: that is when it matters most. Who does not read on, ends it."""
    if output == "full":
        stdout = os.open("/dev/full", os.O_WRONLY)
    else:
        read_end, stdout = os.pipe()
        os.close(read_end)
    child = replicate(tmp_path, database, stub.url, "--once", stdout=stdout)
    os.close(stdout)
    processes.append(child)
    assert await asyncio.to_thread(child.wait) == code, child.lines()
    assert child.lines() == []
    assert committed(stub) == (0 if output == "full" else -1)


# --- a service that refuses


@pytest.mark.parametrize("what", ["/wal", "/image"])
async def test_once_ends_where_the_service_takes_nothing(tmp_path, database, stub, processes, what):
    with connect(database) as application:
        insert(application, 1)
        if what == "/wal":
            first = replicate(tmp_path, database, stub.url, "--once")
            processes.append(first)
            assert await asyncio.to_thread(first.wait) == 0
            insert(application, 2)

        def refuse(_method: str, path: str, size: int) -> Refusal | None:
            takes = what not in path or size <= 32  # it answers who asks where it stands
            return None if takes else Refusal(507, "quota_exhausted", detail="no room")

        stub.refuses = refuse
        once = replicate(tmp_path, database, stub.url, "--once")
        processes.append(once)
        assert await asyncio.to_thread(once.wait) == 1
    told = json.loads(once.lines()[-1])
    assert (told["code"], "no room" in told["detail"]) == ("unreachable", True)
    assert len(once.events("service_away")) == 1, "one trouble is told once"


async def test_a_service_that_asks_for_an_hour_is_asked_again_before(database, stub):
    """It may be a proxy that says so, of a service that is back in a minute."""
    refusals = [Refusal(503, "not_ready", retry_after=3600)]
    stub.refuses = lambda *_: refusals.pop() if refusals else None
    async with followed(database, stub.url) as following:
        await wait_until(lambda: "service_away" in following.kinds())
        (follower,) = following.fleet.followers
        assert 50 < follower.away_seconds <= 60


async def test_once_that_was_stopped_says_that_it_is_not_done(tmp_path, database, stub, processes):
    await asyncio.to_thread(stub.stop)
    once = replicate(tmp_path, database, stub.url, "--once", "--checkpoint")
    processes.append(once)
    await wait_until(lambda: once.events("service_away"))
    assert once.end(signal.SIGTERM) == 1
    assert json.loads(once.lines()[-1])["code"] == "interrupted"


async def test_one_checkpoint_that_is_refused_is_in_the_way_of_no_other(tmp_path, stub, processes):
    directory = tmp_path / "many"
    directory.mkdir()
    for name in ("a", "b"):
        sqlite_writer.prepare(str(directory / f"{name}.db"), 4096)
    refusals = [Refusal(409, "queue_drained", detail="drained"), Refusal(503, "not_ready")]
    stub.refuses = lambda _, path, __: refusals.pop(0) if "/check" in path and refusals else None
    once = Process(
        tmp_path / "replicate",
        *("-m", "app.cli.main", "replicate", str(directory), "acme", "--once", "--checkpoint"),
        *("--url", stub.url, "--output", "json"),
    )
    processes.append(once)
    assert await asyncio.to_thread(once.wait) == 1
    assert len(once.events("checkpointed")) == 1
    assert json.loads(once.lines()[-1])["code"] == "queue_drained"


async def test_a_database_alone_in_its_directory_is_tried_again(tmp_path, stub, monkeypatch):
    monkeypatch.setattr(fleet_module, "RETRY_REFUSED_SECONDS", 0.1)
    directory = tmp_path / "one"
    directory.mkdir()
    sqlite_writer.prepare(str(directory / "a.db"), 4096)
    refusing = True
    stub.refuses = lambda *_: Refusal(403, "forbidden") if refusing else None
    async with followed(directory, stub.url, name="acme") as following:
        for _ in range(2):
            await wait_until(lambda: following.kinds()[-1:] == ["refused"])
            refusing = False
            await wait_until(lambda: following.kinds()[-1:] == ["caught_up"])
            assert following.fleet.statuses["acme/a"].refusal is None
            refusing = True
            with connect(directory / "a.db") as application:
                application.execute("INSERT INTO done SELECT count(*), 0 FROM done")
        refusing = False


async def test_a_database_that_was_deleted_in_the_service_is_made_again(
    tmp_path, stub, monkeypatch
):
    monkeypatch.setattr(fleet_module, "RETRY_REFUSED_SECONDS", 0.1)
    directory = tmp_path / "one"
    directory.mkdir()
    sqlite_writer.prepare(str(directory / "a.db"), 4096)
    async with followed(directory, stub.url, name="acme") as following:
        await wait_until(lambda: "caught_up" in following.kinds())
        del stub.databases["acme/a"]
        with connect(directory / "a.db") as application:
            insert(application, 1)
            await wait_until(lambda: committed(stub, "acme/a") == 1)
    assert [e.members["code"] for e in following.told if e.event == "refused"] == [
        "database_not_found"
    ]


# --- names, and files that come and go


async def test_names_that_are_no_text_are_told_all_the_same(tmp_path, stub, processes):
    directory = tmp_path / "many"
    directory.mkdir()
    sqlite_writer.prepare(str(directory / "a.db"), 4096)
    odd = os.fsdecode(os.fsencode(directory) + b"/caf\xe9.db")
    sqlite_writer.prepare(odd, 4096)
    listed = tmp_path / "follow.toml"
    loop = tmp_path / "loop.db"
    loop.symlink_to(loop)
    listed.write_text(
        f"[[follow]]\ndirectory = '{directory}'\ndatabase = 'acme/{{stem}}'\n"
        f"[[follow]]\nfile = '{loop}'\ndatabase = 'acme/loop'\n"
    )
    once = Process(
        tmp_path / "replicate",
        *("-m", "app.cli.main", "replicate", "--config", str(listed), "--once"),
        *("--url", stub.url, "--output", "json"),
    )
    processes.append(once)
    assert await asyncio.to_thread(once.wait) == 1, "one of them was not sent"
    refused = {event["database"]: event for event in once.events("refused")}
    assert set(refused) == {odd, "acme/loop"}
    assert "--config" in refused[odd]["detail"], "where it can be given a name"
    assert sorted(stub.databases) == ["acme/a"]


async def test_databases_that_went_are_forgotten_and_followed_when_they_come_again(
    tmp_path, stub, monkeypatch
):
    monkeypatch.setattr(fleet_module, "RESCAN_SECONDS", 0.1)
    directory = tmp_path / "many"
    directory.mkdir()
    async with followed(directory, stub.url, name="acme") as following:
        for number in range(3):
            path = directory / f"s{number}.db"
            sqlite_writer.prepare(str(path), 4096)
            await wait_until(lambda n=number: committed(stub, f"acme/s{n}") == 0)
            remove_database(path)
            await wait_until(lambda: following.fleet.followers == [])
        sqlite_writer.prepare(str(directory / "s0.db"), 4096)
        with connect(directory / "s0.db") as application:
            insert(application, 1)
            await wait_until(lambda: committed(stub, "acme/s0") == 1)
    assert stub.databases["acme/s0"].images == 2


async def test_a_directory_that_was_put_in_the_place_of_another_one_wakes_too(tmp_path, stub):
    """As data directories are swapped: what was watched is not what is followed."""
    old, new = tmp_path / "data", tmp_path / "new"
    for directory in (old, new):
        directory.mkdir()
        sqlite_writer.prepare(str(directory / "a.db"), 4096)
    async with followed(old / "a.db", stub.url) as following:
        await wait_until(lambda: committed(stub) == 0)
        (follower,) = following.fleet.followers
        await wait_until(lambda: follower.is_idle)
        swap_directories(old, new)
        with connect(old / "a.db") as application:
            insert(application, 1)
            await wait_until(lambda: committed(stub) == 1)
            await wait_until(lambda: follower.is_idle)
            insert(application, 2)
            await wait_until_within(lambda: committed(stub) == 2, timeout=IDLE_SECONDS / 2)


async def test_a_file_that_takes_the_place_of_another_one_is_followed(tmp_path, stub, monkeypatch):
    """Two files for one database: the second waits until the first is gone."""
    monkeypatch.setattr(fleet_module, "RESCAN_SECONDS", 0.1)
    directory = tmp_path / "many"
    directory.mkdir()
    old, new = directory / "a.2025.db", directory / "a.2026.db"
    sqlite_writer.prepare(str(old), 4096)
    async with followed(directory, stub.url, name="acme") as following:
        await wait_until(lambda: committed(stub, "acme/a") == 0)
        sqlite_writer.prepare(str(new), 4096)
        with connect(new) as application:
            insert(application, 1)
        await wait_until(lambda: "refused" in following.kinds())
        remove_database(old)
        await wait_until(lambda: committed(stub, "acme/a") == 1)
        assert following.fleet.statuses["acme/a"].refusal is None
    assert following.kinds().count("refused") == 1
    assert_equal(stub, new, "acme/a")


async def test_more_databases_than_files_may_be_open_are_refused_and_the_others_go_on(
    tmp_path, stub, monkeypatch
):
    """Else no descriptor would be left for a connection to the service, for any of them."""
    monkeypatch.setattr(fleet_module, "_allow_open_files", lambda: 160 + 2 * 12)
    directory = tmp_path / "many"
    directory.mkdir()
    for number in range(4):
        sqlite_writer.prepare(str(directory / f"d{number}.db"), 4096)
    async with followed(directory, stub.url, name="acme") as following:
        await wait_until(lambda: following.kinds().count("caught_up") == 2)
        told = [event for event in following.told if event.event == "refused"]
    assert [event.database for event in told] == ["acme/d2", "acme/d3"]
    assert "LimitNOFILE" in told[0].detail


async def test_images_take_turns_and_hold_up_neither_commits_nor_applications(
    tmp_path, stub, monkeypatch
):
    monkeypatch.setattr(shares_module, "IMAGES_MAX", 1)
    directory = tmp_path / "many"
    directory.mkdir()
    sqlite_writer.prepare(str(directory / "a.db"), 4096)
    held = threading.Event()

    def hold(_method: str, path: str, _size: int) -> None:
        if path.endswith("b/image"):
            stub.stalled.set()
            held.wait(30)

    async with followed(directory, stub.url, name="acme") as following:
        await wait_until(lambda: committed(stub, "acme/a") == 0)
        stub.refuses = hold
        sqlite_writer.prepare(str(directory / "b.db"), 4096)
        await wait_until(stub.stalled.is_set)
        sqlite_writer.prepare(str(directory / "c.db"), 4096)
        await wait_until(lambda: following.kinds().count("following") == 3)
        with connect(directory / "a.db") as one, connect(directory / "c.db") as other:
            insert(one, 1)
            await wait_until(lambda: committed(stub, "acme/a") == 1)
            insert(other, 1)
            other.execute("PRAGMA busy_timeout=0")
            await wait_until(lambda: truncate(other) == 0)
            held.set()
            await wait_until(lambda: committed(stub, "acme/c") == 1)
    assert stub.databases["acme/a"].images == 1


def truncate(application: sqlite3.Connection) -> int:
    return int(application.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0])


def remove_database(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def swap_directories(old: Path, new: Path) -> None:
    old.rename(old.with_name("old"))
    new.rename(old)
