"""Reads: one moment, copied out, and never for long."""

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from app.core.base.errors import (
    BopError,
    FormatFromFuture,
    InvariantViolation,
    ManifestBusy,
    ManifestFull,
)
from app.core.base.events import Events, Level
from app.core.stores.manifest import ops
from app.core.stores.manifest.errors import CorruptRow, ViewExpired
from app.core.stores.manifest.records import TenantRecord
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.manifest.tables import DATABASES, SCHEMA, TENANTS, number_key
from app.core.stores.manifest.view import ManifestView
from tests.unit.core.stores.manifest.builders import (
    MIB,
    FakeClock,
    batch,
    create_database,
    open_store,
    segment,
)


def note(size: int = 1) -> ops.ManifestBatch:
    return batch(ops.PutMeta(name="note", value=b"x" * size))


async def test_a_view_is_one_moment(store: ManifestStore) -> None:
    with store.read() as view:
        await store.commit(note())
        assert view.meta("note") is None
    with store.read() as view:
        assert view.meta("note") == b"x"
    with pytest.raises(InvariantViolation):
        view.meta("note")


async def test_parked_reader_is_ended_by_age(tmp_path: Path, clock: FakeClock) -> None:
    store = await open_store(
        tmp_path / "manifest", clock=clock, read_age_max_seconds=10.0, map_bytes=1 * MIB
    )

    async def rewrite() -> None:
        for _ in range(40):
            await store.commit(note(65_536))

    with store.read() as view:
        clock.monotonic_seconds += 10.0
        await store.commit(note())
        assert view.meta("node_id")
        clock.monotonic_seconds += 0.1
        await store.commit(note())
        with pytest.raises(ViewExpired):
            view.meta("node_id")
    with store.read():
        with pytest.raises(ManifestFull):
            await rewrite()
        clock.monotonic_seconds += 11.0
        await store.commit(note())  # the parked view is ended, its pages come back
        await rewrite()
    await store.aclose()


async def test_a_scan_under_way_ends_itself(store: ManifestStore, clock: FakeClock) -> None:
    db_id = await create_database(store)
    await store.commit(
        batch(*(ops.RegisterSegment(row=segment(db_id, number)) for number in range(50)))
    )
    reached, go_on = threading.Event(), threading.Event()

    def read(view: ManifestView) -> int:
        with view._access as rows:
            scan = rows.scan(SCHEMA)
            next(scan)
            reached.set()
            assert go_on.wait(30)
            return sum(1 for _ in scan)

    reading = asyncio.get_running_loop().create_task(store.read_in_thread(read))
    assert await asyncio.to_thread(reached.wait, 30)
    clock.monotonic_seconds += 60.0
    await store.commit(note())
    go_on.set()
    with pytest.raises(ViewExpired):
        await reading
    assert (await store.stats()).readers == 0


async def test_reader_table_full_recovers(tmp_path: Path, clock: FakeClock) -> None:
    store = await open_store(tmp_path / "manifest", clock=clock, max_readers=4)
    held = [store.read() for _ in range(4)]
    views = [each.__enter__() for each in held]
    with pytest.raises(ManifestBusy) as caught, store.read():
        pass
    assert caught.value.retry_after_seconds == 1
    held.pop().__exit__(None, None, None)
    with store.read() as view:
        assert view.meta("node_id")
    clock.monotonic_seconds += 60.0
    with store.read(), store.read() as view:  # the second needs a slot of those too old
        assert view.meta("node_id")
    with pytest.raises(ViewExpired):
        views[0].meta("node_id")
    for each in held:
        each.__exit__(None, None, None)
    await store.aclose()


async def test_read_in_thread(store: ManifestStore) -> None:
    db_id = await create_database(store)
    caller = threading.get_ident()

    def read(view: ManifestView) -> tuple[str, bool]:
        return view.database(db_id).name, threading.get_ident() != caller

    assert await store.read_in_thread(read) == ("db", True)


async def test_stats(store: ManifestStore) -> None:
    await create_database(store)
    with store.read():
        stats = await store.stats()
    assert stats.map_bytes == 64 * MIB
    assert 0 < stats.used_bytes <= stats.high_water_bytes < MIB
    assert (stats.readers, stats.readers_max) == (1, 16)
    assert (stats.last_sequence, stats.waiting_batches) == (1, 0)
    assert stats.entries["databases"] == stats.entries["change_log"] == 1
    assert stats.last_transaction_id > 0


@pytest.mark.parametrize(
    ("raw", "kind"), [(b"\x91\x7f", FormatFromFuture), (b"rubbish", CorruptRow)]
)
async def test_rows_that_cannot_be_read_are_told_with_their_place(
    tmp_path: Path, raw: bytes, kind: type[BopError]
) -> None:
    told: list[tuple[object, object]] = []

    def sink(name: str, _: Level, fields: Mapping[str, object]) -> None:
        if name == "manifest.row_unreadable":
            told.append((fields["table"], fields["key"]))

    events = Events(sink)
    store = await open_store(tmp_path / "manifest", events=events)
    await store.commit(batch(ops.PutTenant(row=TenantRecord(tenant="zeta"))))
    transaction = store._environment.begin(write=True)
    for key in (b"acme", b"beta"):
        transaction.put(key, raw, db=store._environment.handles[TENANTS])
    transaction.commit()
    with store.read() as view:
        for look in (lambda: view.tenant("acme"), view.tenants):
            with pytest.raises(kind) as caught:
                look()
            assert caught.value.fields.items() >= {"table": "tenants", "key": "61636d65"}.items()
        assert view.tenant("zeta") is not None
        found = view.unreadable_rows()
        keys = ["61636d65", "62657461"]
        assert [where for where, _ in found] == [f"manifest/tenants/{key}" for key in keys]
        assert view.unreadable_rows(limit=1) == found[:1]
    assert told == [("tenants", "61636d65")] * 2
    await store.aclose()


async def test_a_batch_that_meets_a_row_that_cannot_be_read_is_refused_and_told(
    tmp_path: Path,
) -> None:
    told: list[tuple[str, object]] = []
    events = Events(lambda name, _, fields: told.append((name, fields.get("table"))))
    store = await open_store(tmp_path / "manifest", events=events)
    db_id = await create_database(store)
    transaction = store._environment.begin(write=True)
    transaction.put(number_key(db_id), b"rubbish", db=store._environment.handles[DATABASES])
    transaction.commit()
    with pytest.raises(CorruptRow):
        await store.commit(batch(ops.SetHealth(db_id=db_id, health="ok")))
    assert ("manifest.row_unreadable", "databases") in told
    await create_database(store, name="other")
    await store.aclose()


async def test_views_end_with_the_store(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "manifest")
    held = store.read()
    view = held.__enter__()
    await store.aclose()
    with pytest.raises(InvariantViolation):
        view.meta("node_id")
    held.__exit__(None, None, None)
    with pytest.raises(InvariantViolation), store.read():
        pass
