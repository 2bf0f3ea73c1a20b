"""The publishing batch of libsql, and what a finished checkpoint tells."""

import msgspec
import pytest

from app.core.base.errors import InvariantViolation
from app.core.checkpoint.intents import (
    all_made,
    blobs_of,
    intent_of,
    progress_of,
    row_of,
    rows_of,
)
from app.core.checkpoint.outcome import delta_chain_lengths, result_of
from app.core.checkpoint.publication import publication_batch
from app.core.engines.base import CheckpointPlan, CreateDelta, Drop, RewriteBase
from app.core.stores.manifest.conditions import ExpectEpoch, ExpectGeneration, ExpectLeases
from app.core.stores.manifest.ops import (
    CoverSegment,
    PublishGeneration,
    ReleaseLeases,
    SupersedeChunk,
    SupersedeChunkDelta,
    UpsertChunk,
    UpsertChunkDelta,
)
from app.core.stores.manifest.records import (
    BlobIntent,
    BlobRef,
    ChunkDeltaRecord,
    ChunkRecord,
    JobRecord,
)

PLAN = CheckpointPlan(
    engine="libsql", db_id=7, checkpoint_id="c", epoch=3, expected_generation=5, first_lsn=41,
    last_lsn=90, page_count=250, next_chunk_id=9, codec="zstd",
    actions=(
        RewriteBase(
            chunk_id=0, first_page=1, last_page=100, supersedes_base=2, supersedes_deltas=(3, 4),
            staged_bytes_max=9,
        ),
        CreateDelta(
            chunk_id=1, delta_id=4, pages=b"p", page_count=2, base_generation=1, base_key="b",
            merges=(2, 3, 5), chain_length=1, staged_bytes_max=9,
        ),
        CreateDelta(
            chunk_id=2, delta_id=2, pages=b"p", page_count=2, base_generation=1, base_key="",
            merges=(), chain_length=2, staged_bytes_max=9,
        ),
        Drop(chunk_id=3, first_page=301, supersedes_base=1, supersedes_deltas=(5,)),
    ),
    covered_segments=(8, 9), wal_position=b"where",
)  # fmt: skip


def blob(key: str, size: int) -> BlobRef:
    return BlobRef(key=key, sha256=bytes(32), crc64=1, bytes=size)


def base(chunk_id: int, ref: BlobRef | None) -> ChunkRecord:
    return ChunkRecord(
        db_id=7, chunk_id=chunk_id, generation=6, blob=ref, first=1, last=100, visible_last=100,
        count=0 if ref is None else 100,
    )  # fmt: skip


def delta(chunk_id: int, size: int) -> ChunkDeltaRecord:
    return ChunkDeltaRecord(
        db_id=7, chunk_id=chunk_id, generation=6, delta_id=4, blob=blob(f"d{chunk_id}", size),
        base_key="b", pages=b"p", count=2,
    )  # fmt: skip


ROWS = (base(0, blob("b0", 1000)), delta(1, 20), delta(2, 30), base(3, None))


def test_one_batch_ends_old_rows_and_begins_new_ones():
    batch = publication_batch(
        PLAN, rows=ROWS, committed_at_us=1, document_key="doc", job_id="j", tokens=((0, 5),),
        epoch=3, remembered={},
    )  # fmt: skip
    assert [op for op in batch.ops if isinstance(op, SupersedeChunk)] == [
        SupersedeChunk(db_id=7, chunk_id=0, generation=2, superseded_at=6),
        SupersedeChunk(db_id=7, chunk_id=3, generation=1, superseded_at=6),
    ]
    assert [
        (op.chunk_id, op.generation, op.superseded_at)
        for op in batch.ops
        if isinstance(op, SupersedeChunkDelta)
    ] == [(0, 3, 6), (0, 4, 6), (1, 2, 6), (1, 3, 6), (1, 5, 6), (3, 5, 6)]
    assert [op.row for op in batch.ops if isinstance(op, UpsertChunk)] == [ROWS[0], ROWS[3]]
    assert [op.row for op in batch.ops if isinstance(op, UpsertChunkDelta)] == [ROWS[1], ROWS[2]]
    assert [op.segment_id for op in batch.ops if isinstance(op, CoverSegment)] == [8, 9]
    (published,) = [op for op in batch.ops if isinstance(op, PublishGeneration)]
    assert (published.next_chunk_id, published.wal_position) == (9, b"where")
    row = published.row
    assert (row.generation, row.first_lsn, row.last_lsn, row.page_count) == (6, 41, 90, 250)
    assert (row.base_chunks, row.delta_chunks, row.bytes_uploaded) == (1, 2, 1050)
    assert batch.ops[-1] == ReleaseLeases(job_id="j")
    assert batch.preconditions == (
        ExpectGeneration(db_id=7, generation=5),
        ExpectLeases(db_id=7, job_id="j", tokens=((0, 5),)),
        ExpectEpoch(epoch=3),
    )


def test_the_result_says_what_became_of_each_chunk():
    result = result_of(PLAN, ROWS)
    assert result["bytes_uploaded"] == 1050
    assert [
        (one["chunk_id"], one["action"], one["pages"], one["bytes"], one["blob_key"])
        for one in result["chunks"]
    ] == [
        (0, "rewrite_base", 100, 1000, "b0"),
        (1, "create_delta", 2, 20, "d1"),
        (2, "create_delta", 2, 30, "d2"),
        (3, "drop", 0, 0, None),
    ]
    assert delta_chain_lengths(PLAN) == [0, 1, 2]


def test_intents_survive_the_job_row_and_a_drop_needs_no_upload():
    intents = tuple(intent_of(row) for row in ROWS)
    job = JobRecord(
        job_id="j", kind="create_checkpoint", tenant="acme", database="app", db_id=7,
        created_at_us=1, intents=intents,
    )  # fmt: skip
    back = msgspec.msgpack.decode(msgspec.msgpack.encode(job), type=JobRecord).intents
    assert rows_of(back) == ROWS
    assert [intent.uploaded for intent in back] == [False, False, False, True]
    assert len(blobs_of(ROWS)) == 3
    marked = (*(msgspec.structs.replace(one, uploaded=True) for one in back[:2]), *back[2:])
    progress = progress_of(marked, plan=PLAN)
    assert (progress.staged_chunks, progress.total_chunks) == (4, 4)
    assert (progress.uploaded_blobs, progress.uploaded_bytes) == (2, 1020)
    assert progress.total_bytes == 1050
    assert not all_made(marked, PLAN)
    assert all_made([msgspec.structs.replace(one, uploaded=True) for one in back], PLAN)


def test_while_chunks_are_left_to_stage_the_plans_bound_is_the_total():
    staged = [intent_of(row, uploaded=True) for row in ROWS[:2]]
    progress = progress_of(staged, plan=PLAN)
    assert (progress.staged_chunks, progress.total_chunks) == (2, 4)
    assert progress.total_bytes == PLAN.staged_bytes_max
    assert not all_made(staged, PLAN)


def test_an_intent_of_an_older_service_still_reads():
    row = ROWS[0]
    old = msgspec.msgpack.encode((msgspec.Raw(msgspec.msgpack.encode(row)), True))
    intent = msgspec.msgpack.decode(old, type=BlobIntent)
    assert (row_of(intent), intent.uploaded) == (row, True)


def test_an_intent_has_a_row():
    with pytest.raises(InvariantViolation):
        row_of(BlobIntent(row=None))
