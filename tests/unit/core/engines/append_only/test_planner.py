"""The append_only planner, with plain values."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.base.errors import InvariantViolation
from app.core.engines.base import (
    CheckpointPlan,
    PlannerContext,
    SealAsBase,
    SegmentView,
    decode_plan,
    encode_plan,
)
from app.core.engines.planning import plan_checkpoint
from app.core.stores.manifest.records import BlobRef, ChunkRecord, DatabaseRecord

MIB = 1024 * 1024


def database(**changes) -> DatabaseRecord:
    base = DatabaseRecord(
        db_id=7, tenant="acme", name="log", engine="append_only", page_size=0,
        chunk_bytes=64 * MIB, compression="none", created_at_us=1,
    )  # fmt: skip
    return msgspec.structs.replace(base, **changes)


def segment(segment_id: int, first_lsn: int, last_lsn: int, **changes) -> SegmentView:
    values = {
        "engine": "append_only", "segment_id": segment_id, "first_lsn": first_lsn,
        "last_lsn": last_lsn, "segment_bytes": 64 * MIB, "line_safe": True,
    } | changes  # fmt: skip
    return SegmentView(**values)


def chunk(chunk_id: int, first: int, last: int) -> ChunkRecord:
    return ChunkRecord(
        db_id=7, chunk_id=chunk_id, generation=1,
        blob=BlobRef(key="k", sha256=bytes(32), crc64=0, bytes=1),
        first=first, last=last, visible_last=last,
    )  # fmt: skip


def plan(*segments: SegmentView, chunks=(), **changes) -> CheckpointPlan | None:
    return plan_checkpoint(
        PlannerContext(
            database=database(**changes),
            chunks=chunks,
            segments=segments,
            checkpoint_id="0000000001-000003-01J",
            epoch=3,
        )
    )


def test_append_only_plan_seals_wal_segment():
    planned = plan(segment(1, 1, 65_536))
    assert planned is not None
    assert planned.actions == (
        SealAsBase(
            chunk_id=0, segment_id=1, first_lsn=1, last_lsn=65_536,
            segment_bytes=64 * MIB, line_safe=True,
        ),
    )  # fmt: skip
    assert (planned.engine, planned.target_generation) == ("append_only", 1)
    assert (planned.first_lsn, planned.last_lsn) == (1, 65_536)
    assert planned.staged_bytes_max == 64 * MIB


def test_chunk_ids_go_on_where_the_database_stands():
    planned = plan(
        segment(5, 101, 150), segment(6, 151, 152),
        chunks=(chunk(3, 1, 100),), next_chunk_id=4, generation=2,
    )  # fmt: skip
    assert planned is not None
    assert [action.chunk_id for action in planned.actions] == [4, 5]
    assert planned == CheckpointPlan(
        engine="append_only", db_id=7, checkpoint_id="0000000001-000003-01J", epoch=3,
        expected_generation=2, first_lsn=101, last_lsn=152, page_count=0, next_chunk_id=6,
        codec="none", actions=planned.actions,
    )  # fmt: skip


def test_nothing_waits_gives_no_plan():
    assert plan() is None


def test_segments_with_a_gap_between_them_are_planned():
    planned = plan(segment(1, 1, 10), segment(2, (1 << 32) + 11, (1 << 32) + 20))
    assert planned is not None
    assert planned.last_lsn == (1 << 32) + 20


@pytest.mark.parametrize(
    ("segments", "chunks"),
    [
        ((segment(1, 5, 9),), (chunk(0, 1, 5),)),
        ((segment(1, 1, 9), segment(2, 9, 12)), ()),
    ],
)
def test_lsns_that_run_backwards_are_a_bug(segments, chunks):
    with pytest.raises(InvariantViolation):
        plan(*segments, chunks=chunks, next_chunk_id=1)


def test_the_wal_format_decides_the_planner():
    with pytest.raises(InvariantViolation):
        plan(segment(1, 1, 2, engine="libsql"))


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 1000)), min_size=1, max_size=20),
    st.integers(0, 1000),
)
def test_plan_deterministic_ordering(shapes, next_chunk_id):
    segments, lsn = [], 1
    for number, (count, gap) in enumerate(shapes, start=1):
        segments.append(segment(number, lsn + gap, lsn + gap + count - 1))
        lsn += gap + count
    first = plan(*segments, next_chunk_id=next_chunk_id)
    again = plan(*segments, next_chunk_id=next_chunk_id)
    assert first is not None
    assert again is not None
    assert encode_plan(first) == encode_plan(again)
    assert [a.chunk_id for a in first.actions] == sorted(a.chunk_id for a in first.actions)
    assert [a.segment_id for a in first.actions] == [s.segment_id for s in segments]


def test_a_persisted_plan_reads_back():
    planned = plan(segment(1, 1, 10))
    assert planned is not None
    assert decode_plan(encode_plan(planned)) == planned


def test_a_plan_of_another_version_is_refused():
    planned = plan(segment(1, 1, 10))
    assert planned is not None
    with pytest.raises(InvariantViolation):
        decode_plan(encode_plan(msgspec.structs.replace(planned, version=99)))
    with pytest.raises(InvariantViolation):
        decode_plan(b"\x00 not a plan")


def test_what_a_truncation_cut_off_stays_cut_off_in_the_chunk():
    planned = plan(segment(1, 1, 10, visible_last=6), segment(11, 11, 20))
    assert planned is not None
    assert [action.visible_last for action in planned.actions] == [6, None]
    assert (planned.first_lsn, planned.last_lsn) == (1, 20)


def test_what_was_dropped_behind_the_newest_segment_is_covered_too():
    planned = plan(segment(1, 1, 10), floor_lsn=16)
    assert planned is not None
    assert (planned.first_lsn, planned.last_lsn) == (1, 15)
    assert planned.actions[-1].last_lsn == 10
