"""What a checkpoint gives back on its ways out."""

from types import SimpleNamespace
from typing import Any

import pytest

from app.core.base.errors import NotReady
from app.core.base.events import Events
from app.core.engines.base import CheckpointPlan, encode_plan
from app.core.jobs.handlers.publish_chunks import PublishChunks
from app.core.stores.manifest.ops import ReleaseLeases
from app.core.stores.manifest.store import ManifestStore
from migrations.runner import load_steps
from tests.helpers.fake_clock import FakeClock
from tests.helpers.paged import fail
from tests.helpers.truncation_bench import TruncationBench


@pytest.fixture
async def bench(tmp_path):
    clock = FakeClock()
    manifest = await ManifestStore.open(
        tmp_path / "manifest", clock=clock, events=Events(), process_id="p", map_bytes=1 << 26,
        max_readers=8, migrations=load_steps(), on_fatal=fail,
    )  # fmt: skip
    yield TruncationBench(manifest, clock)
    await manifest.aclose()


async def test_a_checkpoint_that_is_completed_by_a_later_attempt_counts(bench):
    await bench.create()
    await bench.publish(1)
    plan = CheckpointPlan(
        engine="append_only", db_id=1, checkpoint_id="c1", epoch=1, expected_generation=0,
        first_lsn=1, last_lsn=10, page_count=0, next_chunk_id=1, codec="none", actions=(),
    )  # fmt: skip
    await bench.enqueue("create_checkpoint", published_generation=1, plan=encode_plan(plan))
    told = []
    bench.checkpoints._parts.events.subscribe(lambda name, _, fields: told.append((name, fields)))
    job = await bench.run_claimed(PublishChunks(bench.checkpoints))
    assert (job.state, job.result["generation"]) == ("completed", 1)
    [fields] = [fields for name, fields in told if name == "checkpoint.completed"]
    assert (fields["bytes_uploaded"], fields["seconds"]) == (0, None)


@pytest.mark.parametrize("error", [NotReady("no descriptors"), OSError(39, "not empty")])
async def test_scratch_that_cannot_be_removed_holds_nothing_else_back(
    bench, monkeypatch, error: Exception
):
    executor = bench.checkpoints
    parts = executor._parts
    job: Any = SimpleNamespace(
        job_id="J", kind="create_checkpoint", tenant="t", database="d", db_id=1, stage="staging",
        attempts=1, run=1,
    )  # fmt: skip
    executor._reservations["J"] = await parts.quota.reserve(tenant="t", job_id="J", size_bytes=100)

    async def refuse(self, job_id: str) -> int:
        raise error

    monkeypatch.setattr(type(parts.scratch), "remove", refuse)
    hold: Any = SimpleNamespace(job=job)
    assert await executor.pause(hold) == (ReleaseLeases(job_id="J"),)
    assert parts.quota.snapshot().jobs == ()
    assert parts.quota.snapshot().global_used_bytes == 0
