"""A merged chunk out of blobs that have to be fetched: what comes damaged, and what is gone."""

import errno
import os
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from app.core.base.errors import CorruptBlob, DiskFull
from app.core.base.tasks import BlockingPool
from app.core.checkpoint import merge_staging
from app.core.checkpoint.merge_staging import MergeStaging
from app.core.checkpoint.staging import KeyScope
from app.core.engines.append_only.coalescing import merge_of
from app.core.engines.base import CheckpointPlan
from app.core.reads.cold_scan import NoCache
from app.core.stores.local.scratch import ScratchStore
from tests.helpers.fake_clock import FakeClock
from tests.helpers.logs import DB_ID, build_chunk, build_segment
from tests.helpers.memory_remote import MemoryRemote

JOB = "01J0000000000000000000000A"


class Bench:
    def __init__(self, staging: MergeStaging, rows: list, remote: MemoryRemote, scratch, touched):
        self.staging, self.rows, self.remote, self.scratch = staging, rows, remote, scratch
        self.touched = touched

    async def merge(self):
        return await self.staging.stage(merge_of(self.rows), self.scratch.file("merged.blob"))


@pytest.fixture
async def bench(tmp_path):
    remote, rows, touched = MemoryRemote(piece_bytes=200), [], []
    for number in range(2):
        segment = build_segment(
            tmp_path / f"{number}.wal", [[b"a" * 500, b"b"]], first_lsn=2 * number + 1,
            segment_id=2 * number + 1,
        )  # fmt: skip
        path = tmp_path / f"{number}.blob"
        row = build_chunk(segment, path, chunk_id=number)
        remote.objects[row.blob.key] = path.read_bytes()
        rows.append(row)

    @contextmanager
    def read():
        yield SimpleNamespace(
            chunk_rows_of=lambda _, chunk_id: [one for one in rows if one.chunk_id == chunk_id]
        )

    pool = BlockingPool("test", threads=2)
    scratch = await ScratchStore(tmp_path / "scratch", pool=pool, clock=FakeClock()).create(JOB)
    manifest: Any = SimpleNamespace(read=read)
    cache: Any = NoCache()
    staging = MergeStaging(
        plan=CheckpointPlan(
            engine="append_only", db_id=DB_ID, checkpoint_id=f"0000000002-000001-{JOB}", epoch=1,
            expected_generation=1, first_lsn=5, last_lsn=4, page_count=0, next_chunk_id=2,
            codec="none", actions=(merge_of(rows),),
        ),
        manifest=manifest, hot_cache=cache, remote=lambda: remote, scratch=scratch, pool=pool,
        scope=KeyScope(tenant="t", database="d"), touch=lambda: touched.append(1),
    )  # fmt: skip
    yield Bench(staging, rows, remote, scratch, touched)
    pool.close_blocking()


async def test_sources_that_are_not_at_hand_are_fetched(bench):
    row = await bench.merge()
    assert (row.chunk_id, row.first, row.last, row.count) == (0, 1, 4, 4)
    pieces = sum(-(-len(data) // 200) for data in bench.remote.objects.values())
    assert len(bench.touched) == pieces  # so many pieces are no stall


async def test_damage_on_the_way_is_fetched_once_more(bench):
    flips = [1]

    def flip_once(key, first, data):
        return bytes([data[0] ^ flips.pop()]) + data[1:] if flips else data

    bench.remote.on_read = flip_once
    assert (await bench.merge()).last == 4
    bench.remote.on_read = lambda key, first, data: b"x" + data[1:]
    with pytest.raises(CorruptBlob):
        await bench.merge()


async def test_a_source_that_is_gone_is_damage(bench):
    key = bench.rows[1].blob.key
    del bench.remote.objects[key]
    with pytest.raises(CorruptBlob) as refused:
        await bench.merge()
    assert refused.value.fields["key"] == key


async def test_a_full_disk_is_told_as_one(bench, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(merge_staging.os, "open", refuse)
        with pytest.raises(DiskFull):
            await bench.merge()
