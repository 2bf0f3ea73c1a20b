"""The environment on disk, its schema steps and its backups."""

import fnmatch
from pathlib import Path

import lmdb
import pytest

from app.core.base.clock import SeededRandomness
from app.core.base.errors import FormatFromFuture, InternalError, StartRefused
from app.core.base.events import Events
from app.core.base.ids import is_ulid
from app.core.stores.manifest import ops
from app.core.stores.manifest.environment import is_disk_full
from app.core.stores.manifest.ledger import MigrationStep, MigrationTransaction
from app.core.stores.manifest.tables import SCHEMA, TABLES, ledger_key
from migrations.runner import load_steps
from tests.unit.core.stores.manifest.builders import batch, create_database, open_store


def names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


async def test_a_manifest_keeps_its_identity(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "manifest", randomness=SeededRandomness(1))
    node_id = store.node_id
    assert is_ulid(node_id)
    await create_database(store)
    await store.aclose()
    store = await open_store(tmp_path / "manifest")
    assert store.node_id == node_id
    with store.read() as view:
        assert view.meta("created_at") == b"1700000000000000"
        assert view.database_id("acme", "db") == 1
        assert set(view.counts()) == {table.name for table in TABLES}
    await store.aclose()
    assert sorted(names(tmp_path)) == ["manifest", "manifest.lock"]


async def test_durability_flags_are_the_default_ones(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "manifest")
    flags = store._environment._environment.flags()
    assert (flags["sync"], flags["metasync"]) == (True, True)
    assert (flags["writemap"], flags["map_async"]) == (False, False)
    await store.aclose()


async def test_one_owner(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "manifest")
    with pytest.raises(StartRefused, match="Another process"):
        await open_store(tmp_path / "manifest")
    await store.aclose()
    await (await open_store(tmp_path / "manifest")).aclose()


async def test_remains_of_a_broken_creation_are_removed(tmp_path: Path) -> None:
    remains = tmp_path / ".manifest.new"
    remains.mkdir()
    (remains / "data.mdb").write_bytes(b"half of it")
    (tmp_path / "manifest").mkdir()
    store = await open_store(tmp_path / "manifest")
    await create_database(store)
    await store.aclose()
    assert not remains.exists()


@pytest.mark.parametrize(("first", "last"), [(0, 2), (2, None)], ids=["its head", "its pages"])
async def test_a_damaged_file_is_refused(tmp_path: Path, first: int, last: int | None) -> None:
    path = tmp_path / "manifest"
    store = await open_store(path)
    await create_database(store)
    await store.aclose()
    data = bytearray((path / "data.mdb").read_bytes())
    page = slice(first * 4096, None if last is None else last * 4096)
    data[page] = bytes(each ^ 0x5A for each in data[page])
    (path / "data.mdb").write_bytes(data)
    with pytest.raises(StartRefused, match=r"manifest"):
        await open_store(path)
    assert (path / "data.mdb").read_bytes() == data


async def test_what_is_no_manifest_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "manifest"
    path.mkdir()
    (path / "precious").write_bytes(b"x")
    with pytest.raises(StartRefused, match="not empty"):
        await open_store(path)
    (path / "precious").rename(path / "data.mdb")
    with pytest.raises(StartRefused, match="cannot be opened"):
        await open_store(path)
    (path / "data.mdb").unlink()
    (path / "lock.mdb").unlink(missing_ok=True)
    lmdb.open(str(path), max_dbs=2).close()
    with pytest.raises(StartRefused, match="no manifest"):
        await open_store(path)


def renaming(transaction: MigrationTransaction) -> None:
    for key, raw in transaction.scan("schema", b"meta/old"):
        transaction.put("schema", b"meta/new", raw)
        transaction.delete("schema", key)


def failing(transaction: MigrationTransaction) -> None:
    transaction.put("schema", b"meta/half", b"1")
    raise RuntimeError("no")


RENAME = MigrationStep(number=91, name="rename", apply=renaming)
FAIL = MigrationStep(number=92, name="fail", apply=failing)


async def test_pending_steps_run_once_after_a_backup(tmp_path: Path) -> None:
    seen: list[str] = []

    def note(name: str, level: str, fields: object) -> None:
        if name != "manifest.committed":
            seen.append(name)

    events = Events(note)
    store = await open_store(tmp_path / "manifest", events=events)
    await store.commit(batch(ops.PutMeta(name="old", value=b"kept")))
    await store.aclose()
    assert seen == ["manifest.migrated"]
    for _ in range(2):
        store = await open_store(
            tmp_path / "manifest", migrations=[*load_steps(), RENAME], events=events
        )
        with store.read() as view:
            assert (view.meta("old"), view.meta("new")) == (None, b"kept")
        await store.aclose()
    assert seen == ["manifest.migrated", "manifest.backed_up", "manifest.migrated"]
    (backup,) = fnmatch.filter(names(tmp_path), "manifest-before-0091-*")
    store = await open_store(tmp_path / backup)
    with store.read() as view:
        assert view.meta("old") == b"kept"
    await store.aclose()


async def test_steps_run_whole_or_not_at_all(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "manifest")
    await store.commit(batch(ops.PutMeta(name="old", value=b"kept")))
    await store.aclose()
    with pytest.raises(StartRefused, match="0092"):
        await open_store(tmp_path / "manifest", migrations=[*load_steps(), RENAME, FAIL])
    store = await open_store(tmp_path / "manifest")
    with store.read() as view:
        assert view.meta("old") == b"kept"
        assert view.meta("half") is None
    await store.aclose()


async def test_a_manifest_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "manifest", migrations=[*load_steps(), RENAME])
    await store.aclose()
    before = (tmp_path / "manifest" / "data.mdb").read_bytes()
    with pytest.raises(FormatFromFuture, match="rename"):
        await open_store(tmp_path / "manifest")
    assert (tmp_path / "manifest" / "data.mdb").read_bytes() == before
    other = MigrationStep(number=91, name="other", apply=renaming)
    with pytest.raises(FormatFromFuture, match="rename"):
        await open_store(tmp_path / "manifest", migrations=[*load_steps(), other])


async def test_a_ledger_that_cannot_be_read_refuses_the_start(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "manifest")
    transaction = store._environment.begin(write=True)
    transaction.put(ledger_key(1), b"rubbish", db=store._environment.handles[SCHEMA])
    transaction.commit()
    await store.aclose()
    with pytest.raises(StartRefused, match="ledger of schema steps"):
        await open_store(tmp_path / "manifest")


async def test_numbers_are_unique(tmp_path: Path) -> None:
    with pytest.raises(StartRefused, match="same number"):
        await open_store(tmp_path / "manifest", migrations=[*load_steps(), *load_steps()])


def test_steps_are_loaded_in_order() -> None:
    assert [(step.number, step.name) for step in load_steps()] == [
        (1, "initial"),
        (2, "blob_references"),
    ]


async def test_a_backup_opens_and_equals(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "manifest")
    await create_database(store)
    for _ in range(50):
        await store.commit(batch(ops.PutMeta(name="note", value=b"x" * 20_000)))
    backup = await store.backup(tmp_path / "backups" / "one")
    await store.commit(batch(ops.PutMeta(name="later", value=b"x")))
    assert backup.bytes < (tmp_path / "manifest" / "data.mdb").stat().st_size
    copy = await open_store(backup.path)
    with store.read() as view, copy.read() as copied:
        assert copied.catalogue() == view.catalogue()
        assert copied.change_log() == view.change_log()
        assert copied.meta("note") == view.meta("note")
        assert copied.meta("later") is None
    assert copy.node_id == store.node_id
    with pytest.raises(InternalError, match="exists already"):
        await store.backup(backup.path)
    await copy.aclose()
    await store.aclose()


def test_an_eio_is_a_full_disk_only_where_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Room:
        f_frsize = 4096
        f_bavail = 10

    def failed(code: int) -> lmdb.Error:
        error = lmdb.Error("mdb_txn_commit")
        error.code = code
        return error

    assert not is_disk_full(failed(5), tmp_path)
    assert not is_disk_full(failed(-30795), tmp_path)
    assert is_disk_full(failed(28), tmp_path)
    monkeypatch.setattr("os.statvfs", lambda path: Room)
    assert is_disk_full(failed(5), tmp_path)
    assert not is_disk_full(failed(-30795), tmp_path)
