"""What a checkpoint gives back on its ways out."""

from types import SimpleNamespace
from typing import Any

import pytest

from app.core.base.errors import NotReady
from app.core.base.events import Events
from app.core.stores.manifest.ops import ReleaseLeases
from app.core.stores.manifest.store import ManifestStore
from migrations.runner import load_steps
from tests.helpers.fake_clock import FakeClock
from tests.helpers.paged import fail
from tests.helpers.truncation_bench import TruncationBench


@pytest.mark.parametrize("error", [NotReady("no descriptors"), OSError(39, "not empty")])
async def test_scratch_that_cannot_be_removed_holds_nothing_else_back(
    tmp_path, monkeypatch, error: Exception
):
    clock = FakeClock()
    manifest = await ManifestStore.open(
        tmp_path / "manifest", clock=clock, events=Events(), process_id="p", map_bytes=1 << 26,
        max_readers=8, migrations=load_steps(), on_fatal=fail,
    )  # fmt: skip
    executor = TruncationBench(manifest, clock).checkpoints
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
    await manifest.aclose()
