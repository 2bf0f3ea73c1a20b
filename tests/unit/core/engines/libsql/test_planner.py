"""The libsql planner, with plain values."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap

from app.core.base.errors import InvariantViolation
from app.core.engines.base import (
    CheckpointPlan,
    ChunkState,
    CreateDelta,
    DeltaLimits,
    Drop,
    PageChanges,
    PlannerContext,
    RewriteBase,
    SegmentView,
    decode_plan,
    encode_plan,
)
from app.core.engines.planning import plan_checkpoint
from app.core.formats.page_blob import page_blob_bytes_max
from app.core.stores.manifest.records import (
    BlobRef,
    ChunkDeltaRecord,
    ChunkRecord,
    DatabaseRecord,
)

PER_CHUNK = 100
MB = 1_000_000


def database(**changes: object) -> DatabaseRecord:
    base = DatabaseRecord(
        db_id=7, tenant="acme", name="app", engine="libsql", page_size=4096,
        chunk_bytes=4096 * PER_CHUNK, compression="zstd", created_at_us=1, generation=4,
        page_count=10 * PER_CHUNK, next_chunk_id=10,
    )  # fmt: skip
    return msgspec.structs.replace(base, **changes)


def blob(key: str, size: int = 1000) -> BlobRef:
    return BlobRef(key=key, sha256=bytes(32), crc64=0, bytes=size)


def base(chunk_id: int, generation: int = 1) -> ChunkRecord:
    first = chunk_id * PER_CHUNK + 1
    return ChunkRecord(
        db_id=7, chunk_id=chunk_id, generation=generation, blob=blob(f"base-{chunk_id}"),
        first=first, last=first + PER_CHUNK - 1, visible_last=first + PER_CHUNK - 1,
    )  # fmt: skip


def delta(chunk_id: int, generation: int, pages: BitMap, *, size: int = 1000) -> ChunkDeltaRecord:
    return ChunkDeltaRecord(
        db_id=7, chunk_id=chunk_id, generation=generation, delta_id=generation - 1,
        blob=blob(f"delta-{chunk_id}-{generation}", size), base_key=f"base-{chunk_id}",
        pages=pages.serialize(),
    )  # fmt: skip


def pages_of(chunk_id: int, count: int, start: int = 0) -> BitMap:
    first = chunk_id * PER_CHUNK + 1 + start
    return BitMap(range(first, first + count))


def state(chunk_id: int, dirty: BitMap, **changes: object) -> ChunkState:
    values: dict = {
        "base": base(chunk_id), "deltas": (), "delta_bytes": 500, "base_at_hand": True,
    } | changes  # fmt: skip
    return ChunkState(chunk_id=chunk_id, dirty=dirty.serialize(), **values)


def plan(
    *chunks: ChunkState,
    page_count: int = 10 * PER_CHUNK,
    limits: DeltaLimits | None = None,
    segments: tuple[SegmentView, ...] | None = None,
    **changes: object,
) -> CheckpointPlan | None:
    if segments is None:
        segments = tuple(
            SegmentView(
                engine="libsql", segment_id=number, first_lsn=first, last_lsn=last,
                segment_bytes=1000, line_safe=True,
            )
            for number, (first, last) in enumerate([(41, 50), (51, 77)], start=5)
        )  # fmt: skip
    return plan_checkpoint(
        PlannerContext(
            database=database(**changes),
            chunks=(),
            segments=segments,
            checkpoint_id="0000000005-000003-01J",
            epoch=3,
            pages=PageChanges(
                last_lsn=77, page_count=page_count, low_page_count=page_count // 2, chunks=chunks,
                wal_position=b"where",
            ),
            limits=limits or DeltaLimits(),
        )
    )  # fmt: skip


def only_action(planned: CheckpointPlan | None):
    assert planned is not None
    (action,) = planned.actions
    return action


def test_libsql_plan_emits_deltas():
    planned = plan(state(8, pages_of(8, 3)), state(3, pages_of(3, 10) | BitMap([400])))
    assert planned is not None
    assert [action.chunk_id for action in planned.actions] == [3, 8]
    first = planned.actions[0]
    assert isinstance(first, CreateDelta)
    assert BitMap.deserialize(first.pages) == pages_of(3, 10) | BitMap([400])
    assert (first.page_count, first.delta_id, first.base_key) == (11, 1, "base-3")
    assert (first.base_generation, first.merges, first.chain_length) == (1, (), 1)
    assert first.staged_bytes_max == page_blob_bytes_max(11, page_size=4096)
    assert planned == CheckpointPlan(
        engine="libsql", db_id=7, checkpoint_id="0000000005-000003-01J", epoch=3,
        expected_generation=4, first_lsn=41, last_lsn=77, page_count=1000, next_chunk_id=10,
        codec="zstd", actions=planned.actions, covered_segments=(5, 6), low_page_count=500,
        bytes_dirtied=14 * 4096, wal_position=b"where",
    )  # fmt: skip
    assert planned.segment_ids == (5, 6)


def test_a_page_beyond_the_last_chunk_takes_a_chunk_id():
    planned = plan(state(10, pages_of(10, 1), base=None), page_count=10 * PER_CHUNK + 1)
    assert planned is not None
    assert planned.next_chunk_id == 11
    action = only_action(planned)
    assert (action.first_page, action.last_page, action.supersedes_base) == (1001, 1001, None)


def test_libsql_plan_full_rewrite_threshold():
    half = plan(state(2, pages_of(2, 50)))
    assert isinstance(only_action(half), CreateDelta)
    more = only_action(plan(state(2, pages_of(2, 51))))
    assert isinstance(more, RewriteBase)
    assert (more.chunk_id, more.first_page, more.last_page) == (2, 201, 300)
    assert more.staged_bytes_max == page_blob_bytes_max(100, page_size=4096)
    assert (more.supersedes_base, more.supersedes_deltas) == (1, ())


def test_half_of_the_last_chunk_is_half_of_what_it_has():
    assert isinstance(only_action(plan(state(9, pages_of(9, 5)), page_count=910)), CreateDelta)
    action = only_action(plan(state(9, pages_of(9, 6)), page_count=910))
    assert isinstance(action, RewriteBase)
    assert action.last_page == 910


def test_a_large_delta_is_a_rewrite():
    assert isinstance(
        only_action(plan(state(2, pages_of(2, 1), delta_bytes=10 * MB - 1))), CreateDelta
    )
    assert isinstance(only_action(plan(state(2, pages_of(2, 1), delta_bytes=10 * MB))), RewriteBase)


@pytest.mark.parametrize("row", [None, msgspec.structs.replace(base(2, 3), blob=None)])
def test_without_a_base_a_chunk_is_written_whole(row):
    action = only_action(plan(state(2, pages_of(2, 1), base=row)))
    assert isinstance(action, RewriteBase)
    assert action.supersedes_base == (None if row is None else 3)


def test_a_base_that_is_not_at_hand_makes_complete_pages():
    action = only_action(plan(state(2, pages_of(2, 1), base_at_hand=False)))
    assert isinstance(action, CreateDelta)
    assert action.base_key == ""


def chain(count: int, *, size: int = 1000, per_delta: int = 5) -> tuple[ChunkDeltaRecord, ...]:
    return tuple(
        delta(2, 2 + number, pages_of(2, per_delta, start=number * per_delta), size=size)
        for number in range(count)
    )


def test_coalescing_trigger():
    third = only_action(plan(state(2, pages_of(2, 2), deltas=chain(2))))
    assert isinstance(third, CreateDelta)
    assert (third.merges, third.delta_id, third.chain_length) == ((), 3, 3)
    merged = only_action(plan(state(2, pages_of(2, 2, start=50), deltas=chain(3))))
    assert isinstance(merged, CreateDelta)
    assert merged.merges == (2, 3, 4)
    assert (merged.delta_id, merged.chain_length) == (4, 1)
    assert BitMap.deserialize(merged.pages) == pages_of(2, 15) | pages_of(2, 2, start=50)


@pytest.mark.parametrize(
    ("deltas", "limits"),
    [
        (chain(3), DeltaLimits(coalesce="rewrite")),
        (chain(3, size=3 * MB), DeltaLimits()),
        (chain(3, per_delta=17), DeltaLimits()),
    ],
    ids=["asked for", "too large", "too many pages"],
)
def test_a_chain_that_cannot_be_merged_is_rewritten(deltas, limits):
    dirty = state(2, pages_of(2, 1, start=60), deltas=deltas, delta_bytes=MB)
    action = only_action(plan(dirty, limits=limits))
    assert isinstance(action, RewriteBase)
    assert (action.supersedes_base, action.supersedes_deltas) == (1, (2, 3, 4))


def test_a_merged_delta_leaves_out_what_the_database_no_longer_has():
    ends = pages_of(9, 2, start=79)  # 980 and 981
    old = delta(9, 2, pages_of(9, 30)), delta(9, 3, pages_of(9, 3)), delta(9, 4, ends)
    action = only_action(plan(state(9, pages_of(9, 1), deltas=old), page_count=910))
    assert isinstance(action, RewriteBase)  # ten of ten pages
    action = only_action(plan(state(9, pages_of(9, 1), deltas=old), page_count=980))
    assert isinstance(action, CreateDelta)
    assert BitMap.deserialize(action.pages) == pages_of(9, 30) | BitMap([980])


def test_chunks_beyond_the_end_are_dropped():
    gone = msgspec.structs.replace(base(8), blob=None)
    planned = plan(
        state(7, BitMap(), deltas=(delta(7, 3, pages_of(7, 1)),)),
        state(8, BitMap(), base=gone),
        state(6, BitMap()),
        page_count=650,
    )
    assert planned is not None
    assert planned.actions == (
        Drop(chunk_id=7, first_page=701, supersedes_base=1, supersedes_deltas=(3,)),
    )
    assert planned.next_chunk_id == 10  # never falls


def test_deltas_switched_off_are_rewrites():
    action = only_action(plan(state(2, pages_of(2, 1)), limits=DeltaLimits(enabled=False)))
    assert isinstance(action, RewriteBase)


def test_frames_that_change_nothing_still_make_a_generation():
    planned = plan(state(2, BitMap()))
    assert planned is not None
    assert (planned.actions, planned.segment_ids) == ((), (5, 6))


def test_nothing_waits_gives_no_plan():
    assert plan(segments=()) is None


def test_segments_without_their_changes_are_a_bug():
    late = SegmentView(
        engine="libsql", segment_id=9, first_lsn=78, last_lsn=79, segment_bytes=1, line_safe=True
    )
    with pytest.raises(InvariantViolation):
        plan(segments=(late,))


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, PER_CHUNK), st.integers(0, 4)),
        unique_by=lambda shape: shape[0], max_size=10,
    ),
    st.integers(1, 10 * PER_CHUNK),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_plan_deterministic_ordering(shapes, page_count, shuffled):
    chunks = [
        state(
            chunk_id, pages_of(chunk_id, dirty) & BitMap(range(1, page_count + 1)),
            deltas=tuple(delta(chunk_id, 2 + n, pages_of(chunk_id, 4)) for n in range(deltas)),
        )
        for chunk_id, dirty, deltas in shapes
    ]  # fmt: skip
    first = plan(*chunks, page_count=page_count)
    shuffled.shuffle(chunks)
    again = plan(*chunks, page_count=page_count)
    assert first is not None
    assert again is not None
    assert encode_plan(first) == encode_plan(again)
    assert decode_plan(encode_plan(first)) == first
    order = [action.chunk_id for action in first.actions]
    assert order == sorted(set(order))
    for action in first.actions:
        assert isinstance(action, Drop) == (action.chunk_id * PER_CHUNK >= page_count)
