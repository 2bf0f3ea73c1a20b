"""Copies of the manifest: whole, readable, few."""

import asyncio

import pytest

from app.core.base.events import Events
from app.core.services.backups import Backups
from app.core.stores.manifest.ops import CreateDatabase, ManifestBatch
from app.core.stores.manifest.store import ManifestStore
from migrations.runner import load_steps
from tests.helpers.fake_clock import FakeClock


async def opened(path, clock):
    return await ManifestStore.open(
        path, clock=clock, events=Events(), process_id="p", map_bytes=1 << 26, max_readers=8,
        migrations=load_steps(), on_fatal=pytest.fail,
    )  # fmt: skip


def create(name: str) -> ManifestBatch:
    op = CreateDatabase(
        tenant="acme", name=name, engine="append_only", page_size=0, chunk_bytes=1 << 26,
        compression="none", created_at_us=1,
    )  # fmt: skip
    return ManifestBatch(ops=(op,), reason="t")


async def test_a_copy_holds_what_was_committed_and_is_a_manifest(tmp_path):
    clock = FakeClock()
    manifest = await opened(tmp_path / "manifest", clock)
    backups = Backups(manifest, tmp_path / "backups", clock=clock, events=Events(), kept_count=2)
    await manifest.commit(create("before"))
    first, again = await asyncio.gather(backups.make(), backups.make())
    assert first == again  # nothing has changed within the second
    await manifest.commit(create("after"))
    assert first.sequence == 1
    copy = await opened(first.path, clock)
    with copy.read() as view:
        assert [one.name for one in view.all_databases()] == ["before"]
    await copy.aclose()
    await manifest.aclose()


async def test_the_newest_few_are_kept_and_nothing_else_is_touched(tmp_path):
    clock = FakeClock()
    manifest = await opened(tmp_path / "manifest", clock)
    directory = tmp_path / "backups"
    backups = Backups(manifest, directory, clock=clock, events=Events(), kept_count=2)
    made = []
    for number in range(4):
        clock.jump_wall(1)
        made.append((await backups.make()).path.name)
        if number == 0:
            (directory / "mine").mkdir()
            (directory / ".manifest-20200101T000000Z-1.partial").mkdir()  # a crash left it
    assert sorted(path.name for path in directory.iterdir()) == [*made[-2:], "mine"]
    await manifest.aclose()
