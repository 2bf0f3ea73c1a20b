"""What goes with a generation and what stays, against brute force (fault row 39)."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from app.core.base.errors import GenerationExpired
from app.core.retention.expiry import gaps
from app.core.retention.policy import judge
from app.core.retention.removal import DatabaseRemoval
from app.core.stores.manifest import ops
from app.core.stores.manifest.errors import GenerationGone, RowPinned
from app.core.stores.manifest.records import Retention, SnapshotRecord
from tests.helpers.fake_clock import FakeClock as TickingClock
from tests.unit.core.retention.world import World, flattened
from tests.unit.core.stores.manifest.builders import batch, open_store

number = st.integers(0, 5)
steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("publish"),
            number,
            st.integers(0, 1),
            st.sampled_from(["base", "delta", "delta", "merge", "underlay", "drop", "cut"]),
        ),
        st.tuples(st.just("fork"), number, number, st.just("")),
        st.tuples(st.just("expire"), number, number, st.just("")),
        st.tuples(st.just("hold"), number, number, st.just("")),
        st.tuples(st.just("delete"), number, number, st.just("")),
    ),
    min_size=10,
    max_size=40,
)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    store = await open_store(tmp_path / "manifest")
    yield World(store)
    await store.aclose()


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=steps)
def test_what_stays_is_what_can_be_read(steps: list[tuple[str, int, int, str]]) -> None:
    async def run() -> None:
        with tempfile.TemporaryDirectory() as directory:
            store = await open_store(Path(directory) / "manifest")
            world = World(store)
            await world.create()
            for step in steps:
                await take(world, *step)
            await check(world)
            world.let_go()
            await check(world)
            for db_id in world.alive():
                await world.delete(db_id)
            await check(world)
            with store.read() as view:
                assert view.all_databases() == []
            await store.aclose()

    asyncio.run(run())


async def take(world: World, kind: str, which: int, nth: int, action: str) -> None:
    alive = world.alive()
    if not alive:
        alive = [await world.create()]
    db_id = alive[which % len(alive)]
    generations = [one.generation for one in world.generations(db_id)]
    match kind:
        case "publish":
            await world.publish(db_id, nth, action)
        case "delete" if which == nth:
            await world.delete(db_id)
        case "fork" if generations and len(alive) < 5:
            await world.fork(db_id, generations[nth % len(generations)])
        case "hold" if generations:
            world.hold(db_id, generations[nth % len(generations)])
        case "expire" if len(generations) > 1:
            await world.expiry.expire(db_id, generations[nth % len(generations) : -1])
        case _:
            pass


async def check(world: World) -> None:
    before = {place: world.content(*place) for place in world.readable()}
    await world.settle()
    after = {place: world.content(*place) for place in world.readable()}
    note(f"{len(before)} readable, {len(world.keys)} blobs")
    assert after == before
    reachable = flattened(before)
    assert world.named() == reachable
    queued = world.queued()
    assert not reachable & queued.keys()
    assert world.keys - reachable <= queued.keys()
    assert all(queued.values())


async def test_a_base_stays_while_a_delta_is_encoded_against_it(world: World) -> None:
    db_id = await world.create()
    for action in ("base", "base", "delta", "underlay"):
        await world.publish(db_id, 0, action)
    content = world.content(db_id, 4)
    assert ("delta-1-0-3", "base-1-0-2") in content
    removed = await world.expiry.expire(db_id, [1, 2, 3])
    assert (removed.generations, removed.rows) == (3, 1)
    assert world.content(db_id, 4) == content
    assert world.named() == {"base-1-0-2", "delta-1-0-3", "underlay-1-0-4"}
    await world.publish(db_id, 0, "base")
    await world.expiry.expire(db_id, [4])
    assert world.named() == {"base-1-0-5"}


async def test_a_blob_that_a_fork_has_taken_over_stays(world: World) -> None:
    db_id = await world.create()
    await world.publish(db_id, 0, "base")
    fork = await world.fork(db_id, 1)
    await world.publish(fork, 0, "delta")  # the fork's own row names the parent's blob now
    await world.delete(db_id)
    await world.settle()
    assert world.alive() == [fork]
    assert "base-1-0-1" in world.named()
    assert "base-1-0-1" not in world.queued()
    assert len(world.content(fork, 2)) == 2


async def test_a_deleted_fork_reads_through_its_parent_to_the_end(world: World) -> None:
    db_id = await world.create()
    await world.publish(db_id, 0, "base")
    fork = await world.fork(db_id, 1)
    world.hold(fork, 1)
    content = world.content(fork, 1)
    await world.publish(db_id, 0, "base")
    await world.delete(fork)
    await world.expiry.expire(db_id, [1])
    await world.settle()
    assert world.content(fork, 1) == content == (("base-1-0-1",),)
    world.let_go()
    await world.settle()
    assert world.named() == {"base-1-0-2"}


def test_gaps() -> None:
    assert gaps([2, 9], [4, 5]) == [(2, 9)]
    assert gaps([3], [1, 2]) == [(0, 3)]
    assert gaps([1, 3, 5], [2, 4]) == [(1, 3), (3, 5)]
    assert gaps([], [1]) == [(0, None)]


async def test_a_reader_keeps_its_generation_and_nobody_begins_on_one_that_goes(
    world: World,
) -> None:
    db_id = await world.create()
    for _ in range(3):
        await world.publish(db_id, 0, "base")
    world.hold(db_id, 1)
    content = world.content(db_id, 1)
    removed = await world.expiry.expire(db_id, [1, 2])
    assert (removed.generations, removed.finished) == (1, False)
    assert world.content(db_id, 1) == content
    reopen = world.pins.close(db_id, 3)
    assert reopen is not None
    with pytest.raises(GenerationExpired):
        world.pins.pin(db_id, 3)
    reopen()
    world.pins.pin(db_id, 3)()
    world.let_go()
    assert (await world.expiry.expire(db_id, [1])).generations == 1
    assert world.named() == {"base-1-0-3"}


async def test_a_snapshot_or_fork_made_meanwhile_refuses_the_removal(world: World) -> None:
    """The decision is over a view; the transaction looks again."""
    db_id = await world.create()
    for _ in range(2):
        await world.publish(db_id, 0, "base")
    row = SnapshotRecord(
        db_id=db_id, name="s", generation=1, last_lsn=10, page_count=1, created_at_us=1
    )
    await world.store.commit(batch(ops.CreateSnapshot(row=row)))
    removed = await world.expiry.expire(db_id, [1])
    assert (removed.generations, removed.rows, removed.finished) == (0, 0, False)
    await world.store.commit(batch(ops.DeleteSnapshot(db_id=db_id, name="s")))
    fork = await world.fork(db_id, 1)
    removed = await world.expiry.expire(db_id, [1])
    assert (removed.generations, removed.rows) == (1, 0)
    with pytest.raises(RowPinned):
        await world.store.commit(batch(ops.DeleteChunk(db_id=db_id, chunk_id=0, generation=1)))
    with pytest.raises(GenerationGone):
        await world.fork(db_id, 1)
    await world.publish(fork, 0, "base")
    await world.expiry.expire(fork, [1])
    await world.settle()
    assert world.named() == {"base-1-0-2", f"base-{fork}-0-2"}


async def test_what_a_crash_left_is_found_by_the_first_pass(world: World) -> None:
    db_id = await world.create()
    for _ in range(3):
        await world.publish(db_id, 0, "base")
    await world.store.commit(
        batch(*(ops.DeleteGeneration(db_id=db_id, generation=one) for one in (1, 2)))
    )
    assert len(world.named()) == 3
    await world.retention.run(world.now_us, everything=False)
    assert world.named() == {"base-1-0-3"}


async def test_retention_takes_what_its_time_is_over(world: World) -> None:
    db_id = await world.create(Retention(keep_seconds=60, minimum_generations=1))
    for _ in range(3):
        await world.publish(db_id, 0, "base")
        world.clock.wall_seconds += 30
    # superseded 60 s, 30 s and not at all ago
    await world.retention.run(world.now_us, everything=False)
    assert [one.generation for one in world.generations(db_id)] == [2, 3]
    world.clock.wall_seconds += 29
    await world.retention.run(world.now_us, everything=False)
    assert [one.generation for one in world.generations(db_id)] == [2, 3]
    world.clock.wall_seconds += 1
    await world.retention.run(world.now_us, everything=False)
    assert [one.generation for one in world.generations(db_id)] == [3]


async def test_a_generation_without_its_document_stays(world: World) -> None:
    """I3: whatever the policy says."""
    db_id = await world.create(Retention(keep_seconds=0, minimum_generations=1))
    await world.publish(db_id, 0, "base")
    with world.store.read() as view:
        row = view.generation(db_id, 1)
    unstored = msgspec.structs.replace(row, document_stored=False)
    await world.store.commit(batch(ops.RestoreGeneration(row=unstored)))
    await world.publish(db_id, 0, "base")
    await world.retention.run(world.now_us, everything=True)
    assert [one.generation for one in world.generations(db_id)] == [1, 2]
    stored = ops.AdvanceCheckpointed(db_id=db_id, generation=1, lsn=1)
    await world.store.commit(batch(stored))  # and then it goes, without anyone asking
    await world.retention.run(world.now_us, everything=False)
    assert [one.generation for one in world.generations(db_id)] == [2]


@pytest.mark.parametrize("keep_seconds", [None, 60])
async def test_what_is_kept_for_its_number_is_not_judged_again(
    world: World, monkeypatch: pytest.MonkeyPatch, keep_seconds: int | None
) -> None:
    judged: list[int] = []

    def count(generations, rule):
        judged.append(rule.newest)
        return judge(generations, rule)

    monkeypatch.setattr("app.core.retention.policy_pass.judge", count)
    db_id = await world.create(
        Retention(keep_generations=9, keep_seconds=keep_seconds, minimum_generations=1)
    )
    for _ in range(3):
        await world.publish(db_id, 0, "base")
    world.clock.wall_seconds += 3600
    for _ in range(5):
        await world.retention.run(world.now_us, everything=False)
    assert judged == [3]


async def test_a_generation_goes_when_its_snapshot_does(world: World) -> None:
    db_id = await world.create(Retention(keep_seconds=None, minimum_generations=1))
    await world.publish(db_id, 0, "base")
    snapshot = SnapshotRecord(
        db_id=db_id, name="s", generation=1, last_lsn=1, page_count=1, created_at_us=1
    )
    await world.store.commit(batch(ops.CreateSnapshot(row=snapshot)))
    await world.publish(db_id, 0, "base")
    assert (await world.retention.run(5, everything=False)).generations == 0
    await world.store.commit(batch(ops.DeleteSnapshot(db_id=db_id, name="s")))
    assert (await world.retention.run(5, everything=False)).generations == 1


async def test_a_deleted_database_whose_readers_are_slow_holds_up_no_other(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, quick = [await world.create() for _ in range(2)]
    clock = TickingClock()
    pinned = SimpleNamespace(is_pinned=True)

    def log(db_id: int):
        return pinned if db_id == slow else SimpleNamespace(is_pinned=False)

    monkeypatch.setattr(world.wal, "log", log)
    removal = DatabaseRemoval(world.store, world.wal, world.expiry, clock=clock)
    for db_id in (slow, quick):
        await world.publish(db_id, 0, "base")
        await world.delete(db_id)
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(removal.remove(slow))
        await clock.until_sleeping()
        async with asyncio.timeout(10):
            assert (await removal.remove(quick)).generations == 1
        assert not waiting.done()
        pinned.is_pinned = False
        clock.advance(1)
    assert world.wal.dropped == [quick, slow]
