"""`replicate` and `restore` against real SQLite writers and a stub of the service."""

import asyncio
import json
import signal
import sqlite3
from contextlib import closing

import pytest

from app.replication.bell import IDLE_SECONDS
from app.replication.plan import MIB, Limits
from tests.helpers import sqlite_writer
from tests.helpers.following import (
    NAME,
    Process,
    assert_equal,
    committed,
    followed,
    log_bytes,
    rename_database,
    replace_database,
    replace_link,
    replicate,
    restore,
    wait_until,
    write,
)
from tests.helpers.ports import free_port
from tests.helpers.stub_libsql import StubLibsql


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
            await asyncio.to_thread(stub.stop)
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
        await asyncio.to_thread(stub.stop)
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
            await asyncio.to_thread(stub.stop)
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
    done = restore(tmp_path, stub, target, "--check")
    processes.append(done)
    assert await asyncio.to_thread(done.wait) == 0, done.lines()
    assert target.read_bytes() == stub.databases[NAME].image()
    assert json.loads(done.lines()[-1])["lsn"] == stub.databases[NAME].last_lsn
    assert [path.name for path in tmp_path.glob(".back*")] == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 1)])
async def test_an_interrupted_restore_ends_at_once_and_leaves_nothing(
    tmp_path, database, stub, processes, number, code
):
    async with followed(database, stub.url):
        await wait_until(lambda: committed(stub) == 0)
    stub.image_cut, stub.is_stalling = 5000, True
    target = tmp_path / "back.db"
    interrupted = restore(tmp_path, stub, target)
    processes.append(interrupted)
    await wait_until(stub.stalled.is_set)
    await wait_until(lambda: any(path.stat().st_size for path in tmp_path.glob(".back*")))
    assert interrupted.end(number) == code, "within its time, though the service says nothing"
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
    refused = restore(tmp_path, stub, target)
    processes.append(refused)
    assert await asyncio.to_thread(refused.wait) == 1
    assert not target.exists()
    assert old_log.read_bytes() == b"old"
    target.write_bytes(b"old")
    forced = restore(tmp_path, stub, target, "--force")
    processes.append(forced)
    assert await asyncio.to_thread(forced.wait) == 0, forced.lines()
    assert target.read_bytes() == stub.databases[NAME].image()
    assert not old_log.exists()


async def test_restore_replaces_the_file_that_a_link_names(tmp_path, database, stub, processes):
    async with followed(database, stub.url):
        await wait_until(lambda: committed(stub) == 0)
    real, link = tmp_path / "volume" / "real.db", tmp_path / "app-link.db"
    real.parent.mkdir()
    sqlite_writer.prepare(str(real), 4096)
    link.symlink_to(real)
    refused = restore(tmp_path, stub, link)
    forced = restore(tmp_path, stub, link, "--force")
    processes += [refused, forced]
    assert await asyncio.to_thread(refused.wait) == 1
    assert await asyncio.to_thread(forced.wait) == 0, forced.lines()
    assert link.is_symlink()
    assert real.read_bytes() == stub.databases[NAME].image()
    assert [path.name for path in real.parent.iterdir()] == ["real.db"]


async def test_restore_refuses_what_is_followed(tmp_path, database, stub, processes):
    following = replicate(tmp_path, database, stub.url)
    processes.append(following)
    await wait_until(lambda: following.events("caught_up"))
    refused = restore(tmp_path, stub, database, "--force")
    processes.append(refused)
    assert await asyncio.to_thread(refused.wait) == 1
    told = json.loads(refused.lines()[-1])
    assert (told["code"], "replicate" in told["hint"]) == ("database_in_use", True)


async def test_restore_refuses_a_damaged_image(tmp_path, database, stub, processes):
    async with followed(database, stub.url):
        await wait_until(lambda: committed(stub) == 0)
    held = stub.databases[NAME]
    held.pages[2] = b"\xff" * held.page_size
    target = tmp_path / "back.db"
    refused = restore(tmp_path, stub, target)
    processes.append(refused)
    assert await asyncio.to_thread(refused.wait) == 1
    assert not target.exists()
