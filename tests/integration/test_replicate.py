"""`replicate` and `restore` against real SQLite writers and a stub of the service.

The database files are read here only when nothing of this process follows them: closing a
descriptor of theirs would drop SQLite's locks.
"""

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from app.client import BopClient, RetryPolicy
from app.replication.events import Event
from app.replication.fleet import Fleet
from app.replication.follower import IDLE_SECONDS
from app.replication.plan import MIB, Limits
from app.replication.targets import rule_for
from tests.helpers import sqlite_writer
from tests.helpers.ports import free_port
from tests.helpers.stub_libsql import StubLibsql, look_into
from tests.helpers.wait import wait_until as wait_until_within

ROOT = Path(__file__).parents[2]
NAME = "acme/main"
wait_until = partial(wait_until_within, timeout=60)  # for a machine that is busy with other things


class Process:
    """A child whose lines of output are kept."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self._log = log
        with log.open("wb") as output:
            self._child = subprocess.Popen(
                [sys.executable, *arguments], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
            )

    def lines(self) -> list[str]:
        return self._log.read_text().splitlines()

    def events(self, kind: str) -> list[dict[str, Any]]:
        # the last line may be half written
        whole = [line for line in self._log.read_text().split("\n")[:-1] if line.startswith("{")]
        return [event for line in whole if (event := json.loads(line)).get("event") == kind]

    def end(self, number: int = signal.SIGKILL) -> int:
        if self._child.poll() is None:
            self._child.send_signal(number)
        return self._child.wait(timeout=30)

    def wait(self) -> int:
        return self._child.wait(timeout=60)


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    started: list[Process] = []
    yield started
    for process in started:
        process.end()


@pytest.fixture
def stub() -> Iterator[StubLibsql]:
    with StubLibsql(free_port()) as stub:
        yield stub


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "app.db"
    sqlite_writer.prepare(str(path), 4096)
    return path


class Followed:
    """A fleet of one database in this process, and what it told."""

    def __init__(self, fleet: Fleet, told: list[Event]) -> None:
        self.fleet = fleet
        self.told = told

    def kinds(self) -> list[str]:
        return [event.event for event in self.told]

    def reasons(self) -> list[object]:
        return [e.members["reason"] for e in self.told if e.event == "image_sending"]


@asynccontextmanager
async def followed(
    path: Path, url: str, *, limits: Limits | None = None, name: str = NAME
) -> AsyncIterator[Followed]:
    told: list[Event] = []
    async with BopClient(url, retry=RetryPolicy(attempts_max=1)) as client:
        fleet = Fleet([rule_for(path, name)], client, tell=told.append, limits=limits)
        async with asyncio.TaskGroup() as group:
            group.create_task(fleet.run(once=False))
            try:
                yield Followed(fleet, told)
            finally:
                fleet.stop()


def write(
    tmp_path: Path,
    path: Path,
    *,
    kinds: str,
    count: int,
    page_size: int = 4096,
    pause_ms: int = 2,
) -> Process:
    return Process(
        tmp_path / f"writer-{os.urandom(4).hex()}",
        str(ROOT / "tests/helpers/sqlite_writer.py"),
        str(path),
        str(page_size),
        kinds,
        str(count),
        "7",
        str(pause_ms),
    )


def replicate(tmp_path: Path, path: Path, url: str, *options: str) -> Process:
    return Process(
        tmp_path / f"replicate-{os.urandom(4).hex()}",
        *("-m", "app.cli.main", "replicate", str(path), NAME),
        *("--url", url, "--output", "json", *options),
    )


def committed(stub: StubLibsql, name: str = NAME) -> int:
    """The last transaction that the stub has."""
    found = stub.databases.get(name)
    if found is None or not found.page_count:
        return -1
    if _counted.get(id(found), (0, 0))[0] != found.last_lsn:
        with tempfile.NamedTemporaryFile() as file:
            lsn, image = found.last_lsn, found.image()
            Path(file.name).write_bytes(image)
            with closing(sqlite3.connect(f"file:{file.name}?immutable=1", uri=True)) as connection:
                (count,) = connection.execute("SELECT coalesce(max(tx), 0) FROM done").fetchone()
            _counted[id(found)] = (lsn, count)
    return _counted[id(found)][1]


_counted: dict[int, tuple[int, int]] = {}
"""What `committed` found, and at which LSN."""


def log_bytes(path: Path) -> int:
    return Path(f"{path}-wal").stat().st_size


def replace_database(path: Path, other: Path) -> None:
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink()
    other.rename(path)


def replace_link(link: Path, other: Path) -> None:
    other.rename(link)


def rename_database(old: Path, new: Path) -> None:
    for suffix in ("-wal", "-shm", ""):
        Path(f"{old}{suffix}").rename(f"{new}{suffix}")


def assert_equal(stub: StubLibsql, path: Path, name: str = NAME) -> None:
    """Page for page, once nobody has the file open."""
    assert stub.failures == []
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert stub.databases[name].image() == path.read_bytes()
    look_into(stub.databases[name].image(), sqlite_writer.checked)


@pytest.mark.parametrize(
    ("page_size", "kinds", "count"),
    [
        (512, "rows,delete", 600),
        (4096, "rows,blobs,delete,vacuum,truncate", 200),
        (65536, "rows,delete", 250),
    ],
)
async def test_every_commit_of_a_busy_writer_arrives(
    tmp_path, stub, processes, page_size, kinds, count
):
    path = tmp_path / "app.db"
    sqlite_writer.prepare(str(path), page_size)
    async with followed(path, stub.url) as following:
        await wait_until(lambda: "image_sent" in following.kinds())
        writer = write(tmp_path, path, kinds=kinds, count=count, page_size=page_size)
        processes.append(writer)
        assert await asyncio.to_thread(writer.wait) == 0, writer.lines()[-3:]
        await wait_until(lambda: committed(stub) == count)
    assert_equal(stub, path)
    assert stub.databases[NAME].images == 1, following.reasons()
    assert stub.databases[NAME].logs >= 2, "the log was restarted while it was followed"


async def test_every_accepted_commit_is_a_state_of_the_application(tmp_path, database, processes):
    with StubLibsql(free_port(), checked=sqlite_writer.checked) as stub:
        limits = Limits(checkpoint_bytes=256 * 1024)
        async with followed(database, stub.url, limits=limits):
            writer = write(tmp_path, database, kinds="rows,delete", count=150)
            processes.append(writer)
            assert await asyncio.to_thread(writer.wait) == 0
            await wait_until(lambda: committed(stub) == 150)
        assert_equal(stub, database)
        assert stub.databases[NAME].commits > 0


async def test_a_killed_writer_leaves_whole_transactions(tmp_path, database, stub, processes):
    async with followed(database, stub.url) as following:
        for _ in range(4):
            writer = write(tmp_path, database, kinds="rows,rows,rows,blobs", count=0)
            processes.append(writer)
            await wait_until(lambda writer=writer: len(writer.lines()) > 8)
            writer.end(signal.SIGKILL)
        last = write(tmp_path, database, kinds="rows", count=5)
        processes.append(last)
        assert await asyncio.to_thread(last.wait) == 0
        await wait_until(lambda: committed(stub) == int(last.lines()[-1]))
    assert_equal(stub, database)
    assert stub.databases[NAME].images == 1, following.reasons()


async def test_a_killed_replicate_goes_on_or_sends_an_image(tmp_path, database, stub, processes):
    writer = write(tmp_path, database, kinds="rows,delete", count=0)
    processes.append(writer)
    for _ in range(3):
        following = replicate(tmp_path, database, stub.url)
        processes.append(following)
        await wait_until(lambda f=following: len(f.events("wal_sent")) > 2)
        following.end(signal.SIGKILL)
    following = replicate(tmp_path, database, stub.url)
    processes.append(following)
    await wait_until(lambda: len(following.events("wal_sent")) > 2)
    writer.end(signal.SIGKILL)
    with closing(sqlite3.connect(database)) as connection:
        (last,) = connection.execute("SELECT max(tx) FROM done").fetchone()
    await wait_until(lambda: committed(stub) == last)
    assert following.end(signal.SIGINT) == 0, following.lines()[-3:]
    assert_equal(stub, database)


async def test_a_restart_without_writes_between_goes_on_without_an_image(
    tmp_path, database, stub, processes
):
    with closing(sqlite3.connect(database, isolation_level=None)) as application:
        application.execute("PRAGMA wal_autocheckpoint=0")
        for tx in range(1, 4):
            application.execute("INSERT INTO done VALUES (?, 0)", (tx,))
            following = replicate(tmp_path, database, stub.url, "--once", "--checkpoint")
            processes.append(following)
            assert await asyncio.to_thread(following.wait) == 0, following.lines()
            assert committed(stub) == tx
            assert len(following.events("checkpointed")) == 1
    assert stub.databases[NAME].images == 1
    assert_equal(stub, database)


async def test_a_log_restarted_unseen_means_an_image(tmp_path, database, stub):
    """Case 52: no corruption where the application restarted its log outside our control."""
    with closing(sqlite3.connect(database, isolation_level=None)) as application:
        application.execute("INSERT INTO done VALUES (1, 0)")
        async with followed(database, stub.url):
            await wait_until(lambda: committed(stub) == 1)
        for tx in range(2, 5):
            application.execute("INSERT INTO done VALUES (?, 0)", (tx,))
            application.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        application.execute("INSERT INTO done VALUES (5, 0)")
        async with followed(database, stub.url) as following:
            await wait_until(lambda: committed(stub) == 5)
            assert following.reasons() == ["the log was restarted unseen"]
    assert_equal(stub, database)


async def test_the_service_away_and_back_loses_nothing(tmp_path, database, stub, processes):
    async with followed(database, stub.url) as following:
        writer = write(tmp_path, database, kinds="rows", count=600)
        processes.append(writer)

        def writer_ended() -> bool:
            return writer.lines()[-1:] == ["600"]

        for _ in range(3):
            before = len(following.told)
            await wait_until(
                lambda before=before: "wal_sent" in following.kinds()[before:] or writer_ended()
            )
            stub.stop()
            await wait_until(lambda: following.fleet.statuses[NAME].away or writer_ended())
            stub.start()
        assert await asyncio.to_thread(writer.wait) == 0
        await wait_until(lambda: committed(stub) == 600)
    assert_equal(stub, database)
    assert stub.databases[NAME].images == 1, following.reasons()


async def test_a_lost_answer_is_not_a_lost_place(tmp_path, database, stub):
    with closing(sqlite3.connect(database, isolation_level=None)) as application:
        limits = Limits(checkpoint_bytes=64 * 1024)
        async with followed(database, stub.url, limits=limits) as following:
            await wait_until(lambda: "caught_up" in following.kinds())
            for tx in range(1, 21):
                stub.drop_answers = 1
                application.execute("INSERT INTO done VALUES (?, ?)", (tx, 0))
                application.execute("CREATE TABLE t AS SELECT randomblob(20000) AS b")
                application.execute("DROP TABLE t")
                await wait_until(lambda tx=tx: committed(stub) == tx)
        assert stub.databases[NAME].images == 1, following.reasons()
        assert stub.databases[NAME].logs > 1
    assert_equal(stub, database)


async def test_a_log_beyond_its_bound_is_let_go_and_an_image_follows(
    tmp_path, database, stub, processes
):
    limits = Limits(log_bytes=MIB)
    async with followed(database, stub.url, limits=limits) as following:
        await wait_until(lambda: "caught_up" in following.kinds())
        stub.stop()
        writer = write(tmp_path, database, kinds="rows", count=400)
        processes.append(writer)
        await wait_until(lambda: "let_go" in following.kinds())
        assert await asyncio.to_thread(writer.wait) == 0
        stub.start()
        await wait_until(lambda: committed(stub) == 400)
        assert following.reasons()[-1] == "the read lock was let go"
    assert_equal(stub, database)


TRUNCATE = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], timeout=float(sys.argv[2]))
print(connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0])
"""


async def test_an_application_gets_its_log_though_the_service_is_away(
    tmp_path, database, stub, processes
):
    """What is not sent yet is kept: no image follows."""
    with closing(sqlite3.connect(database, isolation_level=None)) as application:
        application.execute("PRAGMA wal_autocheckpoint=0")
        async with followed(database, stub.url) as following:
            application.execute("INSERT INTO done VALUES (1, 0)")
            await wait_until(lambda: committed(stub) == 1)
            application.execute("INSERT INTO done VALUES (2, 0)")
            await wait_until(lambda: committed(stub) == 2)
            stub.stop()
            application.execute("INSERT INTO done VALUES (3, 0)")
            await wait_until(lambda: following.fleet.statuses[NAME].away)
            truncating = Process(tmp_path / "truncating", "-c", TRUNCATE, str(database), "60")
            processes.append(truncating)
            assert await asyncio.to_thread(truncating.wait) == 0
            assert truncating.lines() == ["0"], "it was not refused as busy"
            assert log_bytes(database) == 0
            application.execute("INSERT INTO done VALUES (4, 0)")
            stub.start()
            await wait_until(lambda: committed(stub) == 4)
    assert "let_go" not in following.kinds()
    assert stub.databases[NAME].images == 1, following.reasons()
    assert_equal(stub, database)


async def test_an_application_gets_its_log_from_an_idle_follower_at_once(
    tmp_path, database, stub, processes
):
    """Though nothing wakes it: an application that waits for a log writes nothing."""
    with closing(sqlite3.connect(database, isolation_level=None)) as application:
        application.execute("PRAGMA wal_autocheckpoint=0")
        async with followed(database, stub.url) as following:
            await wait_until(lambda: "caught_up" in following.kinds())
            for tx in (1, 2):
                application.execute("INSERT INTO done VALUES (?, 0)", (tx,))
                await wait_until(lambda tx=tx: committed(stub) == tx)
            (follower,) = following.fleet.followers
            await wait_until(lambda: follower.is_idle)
            truncating = Process(
                tmp_path / "truncating", "-c", TRUNCATE, str(database), str(IDLE_SECONDS / 2)
            )
            processes.append(truncating)
            assert await asyncio.to_thread(truncating.wait) == 0
            assert truncating.lines() == ["0"], "it was not refused as busy"
            application.execute("INSERT INTO done VALUES (3, 0)")
            await wait_until(lambda: committed(stub) == 3)
    assert stub.databases[NAME].images == 1, following.reasons()
    assert_equal(stub, database)


async def test_an_idle_log_does_not_grow_and_the_writer_is_not_held_up(
    tmp_path, database, stub, processes
):
    limits = Limits(checkpoint_bytes=256 * 1024)
    async with followed(database, stub.url, limits=limits) as following:
        await wait_until(lambda: "caught_up" in following.kinds())
        with closing(sqlite3.connect(database, isolation_level=None, timeout=5)) as application:
            for tx in range(1, 301):
                application.execute("INSERT INTO done VALUES (?, zeroblob(20000))", (tx,))
                if tx % 10 == 0:
                    await wait_until(lambda tx=tx: committed(stub) >= tx)
            await wait_until(lambda: committed(stub) == 300)
            assert log_bytes(database) < 2 * MIB
    assert stub.databases[NAME].logs > 5
    assert stub.databases[NAME].images == 1, following.reasons()


async def test_a_replaced_file_means_an_image(tmp_path, database, stub):
    other = tmp_path / "other.db"
    sqlite_writer.prepare(str(other), 4096)
    with closing(sqlite3.connect(other)) as connection:
        connection.execute("INSERT INTO done VALUES (1, 0)")
        connection.execute("INSERT INTO done VALUES (2, 0)")
        connection.commit()
    async with followed(database, stub.url) as following:
        await wait_until(lambda: committed(stub) == 0)
        replace_database(database, other)
        await wait_until(lambda: committed(stub) == 2)
        assert following.reasons()[-1] == "the file was replaced"
    assert_equal(stub, database)


async def test_a_link_that_comes_to_name_another_file_means_an_image(tmp_path, database, stub):
    other, link = tmp_path / "other.db", tmp_path / "links" / "app.db"
    sqlite_writer.prepare(str(other), 4096)
    link.parent.mkdir()
    link.symlink_to(database)
    async with followed(link, stub.url) as following:
        await wait_until(lambda: committed(stub) == 0)
        (tmp_path / "links" / "new").symlink_to(other)
        replace_link(link, tmp_path / "links" / "new")
        with closing(sqlite3.connect(link, isolation_level=None)) as application:
            application.execute("INSERT INTO done VALUES (1, 0)")
            await wait_until(lambda: committed(stub) == 1)
        assert following.reasons()[-1] == "the file was replaced"
    assert_equal(stub, other)


async def test_another_page_size_is_refused(tmp_path, database, stub, processes):
    async with followed(database, stub.url):
        await wait_until(lambda: committed(stub) == 0)
    other = tmp_path / "other.db"
    sqlite_writer.prepare(str(other), 8192)
    refused = replicate(tmp_path, other, stub.url, "--once")
    processes.append(refused)
    assert await asyncio.to_thread(refused.wait) == 1
    failure = json.loads(refused.lines()[-1])
    assert failure["code"] == "database_conflict"
    assert "8192" in failure["detail"]


async def test_rollback_mode_is_refused_unless_it_may_be_changed(tmp_path, stub, processes):
    path = tmp_path / "old.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE old (a)")
    refused = replicate(tmp_path, path, stub.url, "--once")
    processes.append(refused)
    assert await asyncio.to_thread(refused.wait) == 1
    assert "--set-wal" in refused.lines()[-1]
    taken = replicate(tmp_path, path, stub.url, "--once", "--set-wal")
    processes.append(taken)
    assert await asyncio.to_thread(taken.wait) == 0, taken.lines()
    assert_equal(stub, path)


async def test_a_directory_is_followed_with_what_comes_to_it(tmp_path, stub):
    directory = tmp_path / "many"
    directory.mkdir()
    sqlite_writer.prepare(str(directory / "a.db"), 4096)
    (directory / "notes.db").write_text("not a database")
    async with followed(directory, stub.url, name="acme"):
        await wait_until(lambda: committed(stub, "acme/a") == 0)
        sqlite_writer.prepare(str(directory / "b.db"), 1024)
        await wait_until(lambda: committed(stub, "acme/b") == 0)
    assert sorted(stub.databases) == ["acme/a", "acme/b"]


async def test_a_database_that_is_renamed_is_followed_under_its_new_name(tmp_path, stub):
    """By the same process, which must not drop the locks that it has on the file by then."""
    directory = tmp_path / "many"
    directory.mkdir()
    old, new = directory / "a.db", directory / "b.db"
    sqlite_writer.prepare(str(old), 4096)
    async with followed(directory, stub.url, name="acme"):
        await wait_until(lambda: committed(stub, "acme/a") == 0)
        rename_database(old, new)
        with closing(sqlite3.connect(new, isolation_level=None)) as application:
            application.execute("PRAGMA wal_autocheckpoint=0")
            application.execute("INSERT INTO done VALUES (1, 0)")
            await wait_until(lambda: committed(stub, "acme/b") == 1)
            log = log_bytes(new)
            application.execute("PRAGMA wal_checkpoint(PASSIVE)")
            application.execute("INSERT INTO done VALUES (2, 0)")
            await wait_until(lambda: committed(stub, "acme/b") == 2)
            assert log > 0
    assert stub.databases["acme/a"].images == stub.databases["acme/b"].images == 1
    assert_equal(stub, new, "acme/b")


async def test_a_list_is_followed_though_some_of_it_cannot_be(tmp_path, stub, processes):
    for name in ("one", "two", "other"):
        sqlite_writer.prepare(str(tmp_path / f"{name}.db"), 4096)
    with closing(sqlite3.connect(tmp_path / "old.db")) as connection:
        connection.execute("CREATE TABLE old (a)")
    (tmp_path / "link.db").symlink_to(tmp_path / "one.db")
    entries = {
        "one.db": "acme/one",
        "two.db": "acme/two",
        "old.db": "acme/old",  # in rollback mode
        "link.db": "acme/link",  # the same file as the first
        "other.db": "acme/two",  # to the same database as the second
    }
    config = tmp_path / "follow.toml"
    config.write_text(
        "".join(f"[[follow]]\nfile = '{file}'\ndatabase = '{to}'\n" for file, to in entries.items())
    )
    following = Process(
        tmp_path / "replicate",
        *("-m", "app.cli.main", "replicate", "--config", str(config), "--once"),
        *("--url", stub.url, "--output", "json"),
    )
    processes.append(following)
    assert await asyncio.to_thread(following.wait) == 1, following.lines()
    refused = {event["database"]: event["code"] for event in following.events("refused")}
    assert refused == {
        "acme/old": "not_followable",
        "acme/link": "configuration",
        "acme/two": "configuration",
    }
    assert sorted(stub.databases) == ["acme/one", "acme/two"]
    assert_equal(stub, tmp_path / "one.db", "acme/one")
    assert_equal(stub, tmp_path / "two.db", "acme/two")


@pytest.mark.parametrize("cut", [None, 100, 60_000])
async def test_restore_gives_the_file_back(tmp_path, database, stub, processes, cut):
    async with followed(database, stub.url):
        writer = write(tmp_path, database, kinds="rows", count=20)
        processes.append(writer)
        assert await asyncio.to_thread(writer.wait) == 0
        await wait_until(lambda: committed(stub) == 20)
    stub.image_cut = cut
    target = tmp_path / "back.db"
    done = _restore(tmp_path, stub, target, "--check")
    processes.append(done)
    assert await asyncio.to_thread(done.wait) == 0, done.lines()
    assert target.read_bytes() == stub.databases[NAME].image()
    assert json.loads(done.lines()[-1])["lsn"] == stub.databases[NAME].last_lsn
    assert [path.name for path in tmp_path.glob(".back*")] == []


async def test_an_interrupted_restore_ends_at_once_and_leaves_nothing(
    tmp_path, database, stub, processes
):
    async with followed(database, stub.url):
        await wait_until(lambda: committed(stub) == 0)
    stub.image_cut, stub.is_stalling = 5000, True
    target = tmp_path / "back.db"
    interrupted = _restore(tmp_path, stub, target)
    processes.append(interrupted)
    await wait_until(stub.stalled.is_set)
    await wait_until(lambda: any(path.stat().st_size for path in tmp_path.glob(".back*")))
    assert interrupted.end(signal.SIGINT) != 0, "within its time, though the service says nothing"
    assert not target.exists()
    assert list(tmp_path.glob(".back*")) == []


async def test_restore_replaces_nothing_unasked_and_all_when_forced(
    tmp_path, database, stub, processes
):
    async with followed(database, stub.url):
        await wait_until(lambda: committed(stub) == 0)
    target = tmp_path / "back.db"
    old_log = tmp_path / "back.db-wal"
    old_log.write_bytes(b"old")
    refused = _restore(tmp_path, stub, target)
    processes.append(refused)
    assert await asyncio.to_thread(refused.wait) == 1
    assert not target.exists()
    assert old_log.read_bytes() == b"old"
    target.write_bytes(b"old")
    forced = _restore(tmp_path, stub, target, "--force")
    processes.append(forced)
    assert await asyncio.to_thread(forced.wait) == 0, forced.lines()
    assert target.read_bytes() == stub.databases[NAME].image()
    assert not old_log.exists()


async def test_restore_refuses_a_damaged_image(tmp_path, database, stub, processes):
    async with followed(database, stub.url):
        await wait_until(lambda: committed(stub) == 0)
    held = stub.databases[NAME]
    held.pages[2] = b"\xff" * held.page_size
    target = tmp_path / "back.db"
    refused = _restore(tmp_path, stub, target)
    processes.append(refused)
    assert await asyncio.to_thread(refused.wait) == 1
    assert not target.exists()


def _restore(tmp_path: Path, stub: StubLibsql, target: Path, *options: str) -> Process:
    return Process(
        tmp_path / f"restore-{os.urandom(4).hex()}",
        *("-m", "app.cli.main", "restore", NAME, "-o", str(target)),
        *("--url", stub.url, "--output", "json", *options),
    )
