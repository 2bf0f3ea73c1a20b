"""Databases over a real manifest and real logs: made by several at once, and listed meanwhile."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.core.base.events import Events
from app.core.services.databases import Databases, DatabaseSpec
from app.core.services.directory import DatabaseDirectory
from app.core.stores.manifest import ops
from app.core.stores.manifest.records import WalSegmentRecord
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.wal.store import WalStore
from tests.helpers.paged import NoCatalog, fail
from tests.unit.core.stores.manifest.builders import FakeClock, batch, open_store

SPEC = DatabaseSpec(engine="append_only")


class Bench:
    def __init__(self, manifest: ManifestStore, databases: Databases, wal: WalStore) -> None:
        self.manifest, self.databases, self.wal = manifest, databases, wal


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    clock = FakeClock()
    manifest = await open_store(tmp_path / "manifest")
    wal = WalStore(
        tmp_path / "wal", clock=clock, events=Events(), catalog=NoCatalog(), on_fatal=fail
    )
    directory = DatabaseDirectory(manifest, wal, events=Events())
    databases = Databases(manifest, directory, clock=clock, now_us=lambda: 0, events=Events())
    yield Bench(manifest, databases, wal)
    await wal.aclose()
    await manifest.aclose()


async def test_several_who_make_one_database_get_the_same(bench: Bench) -> None:
    made = await asyncio.gather(*(bench.databases.create("acme", "db", SPEC) for _ in range(5)))
    assert sorted(is_new for _, is_new in made) == [False] * 4 + [True]
    assert {status.record.db_id for status, _ in made} == {1}


async def test_a_database_that_is_being_made_hides_no_other(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.databases.create("acme", "first", SPEC)
    reached, go_on = asyncio.Event(), asyncio.Event()
    open_log = bench.wal.open_log

    async def open_late(*args, **options):
        reached.set()
        await go_on.wait()
        return await open_log(*args, **options)

    monkeypatch.setattr(bench.wal, "open_log", open_late)
    async with asyncio.TaskGroup() as group:
        making = group.create_task(bench.databases.create("acme", "second", SPEC))
        await reached.wait()
        names = [one.record.name for one in bench.databases.list("acme", limit=10, after=None)]
        assert names == ["first"]
        go_on.set()
    assert making.result()[1]
    assert len(bench.databases.list("acme", limit=10, after=None)) == 2


async def test_a_database_whose_log_could_not_be_opened_is_opened_when_it_is_asked_for_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_log = bench.wal.open_log

    async def fail_once(*args, **options):
        monkeypatch.setattr(bench.wal, "open_log", open_log)
        raise OSError(24, "too many open files")

    monkeypatch.setattr(bench.wal, "open_log", fail_once)
    with pytest.raises(OSError, match="too many"):
        await bench.databases.create("acme", "db", SPEC)
    status, is_new = await bench.databases.create("acme", "db", SPEC)
    assert (status.health, is_new) == ("ok", False)


async def test_two_who_accept_a_loss_at_once_are_both_answered(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, _ = await bench.databases.create("acme", "db", SPEC)
    db_id = status.record.db_id
    row = WalSegmentRecord(db_id=db_id, segment_id=7, first_lsn=7, ceiling_lsn=99)
    await bench.manifest.commit(batch(ops.RegisterSegment(row=row)))
    lost: Any = SimpleNamespace(
        health="wal_lost", next_lsn=99, lost_segment_ids=(7,), lost_from_lsn=7, wal_bytes=0
    )

    async def acknowledge_loss() -> None:
        lost.health = "ok"

    lost.acknowledge_loss = acknowledge_loss
    monkeypatch.setattr(bench.wal, "log", lambda db_id: lost)
    both = await asyncio.gather(*(bench.databases.acknowledge_loss("acme", "db") for _ in range(2)))
    assert [one.health for one in both] == ["ok", "ok"]
    assert [one.record.floor_lsn for one in both] == [99, 99]
