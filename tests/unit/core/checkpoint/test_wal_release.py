"""WAL goes once, whoever asks at the same time."""

import asyncio
from types import SimpleNamespace

import pytest

from app.core.base.clock import SeededRandomness
from app.core.base.errors import NotReady
from app.core.base.events import Events
from app.core.checkpoint.wal_release import WalRelease
from app.core.stores.manifest.ops import CoverSegment, RegisterSegment, SealSegment
from app.core.stores.manifest.records import WalSegmentRecord
from app.core.stores.manifest.store import ManifestStore
from migrations.runner import load_steps
from tests.helpers.fake_clock import FakeClock
from tests.helpers.truncation_bench import TruncationBench


def fail(error: BaseException) -> None:
    raise error


@pytest.fixture
async def bench(tmp_path):
    clock = FakeClock()
    manifest = await ManifestStore.open(
        tmp_path / "manifest", clock=clock, events=Events(), process_id="p",
        map_bytes=16 * 1024 * 1024, max_readers=8, on_fatal=fail, migrations=load_steps(),
        randomness=SeededRandomness(1),
    )  # fmt: skip
    bench = TruncationBench(manifest, clock)
    await bench.create()
    yield bench
    await manifest.aclose()


async def test_a_sweep_beside_a_jobs_release_removes_no_row_twice(bench):
    await bench.seal(1, 10)
    await bench.seal(11, 20)
    for segment_id in (1, 11):  # of a generation that has expired
        await bench.commit(CoverSegment(db_id=bench.db_id, segment_id=segment_id, generation=1))
    release = WalRelease(
        bench.manifest, SimpleNamespace(log=lambda db_id: bench.log), events=Events()
    )
    counts = await asyncio.gather(release.release(bench.db_id), release.release_all())
    assert counts[0] == 2
    with bench.manifest.read() as view:
        assert view.segments(bench.db_id) == []


async def test_a_database_that_cannot_be_swept_holds_up_no_other(bench):
    await bench.create(name="other")
    for db_id in (1, 2):
        row = WalSegmentRecord(db_id=db_id, segment_id=1, first_lsn=1, ceiling_lsn=1000)
        await bench.commit(
            RegisterSegment(row=row), SealSegment(db_id=db_id, segment_id=1, last_lsn=9, bytes=1)
        )
        await bench.commit(CoverSegment(db_id=db_id, segment_id=1, generation=1))

    def log(db_id: int):
        if db_id == 1:
            raise NotReady("no descriptors")
        return bench.log

    release = WalRelease(bench.manifest, SimpleNamespace(log=log), events=Events())
    with pytest.raises(NotReady):
        await release.release_all()
    with bench.manifest.read() as view:
        assert [row.db_id for row in view.all_segments()] == [1]
