import random
from pathlib import Path

import numpy as np
import pytest

from app.core.reads.paged_plan import ChunkPage, PagedPlan
from app.core.reads.read_plan import ChunkSpan, WalSpan, plan_spans
from app.core.stores.manifest.records import BlobRef, ChunkRecord
from tests.helpers.logs import SegmentFile


def chunk(first, last, *, visible_last=None, chunk_id=0, dropped=False):
    blob = BlobRef(key=f"c{first}", sha256=bytes(32), crc64=0, bytes=1)
    return ChunkRecord(
        db_id=7, chunk_id=chunk_id, generation=1, blob=None if dropped else blob, first=first,
        last=last, visible_last=last if visible_last is None else visible_last,
    )  # fmt: skip


def segment(first, last):
    return SegmentFile(
        segment_id=first, path=Path("/nowhere"), first_lsn=first, durable_last_lsn=last,
        entries_end=64, index=np.zeros((0, 2), np.uint64), sealed=True, line_safe=True, records=(),
    )  # fmt: skip


def plan(chunks, segments, from_lsn=1, to_lsn=None, limit=None, next_lsn=None):
    ends = [row.visible_last for row in chunks] + [one.durable_last_lsn for one in segments]
    return plan_spans(
        chunks, segments, from_lsn=from_lsn, to_lsn=to_lsn, limit=limit,
        next_lsn=max(ends, default=0) + 1 if next_lsn is None else next_lsn,
    )  # fmt: skip


def plan_cut(chunks, segments, cut, next_lsn, from_lsn=1):
    return plan_spans(
        chunks, segments, from_lsn=from_lsn, to_lsn=None, limit=None, next_lsn=next_lsn, cut=cut
    )


def shown(result):
    kinds = {WalSpan: "wal", ChunkSpan: "chunk"}
    return [(kinds[type(span)], span.first_lsn, span.last_lsn) for span in result.spans]


def outcome(result):
    return result.first_lsn, result.last_lsn, result.next_lsn


def by_lsn(spans):
    return [
        (one, span.segment if isinstance(span, WalSpan) else span.row)
        for span in spans
        for one in range(span.first_lsn, span.last_lsn + 1)
    ]


def paged(source, rows, segments, from_lsn, to_lsn, limit, next_lsn):
    """The same by pages, cut anywhere."""
    planned = PagedPlan(segments, from_lsn=from_lsn, to_lsn=to_lsn, limit=limit, next_lsn=next_lsn)
    left = [row for row in sorted(rows, key=lambda row: row.first) if row.last >= from_lsn]
    spans = []
    while not planned.done:
        count = source.randint(1, 3)
        page, left = left[:count], left[count:]
        is_last = not page or (not left and source.random() < 0.5)
        spans += planned.add(ChunkPage(page, is_last=is_last))
    return planned.first_lsn, planned.last_lsn, planned.next_lsn, by_lsn(spans)


def test_nothing_at_all():
    assert outcome(plan([], [])) == (None, None, 1)
    assert outcome(plan([], [], from_lsn=5)) == (None, None, 5)


def test_chunks_then_wal():
    result = plan([chunk(1, 10), chunk(11, 20)], [segment(21, 30)])
    assert shown(result) == [("chunk", 1, 10), ("chunk", 11, 20), ("wal", 21, 30)]
    assert outcome(result) == (1, 30, 31)


def test_the_wal_is_preferred_and_knows_its_published_copy():
    rows = [chunk(1, 10), chunk(11, 20)]
    result = plan(rows, [segment(11, 20), segment(21, 25)])
    assert shown(result) == [("chunk", 1, 10), ("wal", 11, 20), ("wal", 21, 25)]
    assert result.spans[1].published is rows[1]
    assert result.spans[2].published is None


def test_a_chunk_is_left_for_the_wal_where_that_begins():
    result = plan([chunk(1, 10)], [segment(4, 6)])
    assert shown(result) == [("chunk", 1, 3), ("wal", 4, 6), ("chunk", 7, 10)]


def test_a_read_ends_before_a_gap_and_says_where_to_go_on():
    rows = [chunk(1, 10), chunk(20, 30)]
    assert outcome(plan(rows, [])) == (1, 10, 20)
    assert outcome(plan(rows, [], from_lsn=11)) == (20, 30, 31)
    assert outcome(plan(rows, [], to_lsn=15)) == (1, 10, 16)
    assert outcome(plan(rows, [], from_lsn=12, to_lsn=15)) == (None, None, 16)
    assert outcome(plan(rows, [segment(40, 41)], from_lsn=25)) == (25, 30, 40)


def test_a_recovered_database_goes_on_beyond_the_gap_it_leaves():
    far = 2**32 + 11
    assert outcome(plan([chunk(1, 10)], [], next_lsn=far)) == (1, 10, far)
    assert outcome(plan([chunk(1, 10)], [], from_lsn=11, next_lsn=far)) == (None, None, far)
    assert outcome(plan([chunk(1, 10)], [segment(far, far)], from_lsn=11)) == (far, far, far + 1)


def test_beyond_the_newest_record():
    assert outcome(plan([], [segment(1, 5)], from_lsn=6)) == (None, None, 6)
    assert outcome(plan([], [segment(1, 5)], from_lsn=9)) == (None, None, 9)


def test_to_and_limit():
    rows = [chunk(1, 10), chunk(11, 20)]
    assert outcome(plan(rows, [], from_lsn=3, to_lsn=12)) == (3, 12, 13)
    assert outcome(plan(rows, [], from_lsn=3, limit=4)) == (3, 6, 7)
    assert outcome(plan(rows, [], from_lsn=3, limit=9)) == (3, 11, 12)
    assert outcome(plan(rows, [], from_lsn=3, to_lsn=5, limit=9)) == (3, 5, 6)
    assert outcome(plan(rows, [], from_lsn=9, to_lsn=8)) == (None, None, 9)
    assert outcome(plan(rows, [], from_lsn=9, to_lsn=0)) == (None, None, 9)
    assert outcome(plan([chunk(8, 9)], [], limit=1)) == (8, 8, 9)  # counted from the first record


def test_a_segment_that_was_not_pinned_is_not_taken_for_a_gap():
    """Pins reach no further than `to_lsn`; beyond it nothing is known."""
    result = plan([chunk(50, 60)], [segment(1, 10)], to_lsn=10, next_lsn=100)
    assert outcome(result) == (1, 10, 11)
    result = plan([chunk(50, 60)], [segment(1, 10)], to_lsn=20, next_lsn=100)
    assert outcome(result) == (1, 10, 21)


def test_what_a_tail_truncation_hid_stays_hidden_in_the_wal_too():
    rows = [chunk(1, 10, visible_last=6)]
    assert outcome(plan(rows, [segment(11, 12)])) == (1, 6, 11)
    result = plan(rows, [segment(1, 10), segment(11, 12)])
    assert shown(result) == [("wal", 1, 6)]
    assert outcome(result) == (1, 6, 11)
    assert outcome(plan(rows, [segment(1, 12)], from_lsn=7)) == (11, 12, 13)


def test_a_chunk_all_hidden_and_a_dropped_one():
    rows = [chunk(1, 5), chunk(6, 10, visible_last=5), chunk(11, 12, dropped=True)]
    assert outcome(plan(rows, [], next_lsn=13)) == (1, 5, 13)


@pytest.mark.parametrize("first_seed", range(0, 300, 20))
def test_against_a_plain_list(first_seed):
    for seed in range(first_seed, first_seed + 20):
        print(f"seed {seed}")
        check_against_a_plain_list(random.Random(seed))


def check_against_a_plain_list(source):
    lsn, truth, rows, segments, hidden = 1, {}, [], [], set()
    for number in range(source.randint(0, 8)):
        lsn += source.choice([0, 0, 0, 5])
        last = lsn + source.randint(0, 6)
        kind = source.choice(["chunk", "both", "wal"])
        if kind in {"chunk", "both"}:
            visible = source.choice([last, last, source.randint(lsn - 1, last)])
            rows.append(chunk(lsn, last, visible_last=visible, chunk_id=number))
            truth.update(dict.fromkeys(range(lsn, visible + 1), "chunk"))
            hidden |= set(range(visible + 1, last + 1))
        if kind in {"both", "wal"}:
            segments.append(segment(lsn, last))
            truth.update(dict.fromkeys(set(range(lsn, last + 1)) - hidden, "wal"))
        lsn = last + 1
    next_lsn = lsn + source.choice([0, 0, 9])
    source.shuffle(rows)
    for _ in range(30):
        from_lsn = source.randint(1, next_lsn + 3)
        to_lsn = source.choice([None, source.randint(0, next_lsn + 3)])
        limit = source.choice([None, source.randint(1, 12)])
        end = next_lsn - 1 if to_lsn is None else min(to_lsn, next_lsn - 1)
        wanted = []
        for one in range(from_lsn, end + 1):
            if one in truth:
                wanted.append(one)
            elif wanted:
                break
        wanted = wanted[:limit]
        result = plan(rows, segments, from_lsn, to_lsn, limit, next_lsn)
        assert paged(source, rows, segments, from_lsn, to_lsn, limit, next_lsn) == (
            *outcome(result), by_lsn(result.spans),
        )  # fmt: skip
        kinds = [(one, "wal" if isinstance(source, SegmentFile) else "chunk")
                 for one, source in by_lsn(result.spans)]  # fmt: skip
        assert kinds == [(one, truth[one]) for one in wanted]
        if wanted:
            assert (result.first_lsn, result.last_lsn) == (wanted[0], wanted[-1])
        reached = wanted[-1] if wanted else from_lsn - 1
        assert result.next_lsn > reached
        assert not any(one in truth for one in range(reached + 1, result.next_lsn))
        if to_lsn is None and limit is None and not any(one > reached for one in truth):
            assert result.next_lsn == max(next_lsn, from_lsn)


def test_what_was_cut_off_the_wal_is_a_gap():
    segments = [segment(1, 10), segment(11, 20), segment(21, 30)]
    result = plan_cut([], segments, [(6, 10), (11, 20)], next_lsn=31)
    assert (shown(result), outcome(result)) == ([("wal", 1, 5)], (1, 5, 21))
    result = plan_cut([], segments, [(6, 10), (11, 20)], next_lsn=31, from_lsn=6)
    assert (shown(result), outcome(result)) == ([("wal", 21, 30)], (21, 30, 31))


def test_a_cut_at_the_end_leads_to_the_next_lsn():
    result = plan_cut([], [segment(1, 10)], [(6, 10)], next_lsn=11, from_lsn=6)
    assert outcome(result) == (None, None, 11)


def test_overlapping_cuts_of_chunk_and_wal_hide_what_either_hides():
    row = chunk(1, 10, visible_last=4)
    result = plan_cut([row], [segment(1, 10), segment(11, 12)], [(8, 10)], next_lsn=13)
    assert (shown(result), outcome(result)) == ([("wal", 1, 4)], (1, 4, 11))


def test_a_published_copy_of_a_dropped_segment_stays_hidden_too():
    """The newest generation has no row for it any more; the file waits for a reader."""
    result = plan_cut([chunk(1, 10)], [segment(11, 20)], [(11, 20)], next_lsn=21)
    assert (shown(result), outcome(result)) == ([("chunk", 1, 10)], (1, 10, 21))
