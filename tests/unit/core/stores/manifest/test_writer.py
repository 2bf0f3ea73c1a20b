"""The writer: groups, neighbours, limits, and its end."""

import asyncio
import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from app.core.base.errors import (
    DiskFull,
    FatalError,
    InvariantViolation,
    ManifestBusy,
    ManifestFull,
    NotReady,
    StorageFailure,
)
from app.core.stores.manifest import ops
from app.core.stores.manifest.errors import MissingRow, NameTaken
from app.core.stores.manifest.records import TenantRecord
from app.core.stores.manifest.store import ManifestStore
from tests.unit.core.stores.manifest.builders import (
    MIB,
    batch,
    chunk,
    create,
    create_database,
    open_store,
    publish,
)
from tests.unit.core.stores.manifest.conftest import WriterHold

Arm = Callable[[str, BaseException], None]


def note(name: str, size: int = 1) -> ops.ManifestBatch:
    return batch(ops.PutMeta(name=name, value=b"x" * size))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - the writer is held: only this loop's tasks must run
        await asyncio.sleep(0)


async def together(
    store: ManifestStore, hold: WriterHold, *batches: ops.ManifestBatch
) -> list[ops.Receipt | BaseException]:
    """Commits the batches in one group."""
    async with asyncio.TaskGroup() as group:
        first = group.create_task(store.commit(note("first")))
        await hold.until_reached()
        waiting = asyncio.gather(*(store.commit(each) for each in batches), return_exceptions=True)
        await until(lambda: store._writer.waiting() == len(batches))
        hold.released.set()
        outcomes = await waiting
        await first
    return outcomes


async def test_group_commit_resolves_all(store: ManifestStore, hold: WriterHold) -> None:
    outcomes = await together(store, hold, *(note(f"n{i}") for i in range(100)))
    assert hold.groups == 2
    assert outcomes == [ops.Receipt(sequence=None, results=(None,))] * 100
    with store.read() as view:
        assert all(view.meta(f"n{i}") == b"x" for i in range(100))


async def test_a_failing_batch_takes_no_neighbour(store: ManifestStore, hold: WriterHold) -> None:
    hold.released.set()
    db_id = await create_database(store)
    hold.released.clear()
    hold.reached.clear()
    hold.groups = 0
    outcomes = await together(
        store,
        hold,
        batch(create("a")),
        batch(create("b"), ops.UpsertChunk(row=chunk(db_id)), create("a")),
        batch(create("b")),
        batch(publish(db_id, 1), ops.RemoveSegment(db_id=db_id, segment_id=1)),
        batch(publish(db_id, 1)),
    )
    assert hold.groups == 2
    kinds = [type(outcome) for outcome in outcomes]
    assert kinds == [ops.Receipt, NameTaken, ops.Receipt, MissingRow, ops.Receipt]
    with store.read() as view:
        assert [row.name for row in view.all_databases()] == ["db", "a", "b"]
        assert view.chunk_rows(db_id) == []
        assert view.database(db_id).generation == 1
        assert [change.sequence for change in view.change_log()] == [1, 2, 3, 4]


async def test_a_value_that_no_row_can_hold_fails_its_batch_alone(
    store: ManifestStore, hold: WriterHold
) -> None:
    outcomes = await together(
        store,
        hold,
        note("a"),
        batch(
            ops.PutMeta(name="b", value=b"x"),
            ops.PutTenant(row=TenantRecord(tenant="acme", limit_bytes=1 << 64)),
        ),
        note("c"),
    )
    assert [type(one) for one in outcomes] == [ops.Receipt, InvariantViolation, ops.Receipt]
    with store.read() as view:
        assert [view.meta(name) for name in "abc"] == [b"x", None, b"x"]
        assert view.tenants() == []


async def test_a_batch_sees_the_group_before_it(store: ManifestStore, hold: WriterHold) -> None:
    outcomes = await together(
        store, hold, batch(create("a")), batch(create("a")), batch(create("c"))
    )
    assert isinstance(outcomes[1], NameTaken)
    assert outcomes[0].results == (1,)
    assert outcomes[2].results == (2,)


async def test_the_queue_is_bounded(tmp_path: Path, hold: WriterHold) -> None:
    store = await open_store(tmp_path / "manifest", waiting_batches_max=2)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(store.commit(note("a")))]
        await hold.until_reached()
        tasks += [group.create_task(store.commit(note(name))) for name in "bc"]
        await asyncio.sleep(0)
        with pytest.raises(ManifestBusy) as caught:
            await store.commit(note("d"))
        assert caught.value.retry_after_seconds == 1
        hold.released.set()
    await store.commit(note("d"))
    await store.aclose()


async def test_close_commits_what_waits(tmp_path: Path, hold: WriterHold) -> None:
    store = await open_store(tmp_path / "manifest")
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(store.commit(note("n0")))]
        await hold.until_reached()
        tasks += [group.create_task(store.commit(note(f"n{i}"))) for i in range(1, 10)]
        await asyncio.sleep(0)
        closing = group.create_task(store.aclose())
        await until(lambda: store._writer._closing)
        with pytest.raises(NotReady):
            await store.commit(note("late"))
        hold.released.set()
    assert all(task.result().results == (None,) for task in tasks)
    assert closing.done()
    await store.aclose()
    store = await open_store(tmp_path / "manifest")
    with store.read() as view:
        assert all(view.meta(f"n{i}") for i in range(10))
    await store.aclose()


async def test_worker_threads_commit_too(store: ManifestStore) -> None:
    receipt = await asyncio.to_thread(store.commit_blocking, batch(create()))
    assert receipt.results == (1,)
    with pytest.raises(NameTaken):
        await asyncio.to_thread(store.commit_blocking, batch(create()))


async def test_a_cancelled_caller_takes_nobody_with_it(
    store: ManifestStore, hold: WriterHold
) -> None:
    going = asyncio.get_running_loop().create_task(store.commit(note("going")))
    await hold.until_reached()
    going.cancel()
    with pytest.raises(asyncio.CancelledError):
        await going
    hold.released.set()
    await store.commit(note("staying"))
    with store.read() as view:
        assert view.meta("going") == b"x"


async def test_map_full_refuses_whole_batches_and_goes_on(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "manifest", map_bytes=1 * MIB)
    big = batch(*(ops.PutMeta(name=f"big{i}", value=b"x" * 65_536) for i in range(40)))
    with pytest.raises(ManifestFull):
        await store.commit(big)
    with store.read() as view:
        assert all(view.meta(f"big{i}") is None for i in range(40))
    await store.commit(note("small"))
    await store.aclose()


async def test_map_full_in_a_group_hits_only_the_large(tmp_path: Path, hold: WriterHold) -> None:
    store = await open_store(tmp_path / "manifest", map_bytes=1 * MIB)
    outcomes = await together(
        store, hold, note("a"), note("huge", 2 * MIB), note("b"), batch(create())
    )
    assert [type(outcome) for outcome in outcomes] == [
        ops.Receipt,
        ManifestFull,
        ops.Receipt,
        ops.Receipt,
    ]
    with store.read() as view:
        assert (view.meta("a"), view.meta("huge"), view.meta("b")) == (b"x", None, b"x")
        assert view.last_sequence() == 1
    await store.aclose()


async def test_a_full_disk_costs_the_batch_and_no_more(store: ManifestStore, fail_at: Arm) -> None:
    fail_at("manifest.before_commit", OSError(errno.ENOSPC, "no room"))
    with pytest.raises(DiskFull):
        await store.commit(note("a"))
    fail_at("nowhere", OSError())
    with store.read() as view:
        assert view.meta("a") is None
    await store.commit(note("a"))


@pytest.mark.parametrize("place", ["before_apply", "mid_apply", "before_commit"])
async def test_a_failing_disk_ends_the_writer_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hold: WriterHold, place: str
) -> None:
    told: list[FatalError] = []
    store = await open_store(tmp_path / "manifest", on_fatal=told.append)

    def hit(name: str) -> None:
        hold(name)
        if name == f"manifest.{place}":
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("app.core.base.failpoints.fp", hit)
    first = asyncio.get_running_loop().create_task(store.commit(note("a")))
    await hold.until_reached()
    waiting = asyncio.gather(
        *(store.commit(note(f"n{i}")) for i in range(5)), return_exceptions=True
    )
    await asyncio.sleep(0)
    hold.released.set()
    with pytest.raises(StorageFailure):
        await first
    assert {type(outcome) for outcome in await waiting} == {StorageFailure}
    with pytest.raises(StorageFailure):
        await store.commit(note("late"))
    assert len(told) == 1
    with store.read() as view:
        assert view.meta("a") is None
    await store.aclose()


async def test_lost_between_commit_and_answer_is_unknown_but_there(
    tmp_path: Path, fail_at: Arm
) -> None:
    told: list[FatalError] = []
    store = await open_store(tmp_path / "manifest", on_fatal=told.append)
    fail_at("manifest.after_commit", OSError(errno.ENOSPC, "after the fact"))
    with pytest.raises(StorageFailure, match="not known"):
        await store.commit(note("a"))
    with store.read() as view:
        assert view.meta("a") == b"x"
    assert len(told) == 1
    await store.aclose()


async def test_many_submitters_share_their_commits(store: ManifestStore) -> None:
    async def submit(number: int) -> None:
        for turn in range(20):
            await store.commit(note(f"{number}-{turn}"))

    before = store._writer.groups
    async with asyncio.TaskGroup() as group:
        for number in range(64):
            group.create_task(submit(number))
    assert store._writer.groups - before < 64 * 20 / 6
    assert (await store.stats()).entries["schema"] >= 64 * 20
