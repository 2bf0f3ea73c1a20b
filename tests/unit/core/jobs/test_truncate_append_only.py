"""The truncation job over a real manifest: when it waits, what it commits, what it leaves alone."""

import asyncio
import threading
from contextlib import asynccontextmanager

import pytest

from app.core.base.errors import CorruptBlob, RemoteUnavailable
from app.core.base.events import Events
from app.core.checkpoint.generation_document import decode_document
from app.core.stores.manifest.ops import (
    CompensateCheckpoint,
    CreateSnapshot,
    CutSegment,
    PublishGeneration,
    RaiseFirstLsn,
    ReleaseLeases,
    SupersedeChunk,
    decode_op,
)
from app.core.stores.manifest.records import SnapshotRecord
from app.core.stores.manifest.store import ManifestStore
from migrations.runner import load_steps
from tests.helpers.fake_clock import FakeClock
from tests.helpers.truncation_bench import CheckpointLike, TruncationBench


def raise_fatal(error: BaseException) -> None:
    raise error


@pytest.fixture
async def bench(tmp_path):
    """Three published chunks, LSNs 1 to 30; 31 to 35 sealed in the WAL."""
    clock = FakeClock()
    manifest = await ManifestStore.open(
        tmp_path / "manifest", clock=clock, events=Events(), process_id="p", map_bytes=1 << 26,
        max_readers=8, migrations=load_steps(), on_fatal=raise_fatal,
    )  # fmt: skip
    bench = TruncationBench(manifest, clock)
    await bench.create()
    for generation in (1, 2, 3):
        await bench.publish(generation)
    await bench.seal(31, 35)
    yield bench
    await manifest.aclose()


@asynccontextmanager
async def running(bench: TruncationBench):
    """The claimed job's attempt, beside the test."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(bench.run_claimed(bench.handler()))
        try:
            yield task
        finally:
            if not task.done():
                task.cancel()


async def let_it_look_again(bench: TruncationBench) -> None:
    await bench.clock.until_sleeping()
    bench.clock.advance(0.1)


def ops_of(change) -> list:
    return [decode_op(raw) for raw in change.ops]


# --- waiting ----------------------------------------------------------------------------------


async def test_tail_truncation_lease_blocking(bench):
    """It waits while a checkpoint's lease lives, changes nothing meanwhile, and goes on then."""
    await bench.lease("CHECKPOINT")
    before = bench.catalogue()
    job = await bench.truncation("tail", 28, 35)
    async with running(bench) as attempt:
        for _ in range(3):
            await let_it_look_again(bench)
        await bench.clock.until_sleeping()
        waiting = bench.job(job.job_id)
        assert (waiting.state, waiting.stage) == ("in_flight", "waiting_for_lease")
        assert bench.queue.aside_count == 1
        assert bench.catalogue() == before
        await bench.commit(ReleaseLeases(job_id="CHECKPOINT"))
        bench.clock.advance(0.1)
        ended = await attempt
    assert ended.state == "completed"
    assert ended.result is not None
    assert ended.result["dropped"] == {"first_lsn": 28, "last_lsn": 35}
    assert bench.queue.aside_count == 0


async def test_an_expired_lease_is_in_nobodys_way(bench):
    await bench.lease("STOPPED", ttl_seconds=5)
    await bench.truncation("tail", 28, 35)
    async with running(bench) as attempt:
        await bench.clock.until_sleeping()
        bench.clock.advance(5)
        assert (await attempt).state == "completed"


async def test_its_time_runs_from_acceptance(bench):
    await bench.lease("CHECKPOINT", ttl_seconds=600)
    before = bench.catalogue()
    await bench.truncation("tail", 28, 35, lease_timeout_seconds=30)
    bench.clock.advance(29)  # in the queue
    async with running(bench) as attempt:
        await bench.clock.until_sleeping()
        bench.clock.advance(1)
        ended = await attempt
    assert ended.state == "failed"
    assert ended.error is not None
    assert ended.error.code == "lease_timeout"
    assert ended.error.fields["holder"] == "CHECKPOINT"
    assert bench.catalogue() == before


@pytest.mark.parametrize("seconds", [-86_400, 86_400])
async def test_its_time_is_not_the_wall_clocks(bench, seconds):
    await bench.lease("CHECKPOINT", ttl_seconds=600)
    await bench.truncation("tail", 28, 35, lease_timeout_seconds=30)
    bench.clock.jump_wall(seconds)
    bench.clock.advance(29)
    async with running(bench) as attempt:
        await bench.clock.until_sleeping()
        assert not attempt.done()
        bench.clock.advance(1)
        ended = await attempt
    assert ended.error is not None
    assert ended.error.code == "lease_timeout"


async def test_its_time_is_no_matter_if_nothing_is_in_the_way(bench):
    await bench.truncation("tail", 28, 35, lease_timeout_seconds=0)
    bench.clock.advance(100)
    assert (await bench.run_claimed(bench.handler())).state == "completed"


async def test_a_waiting_truncation_is_cancelled_where_it_waits(bench):
    await bench.lease("CHECKPOINT", ttl_seconds=600)
    before = bench.catalogue()
    job = await bench.truncation("tail", 28, 35, lease_timeout_seconds=300)
    async with running(bench) as attempt:
        await bench.clock.until_sleeping()
        await bench.queue.request_cancel(job.job_id)
        bench.clock.advance(0.1)
        assert (await attempt).state == "cancelled"
    assert bench.catalogue() == before


async def test_it_waits_for_a_job_that_has_published_and_not_finished(bench):
    """Its generation's document is made of the descriptor, which a truncation would change."""
    unfinished = await bench.enqueue("create_checkpoint", published_generation=3)
    bench.clock.advance(1)
    job = await bench.truncation("head", 11, 35)
    assert (await bench.queue.claim()).job_id == unfinished.job_id
    async with running(bench) as attempt:
        await let_it_look_again(bench)
        await bench.clock.until_sleeping()
        assert bench.job(job.job_id).stage == "waiting_for_lease"
        claimed = bench.job(unfinished.job_id)
        _, _ = await bench.queue.update(claimed, reason="t", changes={"state": "completed"})
        bench.queue.give_back(claimed)
        bench.clock.advance(0.1)
        assert (await attempt).state == "completed"


# --- cancelling what is in the way ------------------------------------------------------------


async def test_cancellation_compensating_log(bench):
    """on_lease=cancel: the checkpoint stops at its next step and publishes nothing; the commit
    that ends it gives its lease back and says in the change log who cancelled it.
    """
    stop, reached = asyncio.Event(), asyncio.Event()

    async def work(context):
        await bench.lease(context.job.job_id)
        reached.set()
        await stop.wait()
        await context.update(reason="t", changes={"stage": "uploading"})
        raise AssertionError("it went on")

    checkpoint = await bench.enqueue("create_checkpoint")
    async with asyncio.TaskGroup() as group:
        stopping = group.create_task(bench.run_claimed(CheckpointLike(bench, work)))
        await reached.wait()
        truncation = await bench.truncation("tail", 28, 35, on_lease="cancel")
        attempt = group.create_task(bench.run_claimed(bench.handler()))
        await bench.clock.until_sleeping()
        assert bench.job(checkpoint.job_id).cancel_requested
        sequence = bench.changes()[-1].sequence
        stop.set()
        assert (await stopping).state == "cancelled"
        bench.clock.advance(0.1)
        assert (await attempt).state == "completed"
    told, *others = bench.changes(after=sequence)
    assert told.reason == "checkpoint.cancelled_by_truncation"
    assert ops_of(told) == [
        CompensateCheckpoint(db_id=1, job_id=checkpoint.job_id, cancelled_by=truncation.job_id)
    ]
    assert others[0].reason == "truncation.published"
    assert bench.leases() == []


async def test_a_checkpoint_cancelled_by_someone_else_leaves_no_record(bench):
    async def work(context):
        await bench.queue.request_cancel(context.job.job_id)
        await context.update(reason="t", changes={"stage": "uploading"})

    await bench.enqueue("create_checkpoint")
    sequence = bench.changes()[-1].sequence
    assert (await bench.run_claimed(CheckpointLike(bench, work))).state == "cancelled"
    assert bench.changes(after=sequence) == []


@pytest.mark.parametrize(
    ("error", "state"),
    [(CorruptBlob("damaged"), "failed"), (RemoteUnavailable("down"), "pending")],
)
async def test_a_failed_attempt_gives_its_leases_back(bench, error, state):
    async def work(context):
        await bench.lease(context.job.job_id)
        raise error

    await bench.enqueue("create_checkpoint")
    assert (await bench.run_claimed(CheckpointLike(bench, work))).state == state
    assert bench.leases() == []


# --- what it commits --------------------------------------------------------------------------


async def test_head_truncation_manifest_atomicity(bench):
    """Chunk rows, WAL rows, descriptor, generation and the job's marker change in one commit."""
    sequence = bench.changes()[-1].sequence
    await bench.truncation("head", 25, 35)
    bench.log.pinned = {1}
    job = await bench.run_claimed(bench.handler())
    assert job.state == "completed"
    published, durable, released = bench.changes(after=sequence)
    kinds = [type(op) for op in ops_of(published)]
    assert published.reason == "truncation.published"
    assert kinds.count(SupersedeChunk) == kinds.count(CutSegment) == 2
    assert kinds.count(PublishGeneration) == kinds.count(RaiseFirstLsn) == 1
    assert (durable.reason, released.reason) == ("checkpoint.durable", "wal.released")
    with bench.manifest.read() as view:
        assert [row.chunk_id for row in view.chunk_view(1, 4)] == [2]
        assert [row.chunk_id for row in view.chunk_view(1, 3)] == [0, 1, 2]
        database = view.database(1)
        states = {row.segment_id: row.state for row in view.segments(1)}
    assert database is not None
    assert (database.first_lsn, database.generation, database.checkpointed_lsn) == (21, 4, 30)
    assert states == {1: "dropped", 31: "sealed"}, "a reader still has the first segment pinned"
    assert bench.log.removed >= {11}
    key = f"generations/acme/log/1/{4:010d}.json.zst"
    document = decode_document(bench.remote.objects[key], key=key)
    assert [chunk.chunk_id for chunk in document.chunks] == [2]
    assert document.generation.readable_from_lsn == 21


async def test_a_lease_taken_at_the_last_moment_refuses_all_of_it(bench, monkeypatch):
    before = bench.catalogue()
    await bench.truncation("head", 25, 35)
    handler = bench.handler()
    run = bench.truncations.run

    async def run_after_a_lease(context):
        await bench.lease("LATE")
        return await run(context)

    monkeypatch.setattr(bench.truncations, "run", run_after_a_lease)
    job = await bench.run_claimed(handler)
    assert (job.state, job.published_generation) == ("pending", None)
    assert bench.catalogue() == before


async def test_it_finishes_what_it_published_before_a_failure(bench):
    await bench.truncation("tail", 28, 35)
    bench.remote.unavailable = True
    job = await bench.run_claimed(bench.handler())
    assert (job.state, job.published_generation) == ("pending", 4)
    assert bench.log.removed == set(), "no WAL goes before the document is stored"
    bench.remote.unavailable = False
    bench.clock.advance(1)
    job = await bench.run_claimed(bench.handler())
    assert job.state == "completed"
    assert job.result is not None
    assert job.result["dropped"] == {"first_lsn": 28, "last_lsn": 35}
    with bench.manifest.read() as view:
        assert view.database(1).checkpointed_lsn == 35


async def test_snapshots_pin_chunks_by_name(bench):
    for name, generation in (("early", 1), ("late", 3)):
        row = SnapshotRecord(
            db_id=1, name=name, generation=generation, last_lsn=1, page_count=0, created_at_us=1
        )
        await bench.commit(CreateSnapshot(row=row))
    before = bench.catalogue()
    await bench.truncation("head", 11, 35)
    job = await bench.run_claimed(bench.handler())
    assert (job.state, job.error.code) == ("failed", "snapshot_pinned")
    assert list(job.error.fields["names"]) == ["early", "late"]
    await bench.truncation("tail", 25, 35)
    job = await bench.run_claimed(bench.handler())
    assert list(job.error.fields["names"]) == ["late"]
    assert bench.catalogue() == before
    await bench.truncation("tail", 31, 35)  # the WAL is pinned by nobody
    assert (await bench.run_claimed(bench.handler())).state == "completed"


async def test_a_truncation_cancelled_while_it_publishes_tells_the_log(bench, monkeypatch):
    """Its commit goes on: the log must not go on showing what it dropped as unpublished."""
    submitted, held = asyncio.Event(), threading.Event()
    commit = bench.manifest.commit

    async def commit_late(batch):
        if batch.reason == "truncation.published":
            monkeypatch.setattr(bench.manifest._writer, "_before_group", lambda: held.wait(5))
            submitted.set()
        return await commit(batch)

    monkeypatch.setattr(bench.manifest, "commit", commit_late)
    job = await bench.truncation("tail", 31, 35)
    async with running(bench) as attempt:
        await submitted.wait()
        attempt.cancel()
        asyncio.get_running_loop().call_later(0.05, held.set)
        await asyncio.wait({attempt})
    assert bench.job(job.job_id).published_generation == 4
    assert bench.log.checkpointed == {31}
