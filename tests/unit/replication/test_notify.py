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
