"""What a cursor is given: behind its acknowledgement, seen tenants only, as it comes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from app.core.base.errors import CursorExpired, CursorNotFound
from app.core.services import change_feed
from app.core.services.change_feed import ChangeFeed
from app.core.stores.manifest import ops
from app.core.stores.manifest.store import ManifestStore
from tests.unit.core.stores.manifest.builders import batch, create_database, open_store


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[ManifestStore]:
    store = await open_store(tmp_path / "manifest")
    yield store
    await store.aclose()


def all_of_them(tenant: str) -> bool:
    del tenant
    return True


async def test_reading_begins_behind_what_is_acknowledged(store: ManifestStore) -> None:
    feed = ChangeFeed(store)
    for name in "abcd":
        await create_database(store, name=name)
    await feed.put("p", "c", "start")

    async def read(after: int | None = None, limit: int = 10) -> list[int]:
        found = await feed.read("p", "c", limit=limit, after=after, sees=all_of_them)
        return [one.sequence for one in found]

    assert await read() == [1, 2, 3, 4]
    assert await read(limit=2) == [1, 2]
    assert await read(after=2, limit=1) == [3]
    await feed.ack("p", "c", 3)
    assert await read() == [4] == await read(after=1)
    with pytest.raises(CursorNotFound):
        await feed.read("q", "c", limit=1, after=None, sees=all_of_them)


async def test_a_cursor_left_behind_has_expired(store: ManifestStore) -> None:
    feed = ChangeFeed(store)
    await create_database(store)
    await feed.put("p", "c", "start")
    await create_database(store, name="b")
    assert not feed.get("p", "c").expired
    await store.commit(batch(ops.TrimChangeLog(history_count=0, lag_count_max=1)))
    assert feed.get("p", "c").expired
    with pytest.raises(CursorExpired):
        await feed.read("p", "c", limit=1, after=None, sees=all_of_them)
    status, is_new = await feed.put("p", "c", "start")
    assert (is_new, status.expired) == (False, False)


async def test_unseen_changes_are_passed_over_and_do_not_hold_the_log(
    store: ManifestStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(change_feed, "READ_AT_ONCE", 3)
    feed = ChangeFeed(store)
    await feed.put("p", "c", "start")

    async def read(after: int | None = None) -> list[int]:
        found = await feed.read("p", "c", limit=10, after=after, sees=lambda one: one == "acme")
        return [one.sequence for one in found]

    for name in "abcd":
        await create_database(store, name=name, tenant="zeta")
    assert await read() == []
    assert feed.get("p", "c").record.acknowledged == 4
    for name in "abc":
        await create_database(store, name=name, tenant="other")
    await create_database(store)
    assert await read() == [8] == await read()
    assert feed.get("p", "c").record.acknowledged == 7
    for name in "efgh":
        await create_database(store, name=name, tenant="zeta")
    assert await read(8) == []
    assert feed.get("p", "c").record.acknowledged == 7  # 8 was given, but not acknowledged
    await feed.ack("p", "c", 8)
    assert await read(8) == []
    assert feed.get("p", "c").record.acknowledged == 12


async def test_following_goes_on_as_changes_come(store: ManifestStore) -> None:
    feed = ChangeFeed(store)
    await create_database(store)
    await feed.put("p", "c", "start")
    seen: asyncio.Queue[int] = asyncio.Queue()
    ended: list[BaseException] = []

    async def follow() -> None:
        try:
            async with aclosing(feed.follow("p", "c", after=None, sees=all_of_them)) as changes:
                async for one in changes:
                    seen.put_nowait(one.sequence)
        except CursorNotFound as error:
            ended.append(error)

    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        group.create_task(follow())
        assert await seen.get() == 1
        for name in "bc":
            await create_database(store, name=name)
        assert [await seen.get(), await seen.get()] == [2, 3]
        await feed.delete("p", "c")  # and nothing changes in the log
    assert len(ended) == 1
    assert feed._followers == set()
