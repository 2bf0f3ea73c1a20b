"""The order in which blobs are made: what is recorded before what is uploaded, and resuming."""

import asyncio
from typing import Any

import msgspec
import pytest

from app.core.base.errors import StalePlan
from app.core.base.events import Events
from app.core.checkpoint.blob_pipeline import BlobPipeline
from app.core.checkpoint.intent_log import IntentLog
from app.core.checkpoint.intents import all_made, intent_of, row_of
from app.core.engines.base import CheckpointPlan, Drop, RewriteBase
from app.core.stores.manifest.ops import Receipt
from app.core.stores.manifest.records import BlobRef, ChunkRecord, JobRecord


def plan_of(*chunk_ids: int, drops: tuple[int, ...] = ()) -> CheckpointPlan:
    return CheckpointPlan(
        engine="libsql", db_id=7, checkpoint_id="c", epoch=3, expected_generation=0, first_lsn=1,
        last_lsn=9, page_count=250, next_chunk_id=9, codec="none", covered_segments=(),
        actions=tuple(
            Drop(chunk_id=each, first_page=1, supersedes_base=1, supersedes_deltas=())
            if each in drops
            else RewriteBase(
                chunk_id=each, first_page=1, last_page=9, supersedes_base=None,
                supersedes_deltas=(), staged_bytes_max=50,
            )
            for each in chunk_ids
        ),
    )  # fmt: skip


def row(chunk_id: int, *, sha: bytes = bytes(32), drop: bool = False) -> ChunkRecord:
    blob = BlobRef(key=f"k{chunk_id}", sha256=sha, crc64=1, bytes=10)
    return ChunkRecord(
        db_id=7, chunk_id=chunk_id, generation=1, blob=None if drop else blob, first=1, last=9,
        visible_last=9,
    )  # fmt: skip


class Hold:
    """A job row; every commit is kept, and may be held up or refused."""

    def __init__(self, *, intents=(), stage: str = "staging") -> None:
        self.job = JobRecord(
            job_id="j", kind="create_checkpoint", tenant="t", database="d", db_id=7,
            created_at_us=1, intents=tuple(intents), stage=stage,
        )  # fmt: skip
        self.commits: list[JobRecord] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.refusals: list[Exception] = []

    async def update(self, *, reason: str, changes: dict[str, Any], **_: Any) -> Receipt:
        del reason
        await self.gate.wait()
        if self.refusals:
            raise self.refusals.pop(0)
        self.job = msgspec.structs.replace(self.job, **changes)
        self.commits.append(self.job)
        return Receipt(sequence=len(self.commits), results=())

    def touch(self) -> None:
        """Nothing here watches for a stall."""

    def recorded(self, chunk_id: int) -> bool:
        return any(row_of(one).chunk_id == chunk_id for one in self.job.intents)


class Making:
    """Stages and uploads, told when to go on; `seen` is what happened in order."""

    def __init__(self, hold: Hold, plan: CheckpointPlan, *, staging: int = 2, uploads: int = 2):
        self.hold, self.plan = hold, plan
        self.seen: list[tuple[str, int]] = []
        self.events: list[str] = []
        self.running = {"stage": 0, "upload": 0}
        self.most = {"stage": 0, "upload": 0}
        self.holding: dict[tuple[str, int], asyncio.Event] = {}
        self.rows = {
            action.chunk_id: row(action.chunk_id, drop=isinstance(action, Drop))
            for action in plan.actions
        }
        self._pipeline = BlobPipeline(
            stage=self._stage, upload=self._upload, staging_concurrency=staging,
            upload_concurrency=uploads,
        )  # fmt: skip

    def hold_up(self, what: str, chunk_id: int) -> asyncio.Event:
        return self.holding.setdefault((what, chunk_id), asyncio.Event())

    async def run(self) -> None:
        events = Events(lambda name, _level, _fields: self.events.append(name))
        log = IntentLog(self.hold, self.plan, events)
        await self._pipeline.run(self.plan.actions, log)

    async def _stage(self, action) -> ChunkRecord:
        await self._step("stage", action.chunk_id)
        return self.rows[action.chunk_id]

    async def _upload(self, staged) -> None:
        assert self.hold.recorded(staged.chunk_id), "uploaded before its key was recorded (I7)"
        await self._step("upload", staged.chunk_id)

    async def _step(self, what: str, chunk_id: int) -> None:
        self.running[what] += 1
        self.most[what] = max(self.most[what], self.running[what])
        self.seen.append((what, chunk_id))
        try:
            if (gate := self.holding.get((what, chunk_id))) is not None:
                await gate.wait()
            await asyncio.sleep(0)
        finally:
            self.running[what] -= 1


async def until(condition) -> None:
    for _ in range(200):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it did not come to that")


async def test_a_blob_is_uploaded_while_the_next_is_staged():
    making = Making(Hold(), plan_of(0, 1), staging=1)
    slow = making.hold_up("stage", 1)
    run = asyncio.ensure_future(making.run())
    await until(lambda: ("upload", 0) in making.seen)
    await until(lambda: making.hold.job.intents and making.hold.job.intents[0].uploaded)
    assert making.hold.job.stage == "staging"
    slow.set()
    await run
    assert all_made(making.hold.job.intents, making.plan)
    assert making.hold.job.stage == "uploading"
    assert making.events == ["checkpoint.staged"]


async def test_a_blob_counts_once_the_store_has_confirmed_it_and_no_sooner():
    """I2: a crash in mid-upload must not leave a marker behind."""
    making = Making(Hold(), plan_of(0))
    slow = making.hold_up("upload", 0)
    run = asyncio.ensure_future(making.run())
    await until(lambda: ("upload", 0) in making.seen)
    for _ in range(20):
        await asyncio.sleep(0)
    assert [one.uploaded for one in making.hold.job.intents] == [False]
    slow.set()
    await run
    assert [one.uploaded for one in making.hold.job.intents] == [True]


async def test_no_upload_begins_before_its_key_is_durable():
    making = Making(Hold(), plan_of(0))
    making.hold.gate.clear()
    run = asyncio.ensure_future(making.run())
    await until(lambda: making.seen == [("stage", 0)])
    for _ in range(20):
        await asyncio.sleep(0)
    assert making.seen == [("stage", 0)]
    making.hold.gate.set()
    await run
    assert making.seen == [("stage", 0), ("upload", 0)]


async def test_intents_keep_the_plans_order_whatever_is_done_first():
    making = Making(Hold(), plan_of(0, 1, 2, drops=(2,)), staging=3)
    slow = making.hold_up("stage", 0)
    run = asyncio.ensure_future(making.run())
    await until(lambda: making.hold.recorded(1) and making.hold.recorded(2))
    slow.set()
    await run
    assert [row_of(one).chunk_id for one in making.hold.job.intents] == [0, 1, 2]
    assert ("upload", 2) not in making.seen  # a drop has nothing to upload


async def test_each_step_is_bounded_for_itself():
    making = Making(Hold(), plan_of(*range(12)), staging=2, uploads=3)
    gates = [making.hold_up("upload", each) for each in range(12)]
    run = asyncio.ensure_future(making.run())
    await until(lambda: making.running["upload"] == 3)
    for gate in gates:
        gate.set()
    await run
    assert making.most == {"stage": 2, "upload": 3}


async def test_chunks_that_are_staged_together_share_a_commit():
    making = Making(Hold(), plan_of(*range(8)), staging=8, uploads=8)
    making.hold.gate.clear()
    run = asyncio.ensure_future(making.run())
    await until(lambda: len(making.seen) == 8)
    for _ in range(20):
        await asyncio.sleep(0)
    making.hold.gate.set()
    await run
    assert len(making.hold.commits) < 16
    assert all_made(making.hold.job.intents, making.plan)


async def test_a_resumed_run_makes_only_what_is_not_confirmed():
    intents = [intent_of(row(0), uploaded=True), intent_of(row(1))]
    making = Making(Hold(intents=intents), plan_of(0, 1, 2))
    await making.run()
    assert sorted(making.seen) == [("stage", 1), ("stage", 2), ("upload", 1), ("upload", 2)]
    assert all_made(making.hold.job.intents, making.plan)


async def test_other_bytes_than_recorded_are_never_uploaded():
    making = Making(Hold(intents=[intent_of(row(0, sha=b"x" * 32))]), plan_of(0))
    with pytest.raises(StalePlan):
        await making.run()
    assert ("upload", 0) not in making.seen


async def test_a_refused_commit_fails_the_run_and_nothing_more_is_uploaded():
    making = Making(Hold(), plan_of(0, 1))
    making.hold.refusals = [RuntimeError("no"), RuntimeError("no")]
    with pytest.raises(RuntimeError):
        await making.run()
    assert [what for what, _ in making.seen] == ["stage", "stage"]


async def test_a_commit_that_was_refused_once_is_written_by_the_next_who_waits():
    hold, plan = Hold(), plan_of(0, 1)
    log = IntentLog(hold, plan, Events())
    hold.refusals = [RuntimeError("no")]
    first, second = await asyncio.gather(
        log.staged(row(0)), log.staged(row(1)), return_exceptions=True
    )
    assert isinstance(first, RuntimeError)
    assert second is None
    assert hold.recorded(1)
