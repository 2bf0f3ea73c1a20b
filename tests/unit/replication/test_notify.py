import asyncio

from app.replication.notify import Notifier
from tests.helpers.wait import wait_until


async def test_tells_of_writes_and_of_names(tmp_path):
    told = []
    file = tmp_path / "a.db-wal"
    with Notifier() as notifier:
        assert notifier.watch(tmp_path, lambda name, names: told.append((name, names)))
        file.touch()
        await wait_until(lambda: ("a.db-wal", True) in told)
        file.write_bytes(b"x")
        await wait_until(lambda: ("a.db-wal", False) in told)
        file.unlink()
        await wait_until(lambda: told[-1] == ("a.db-wal", True))
    file.touch()
    await asyncio.sleep(0)
    assert told[-1] == ("a.db-wal", True)


async def test_says_what_it_cannot_watch(tmp_path):
    with Notifier() as notifier:
        assert not notifier.watch(tmp_path / "missing", lambda name, names: None)
    assert not notifier.watch(tmp_path, lambda name, names: None)


async def test_wakes_whom_a_name_concerns_and_all_when_the_directory_goes(tmp_path):
    directory = tmp_path / "data"
    directory.mkdir()
    told = {"a": [], "b": []}

    def listener(who):
        return lambda name, names: told[who].append(name)

    one, two = listener("a"), listener("b")
    with Notifier() as notifier:
        for _ in range(2):  # again is harmless
            assert notifier.watch(directory, one, {"a.db", "a.db-wal"})
        assert notifier.watch(directory, two, {"b.db"})
        (directory / "a.db-wal").touch()
        await wait_until(lambda: told["a"] == ["a.db-wal"])
        (directory / "b.db").touch()
        await wait_until(lambda: told["b"] == ["b.db"])
        notifier.forget(two)
        directory.rename(tmp_path / "old")
        await wait_until(lambda: told["a"] == ["a.db-wal", ""])
        directory.mkdir()
        assert notifier.watch(directory, one, {"a.db"}), "the one that is there now"
        (directory / "a.db").touch()
        await wait_until(lambda: told["a"] == ["a.db-wal", "", "a.db"])
    assert told["b"] == ["b.db"]
