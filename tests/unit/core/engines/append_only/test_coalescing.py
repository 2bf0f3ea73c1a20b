"""Which small chunks become one, with plain values."""

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.engines.append_only.coalescing import (
    RUN_LENGTH_MAX,
    TIER_DIVISORS,
    pick_run,
    plan_coalescing,
)
from app.core.engines.base import (
    CheckpointPlan,
    MergeChunks,
    MergeSource,
    decode_plan,
    encode_plan,
)
from app.core.stores.manifest.records import BlobRef, ChunkRecord, DatabaseRecord

CHUNK_BYTES = 64 * 1024
DATABASE = DatabaseRecord(
    db_id=7, tenant="acme", name="log", engine="append_only", page_size=0,
    chunk_bytes=CHUNK_BYTES, compression="zstd", created_at_us=1, generation=40, next_chunk_id=99,
)  # fmt: skip


def row(chunk_id: int, first: int, last: int, size: int, **changes) -> ChunkRecord:
    made = ChunkRecord(
        db_id=7, chunk_id=chunk_id, generation=chunk_id + 1,
        blob=BlobRef(key=f"k{chunk_id}", sha256=bytes(32), crc64=0, bytes=size // 2),
        first=first, last=last, visible_last=last, logical_bytes=size, count=last - first + 1,
        line_safe=True,
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


def log_of(*sizes: int) -> list[ChunkRecord]:
    """Ten records a chunk."""
    return [row(n, 10 * n + 1, 10 * n + 10, size) for n, size in enumerate(sizes)]


def picked(chunks: list[ChunkRecord]) -> list[int]:
    return [each.chunk_id for each in pick_run(chunks, db_id=7, chunk_bytes=CHUNK_BYTES)]


def test_a_run_is_taken_once_it_reaches_a_tier():
    half = CHUNK_BYTES // TIER_DIVISORS[1] // 2
    assert picked(log_of(half)) == []
    assert picked(log_of(half, half)) == [0, 1]
    assert picked(log_of(half, half - 1)) == []
    assert picked(log_of(CHUNK_BYTES, half, half - 1)) == [], "a large one before adds nothing"
    assert picked(log_of(half, half, half, half)) == [0, 1], "the oldest, and no more than needed"


def test_chunks_from_half_the_full_size_on_are_left_alone():
    assert picked(log_of(*[CHUNK_BYTES // 2] * 10)) == []
    nearly = CHUNK_BYTES // 2 - 1
    assert picked(log_of(CHUNK_BYTES, nearly, nearly)) == [1, 2]


def test_tiny_chunks_are_merged_by_their_number():
    chunks = log_of(*[1] * (RUN_LENGTH_MAX + 1))
    large = 1 << 26  # whose lowest tier they do not reach together
    assert pick_run(chunks[: RUN_LENGTH_MAX - 1], db_id=7, chunk_bytes=large) == ()
    assert pick_run(chunks, db_id=7, chunk_bytes=large) == chunks[:RUN_LENGTH_MAX]
    between = log_of(*[1] * 64, large // TIER_DIVISORS[0], *[1] * 64)
    assert pick_run(between, db_id=7, chunk_bytes=large) == (), "not rewritten for their sake"
    after = log_of(large // TIER_DIVISORS[0], *[1] * RUN_LENGTH_MAX)
    assert pick_run(after[:-1], db_id=7, chunk_bytes=large) == ()
    assert pick_run(after, db_id=7, chunk_bytes=large) == after[1:]


def test_gaps_cuts_drops_and_inherited_chunks_are_not_crossed():
    size = CHUNK_BYTES // TIER_DIVISORS[1] * 2 // 3
    apart = log_of(size, size)
    assert picked(apart) == [0, 1]
    for changes in (
        {"first": apart[1].first + 1},
        {"visible_last": apart[1].last - 1},
        {"blob": None},
        {"db_id": 7, "origin_db_id": 3},
    ):
        assert picked([apart[0], msgspec.structs.replace(apart[1], **changes)]) == [], changes


def test_the_plan_supersedes_the_sources_and_publishes_no_lsn():
    chunks = log_of(400, 400, 400, 9000)
    chunks[1] = msgspec.structs.replace(chunks[1], line_safe=False)
    database = msgspec.structs.replace(DATABASE, wal_position=b"where")
    plan = plan_coalescing(
        database, chunks, published_lsn=40, checkpoint_id="0000000041-000003-01J", epoch=3
    )
    assert plan is not None
    assert decode_plan(encode_plan(plan)) == plan
    [merge] = plan.actions
    assert isinstance(merge, MergeChunks)
    assert merge == MergeChunks(
        chunk_id=0,
        sources=(
            MergeSource(chunk_id=0, generation=1, bytes=200),
            MergeSource(chunk_id=1, generation=2, bytes=200),
            MergeSource(chunk_id=2, generation=3, bytes=200),
        ),
        first_lsn=1,
        last_lsn=30,
        segment_bytes=1200,
        line_safe=False,
    )
    assert plan == CheckpointPlan(
        engine="append_only", db_id=7, checkpoint_id="0000000041-000003-01J", epoch=3,
        expected_generation=40, first_lsn=41, last_lsn=40, page_count=0, next_chunk_id=99,
        codec="zstd", actions=(merge,), wal_position=b"where",
    )  # fmt: skip
    assert plan.segment_ids == ()
    assert plan.leased_chunk_ids == (0, 1, 2)
    assert (
        plan_coalescing(DATABASE, chunks[3:], published_lsn=40, checkpoint_id="c", epoch=3) is None
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(260, 4000), min_size=200, max_size=800),
    st.sampled_from([1, 3]),
)
def test_every_byte_is_rewritten_a_few_times_at_most(sizes: list[int], merges_per_chunk: int):
    chunks: list[ChunkRecord] = []
    rewrites: dict[int, int] = {}  # by first LSN of an original chunk
    lsn = 1
    for number, size in enumerate(sizes):
        chunks.append(row(number, lsn, lsn + 9, size))
        rewrites[lsn] = 0
        lsn += 10
        for _ in range(merges_per_chunk):
            run = pick_run(chunks, db_id=7, chunk_bytes=CHUNK_BYTES)
            if not run:
                break
            at = next(n for n, each in enumerate(chunks) if each.chunk_id == run[0].chunk_id)
            assert list(run) == chunks[at : at + len(run)]
            total = sum(each.logical_bytes for each in run)
            assert total <= CHUNK_BYTES
            for first in range(run[0].first, run[-1].last, 10):
                rewrites[first] += 1
            chunks[at : at + len(run)] = [row(run[0].chunk_id, run[0].first, run[-1].last, total)]
    assert max(rewrites.values()) <= len(TIER_DIVISORS)
    assert [each.first for each in chunks[1:]] == [each.last + 1 for each in chunks[:-1]]
    assert len(chunks) <= 2 * sum(sizes) // CHUNK_BYTES + 40
