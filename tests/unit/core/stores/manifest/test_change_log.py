"""The change log's cursors and its trimming: nothing that is needed goes, what is left replays."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.base.errors import CursorExpired, CursorNotFound, InvalidRequest
from app.core.stores.manifest import change_log, ops
from app.core.stores.manifest.change_log import CURSORS_MAX, trimmable_through
from app.core.stores.manifest.replay import replay
from app.core.stores.manifest.store import ManifestStore
from tests.unit.core.stores.manifest.builders import batch, create_database


async def put(store: ManifestStore, start: int | str, name: str = "c", principal: str = "p"):
    op = ops.PutCursor(principal=principal, name=name, start=start)
    return (await store.commit(batch(op))).results[0]


async def trim(store: ManifestStore, *, history: int = 0, lag_max: int = 1000) -> int:
    op = ops.TrimChangeLog(history_count=history, lag_count_max=lag_max)
    return (await store.commit(batch(op))).results[0]


async def change(store: ManifestStore, count: int) -> None:
    for _ in range(count):
        await store.commit(batch(ops.SetHealth(db_id=1, health="ok")))


@given(
    last=st.integers(0, 50),
    acknowledged=st.lists(st.integers(0, 50)),
    trimmed=st.integers(0, 50),
    history=st.integers(0, 20),
    lag=st.integers(1, 30),
)
def test_what_may_go(
    last: int, acknowledged: list[int], trimmed: int, history: int, lag: int
) -> None:
    trimmed = min(trimmed, last)
    acknowledged = [min(one, last) for one in acknowledged]
    through = trimmable_through(
        last=last, acknowledged=acknowledged, trimmed_through=trimmed,
        history_count=history, lag_count_max=lag,
    )  # fmt: skip
    assert trimmed <= through <= max(trimmed, last - history)
    for one in acknowledged:
        live = one >= trimmed and last - one <= lag
        assert not live or one >= through
    waiting = [one for one in acknowledged if one >= trimmed and last - one <= lag]
    if through < last - history:
        assert through == max(trimmed, min(waiting))


async def test_a_cursor_starts_where_it_is_told(store: ManifestStore) -> None:
    await create_database(store)
    await change(store, 4)
    assert (await put(store, "start"))[0].acknowledged == 0
    record, is_new = await put(store, "now")
    assert (record.acknowledged, is_new) == (5, False)
    record, is_new = await put(store, 3, name="other")
    assert (record.acknowledged, is_new) == (2, True)
    assert (await put(store, 6))[0].acknowledged == 5
    with pytest.raises(InvalidRequest):
        await put(store, 7)
    with store.read() as view:
        assert [row.name for row in view.cursors("p")] == ["c", "other"]
        assert view.cursors("q") == []


async def test_acknowledging_only_moves_on(store: ManifestStore) -> None:
    await create_database(store)
    await change(store, 4)
    await put(store, "start")

    async def ack(sequence: int) -> int:
        op = ops.AckCursor(principal="p", name="c", sequence=sequence)
        return (await store.commit(batch(op))).results[0].acknowledged

    assert await ack(3) == 3
    assert await ack(1) == 3
    with pytest.raises(InvalidRequest):
        await ack(6)
    with pytest.raises(CursorNotFound):
        await store.commit(batch(ops.AckCursor(principal="q", name="c", sequence=1)))
    await store.commit(batch(ops.DeleteCursor(principal="p", name="c")))
    with pytest.raises(CursorNotFound):
        await store.commit(batch(ops.DeleteCursor(principal="p", name="c")))


async def test_trimming_stops_at_the_slowest_live_cursor(store: ManifestStore) -> None:
    await create_database(store)
    await change(store, 9)
    await put(store, 5, name="slow")
    await put(store, "now", name="fast")
    assert await trim(store) == 4
    assert await trim(store) == 0
    with pytest.raises(CursorExpired):
        await put(store, 3)
    assert (await put(store, "start"))[0].acknowledged == 4
    assert await trim(store, lag_max=5) == 6  # "slow" is 6 behind
    for name in ("slow", "c"):
        with pytest.raises(CursorExpired):
            await store.commit(batch(ops.AckCursor(principal="p", name=name, sequence=9)))
    await store.commit(batch(ops.AckCursor(principal="p", name="fast", sequence=9)))
    await change(store, 3)
    assert await trim(store, history=2) == 0  # "fast" has not acknowledged them
    with store.read() as view:
        assert [one.sequence for one in view.change_log()] == [11, 12, 13]


async def test_what_is_left_replays_over_the_base(store: ManifestStore) -> None:
    for name in ("a", "b"):
        await create_database(store, name=name)
    await store.commit(batch(ops.SetDatabaseState(db_id=1, state="tombstoned")))
    await change(store, 2)
    await store.commit(batch(ops.RemoveDatabase(db_id=1)))
    for left in (5, 3, 1, 0):
        await trim(store, history=left)
        with store.read() as view:
            changes = view.change_log()
            assert len(changes) == left
            base, behind = view.change_base(), view.trimmed_through()
            assert replay(changes, base=base, behind=behind) == view.catalogue()
    await create_database(store, name="c")
    with store.read() as view:
        assert [one.sequence for one in view.change_log()] == [7]


async def test_one_transaction_trims_so_many(
    store: ManifestStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(change_log, "TRIM_CHANGES_MAX", 3)
    monkeypatch.setattr(change_log, "TRIM_OPS_MAX", 4)
    await create_database(store)
    await change(store, 5)
    await store.commit(batch(*[ops.SetHealth(db_id=1, health="ok")] * 4))
    await change(store, 2)
    assert [await trim(store) for _ in range(5)] == [3, 3, 1, 2, 0]


async def test_a_principal_has_so_many_cursors(store: ManifestStore) -> None:
    await store.commit(
        batch(
            *(
                ops.PutCursor(principal="p", name=f"c{number}", start="now")
                for number in range(CURSORS_MAX)
            )
        )
    )
    with pytest.raises(InvalidRequest):
        await put(store, "now", name="more")
    await put(store, "now", name="c1")
    await put(store, "now", name="more", principal="q")
