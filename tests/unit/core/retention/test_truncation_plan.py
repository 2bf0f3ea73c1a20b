"""What a truncation drops, with plain values."""

import random
from dataclasses import dataclass, field

import msgspec
import pytest

from app.core.base.errors import InvariantViolation, LsnOutOfRange
from app.core.retention.truncation_plan import (
    SegmentCut,
    TruncationContext,
    TruncationPlan,
    TruncationRequest,
    check_range,
    plan_truncation,
)
from app.core.stores.manifest.records import (
    BlobRef,
    ChunkRecord,
    DatabaseRecord,
    WalSegmentRecord,
)

replace = msgspec.structs.replace
GENERATION = 5


def database(**changes) -> DatabaseRecord:
    base = DatabaseRecord(
        db_id=7, tenant="acme", name="log", engine="append_only", page_size=0, chunk_bytes=1 << 20,
        compression="none", created_at_us=1, generation=GENERATION,
    )  # fmt: skip
    return replace(base, **changes)


def chunk(chunk_id: int, first: int, last: int, visible_last: int | None = None) -> ChunkRecord:
    return ChunkRecord(
        db_id=7, chunk_id=chunk_id, generation=chunk_id + 1,
        blob=BlobRef(key=f"c{chunk_id}", sha256=bytes(32), crc64=0, bytes=1),
        first=first, last=last, visible_last=last if visible_last is None else visible_last,
    )  # fmt: skip


def segment(first: int, last: int, state="sealed", **changes) -> WalSegmentRecord:
    return WalSegmentRecord(
        db_id=7, segment_id=first, first_lsn=first, ceiling_lsn=1000, state=state,
        last_lsn=0 if state == "open" else last, **changes,
    )  # fmt: skip


def head(lsn: int, end: int = 99) -> TruncationRequest:
    return TruncationRequest(direction="head", lsn=lsn, end_lsn=end)


def tail(lsn: int, end: int) -> TruncationRequest:
    return TruncationRequest(direction="tail", lsn=lsn, end_lsn=end)


def plan(request, chunks=(), segments=(), *, published=0, **changes) -> TruncationPlan | None:
    return plan_truncation(
        request,
        TruncationContext(
            database=database(**changes), published_lsn=published, chunks=chunks, segments=segments
        ),
    )


def superseded(planned: TruncationPlan) -> list[int]:
    return [row.chunk_id for row in planned.superseded]


# --- head -------------------------------------------------------------------------------------

CHUNKS = (chunk(0, 1, 10), chunk(1, 11, 20), chunk(2, 21, 30))


@pytest.mark.parametrize(
    ("lsn", "gone", "first_lsn"), [(11, [0], 11), (20, [0], 11), (21, [0, 1], 21), (30, [0, 1], 21)]
)
def test_a_head_keeps_the_chunk_that_holds_the_lsn(lsn, gone, first_lsn):
    planned = plan(head(lsn), CHUNKS, published=30)
    assert planned is not None
    assert (superseded(planned), planned.first_lsn) == (gone, first_lsn)
    assert planned.renewed == ()
    assert (planned.dropped_first, planned.dropped_last) == (1, gone[-1] * 10 + 10)


@pytest.mark.parametrize("lsn", [1, 10])
def test_a_head_within_the_first_chunk_changes_nothing(lsn):
    assert plan(head(lsn), CHUNKS, published=30) is None


def test_a_head_over_everything_leaves_what_is_only_in_the_wal():
    planned = plan(head(36), CHUNKS, [segment(31, 35)], published=30, floor_lsn=31)
    assert planned is not None
    assert (planned.first_lsn, planned.cuts) == (31, ())


@pytest.mark.parametrize(
    ("segments", "floor_lsn", "first_lsn"),
    [
        ([], 500, 500),
        ([], 0, 31),
        ([segment(501, 0, "open")], 0, 501),
        ([segment(31, 40, "dropped"), segment(1, 10, "checkpointed")], 41, 41),
    ],
    ids=["floor", "next", "open segment", "nothing of dropped and published ones"],
)
def test_a_head_over_everything_leads_to_the_next_lsn(segments, floor_lsn, first_lsn):
    planned = plan(head(31), CHUNKS, segments, published=30, floor_lsn=floor_lsn)
    assert planned is not None
    assert planned.first_lsn == first_lsn


def test_a_head_publishes_no_lsn_and_raises_no_floor():
    segments = [segment(1, 10, "checkpointed"), segment(11, 11, "checkpointed")]
    assert plan(head(11), CHUNKS, segments, published=30, floor_lsn=31) == TruncationPlan(
        db_id=7, expected_generation=GENERATION, covered_from=31, published_lsn=30,
        superseded=CHUNKS[:1], renewed=(),
        cuts=(SegmentCut(segment_id=1, visible_last=0, drops_all=True),),
        first_lsn=11, floor_lsn=31, dropped_first=1, dropped_last=10,
    )  # fmt: skip


def test_a_head_takes_along_wal_that_waits_to_be_removed():
    segments = [segment(1, 10, "checkpointed"), segment(11, 20, "checkpointed")]
    planned = plan(head(11), CHUNKS, segments, published=30)
    assert planned is not None
    assert planned.cuts == (SegmentCut(segment_id=1, visible_last=0, drops_all=True),)


def test_a_head_goes_by_what_is_readable_of_a_chunk():
    chunks = [chunk(0, 1, 10, visible_last=5), chunk(1, 21, 30)]
    planned = plan(head(8), chunks, published=30)
    assert planned is not None
    assert (superseded(planned), planned.first_lsn) == ([0], 21)


# --- tail -------------------------------------------------------------------------------------


def test_a_tail_within_the_wal_cuts_segments():
    segments = [segment(11, 20), segment(21, 30), segment(31, 0, "open")]
    planned = plan(tail(15, 30), [chunk(0, 1, 10)], segments, published=10)
    assert planned is not None
    assert planned.cuts == (
        SegmentCut(segment_id=11, visible_last=14, drops_all=False),
        SegmentCut(segment_id=21, visible_last=20, drops_all=True),
    )
    assert (superseded(planned), planned.renewed) == ([], ())
    assert (planned.published_lsn, planned.floor_lsn) == (10, 31), "11 to 14 are not published"


def test_a_tail_of_one_record_drops_the_segment_that_holds_only_it():
    planned = plan(tail(20, 20), segments=[segment(11, 19), segment(20, 20)], published=10)
    assert planned is not None
    assert planned.cuts == (SegmentCut(segment_id=20, visible_last=19, drops_all=True),)
    assert planned.published_lsn == 10


def test_a_tail_over_the_whole_wal_leaves_nothing_unpublished():
    planned = plan(tail(11, 20), [chunk(0, 1, 10)], [segment(11, 20)], published=10)
    assert planned is not None
    assert (planned.covered_from, planned.published_lsn) == (11, 20)


def test_a_tail_into_the_newest_chunk_renews_its_row():
    segments = [segment(1, 10, "checkpointed"), segment(11, 20)]
    planned = plan(tail(6, 20), [chunk(0, 1, 10)], segments, published=10)
    assert planned is not None
    (row,) = planned.renewed
    assert (row.chunk_id, row.generation, row.first, row.last) == (0, GENERATION + 1, 1, 10)
    assert (row.visible_last, row.superseded_at, row.blob) == (5, None, chunk(0, 1, 10).blob)
    assert [cut.visible_last for cut in planned.cuts] == [5, 10]


def test_a_tail_from_a_chunks_first_lsn_leaves_no_row_of_it():
    planned = plan(tail(11, 20), [chunk(0, 1, 10), chunk(1, 11, 20)], published=20)
    assert planned is not None
    assert (superseded(planned), planned.renewed) == ([1], ())


def test_a_tail_leaves_what_came_after_its_acceptance():
    """A checkpoint ran while it waited: what it reaches lies in several chunks now."""
    chunks = [chunk(0, 1, 10), chunk(1, 11, 20), chunk(2, 21, 25)]
    planned = plan(tail(8, 20), chunks, [segment(26, 30)], published=25)
    assert planned is not None
    assert superseded(planned) == [0, 1]
    assert [row.visible_last for row in planned.renewed] == [7]
    assert (planned.dropped_first, planned.dropped_last) == (8, 20)
    assert planned.published_lsn == 25


def test_what_is_dropped_already_is_not_dropped_again():
    chunks = [chunk(0, 1, 10, visible_last=5)]
    segments = [segment(11, 20, visible_last=10, state="dropped")]
    assert plan(tail(6, 20), chunks, segments, published=20) is None
    planned = plan(tail(4, 20), chunks, segments, published=20)
    assert planned is not None
    assert (superseded(planned), planned.cuts) == ([0], ())


def test_a_tail_leaves_where_reading_starts():
    chunks = [chunk(0, 3, 10), chunk(1, 11, 20)]
    assert plan(tail(11, 20), chunks, published=20, first_lsn=5) == TruncationPlan(
        db_id=7, expected_generation=GENERATION, covered_from=21, published_lsn=20,
        superseded=(chunks[1],), renewed=(), cuts=(), first_lsn=5, floor_lsn=21,
        dropped_first=11, dropped_last=20,
    )  # fmt: skip


def test_a_published_watermark_never_falls():
    planned = plan(tail(5, 10), [chunk(0, 1, 10)], published=500, floor_lsn=501)
    assert planned is not None
    assert (planned.published_lsn, planned.floor_lsn) == (500, 501)


def test_a_segment_that_goes_on_beyond_the_end_is_a_bug():
    with pytest.raises(InvariantViolation):
        plan(tail(15, 18), segments=[segment(11, 20)])


# --- acceptance -------------------------------------------------------------------------------


@pytest.mark.parametrize("lsn", [10, 36])
def test_a_tail_beyond_its_reach_is_refused(lsn):
    with pytest.raises(LsnOutOfRange) as refused:
        check_range(tail(lsn, 35), database(), [chunk(0, 1, 10), chunk(1, 11, 20)])
    assert refused.value.fields == {"first_lsn": 11, "last_lsn": 35}


@pytest.mark.parametrize("lsn", [11, 20, 35])
def test_a_tail_may_reach_the_newest_chunk_and_the_wal(lsn):
    check_range(tail(lsn, 35), database(), [chunk(0, 1, 10), chunk(1, 11, 20)])


def test_a_tail_reaches_no_further_back_than_reading():
    with pytest.raises(LsnOutOfRange):
        check_range(tail(4, 35), database(first_lsn=5), [])
    check_range(tail(5, 35), database(first_lsn=5), [])


def test_a_head_up_to_the_next_lsn():
    check_range(head(36, 35), database(), [])
    with pytest.raises(LsnOutOfRange, match=r"37 .* 36") as refused:
        check_range(head(37, 35), database(), [])
    assert refused.value.fields == {"next_lsn": 36}


def test_a_request_survives_its_job():
    request = TruncationRequest(
        direction="tail", lsn=5, end_lsn=9, on_lease="cancel", lease_timeout_seconds=1.5
    )
    assert TruncationRequest.of(request.params()) == request


# --- against a model --------------------------------------------------------------------------


@dataclass
class Log:
    """Rows as the manifest would hold them, and the LSNs that must be readable."""

    chunks: list[ChunkRecord] = field(default_factory=list)
    segments: list[WalSegmentRecord] = field(default_factory=list)
    next_lsn: int = 1
    first_lsn: int = 1
    floor_lsn: int = 1
    published: int = 0
    generation: int = 0
    next_chunk_id: int = 0
    expected: set[int] = field(default_factory=set)

    def append(self, count: int) -> None:
        first, self.next_lsn = self.next_lsn, self.next_lsn + count
        self.segments.append(segment(first, self.next_lsn - 1))
        self.expected |= set(range(first, self.next_lsn))

    def checkpoint(self) -> None:
        waiting = [one for one in self.segments if one.state == "sealed"]
        if not waiting:
            return
        self.generation += 1
        for one in waiting:
            row = chunk(self.next_chunk_id, one.first_lsn, one.last_lsn, one.visible_last)
            self.chunks.append(replace(row, generation=self.generation))
            self.next_chunk_id += 1
        self.segments = [
            replace(one, state="checkpointed") if one in waiting else one for one in self.segments
        ]
        self.published = max(self.published, waiting[-1].last_lsn)
        self.floor_lsn = max(self.floor_lsn, self.published + 1)

    def release(self) -> None:
        self.segments = [one for one in self.segments if one.state == "sealed"]

    def restart(self) -> None:
        """What is left alone must say which LSN comes next."""
        ends = [one.last_lsn + 1 for one in self.segments]
        assert max([self.floor_lsn, *ends]) == self.next_lsn

    def truncate(self, request: TruncationRequest, next_lsn: int) -> None:
        """Accepted when `next_lsn` came next; run now."""
        record = database(
            generation=self.generation, first_lsn=self.first_lsn, floor_lsn=self.floor_lsn
        )
        planned = plan_truncation(
            request,
            TruncationContext(
                database=record, published_lsn=self.published, chunks=self.chunks,
                segments=self.segments,
            ),
        )  # fmt: skip
        if request.direction == "tail":
            self.expected -= set(range(request.lsn, next_lsn))
        else:
            for row in self.chunks:
                if row.visible_last < request.lsn:
                    self.expected -= set(range(row.first, row.visible_last + 1))
        if planned is None:
            return
        gone = {row.chunk_id for row in planned.superseded}
        kept = [row for row in self.chunks if row.chunk_id not in gone]
        self.chunks = sorted([*kept, *planned.renewed], key=lambda row: row.chunk_id)
        cuts = {cut.segment_id: cut for cut in planned.cuts}
        self.segments = [
            one
            if (cut := cuts.get(one.segment_id)) is None
            else replace(
                one, visible_last=cut.visible_last, state="dropped" if cut.drops_all else one.state
            )
            for one in self.segments
        ]
        assert planned.published_lsn >= self.published
        self.generation, self.published = planned.target_generation, planned.published_lsn
        self.first_lsn, self.floor_lsn = planned.first_lsn, planned.floor_lsn

    def check(self) -> None:
        shown: set[int] = set()
        for row in self.chunks:
            shown |= set(range(row.first, row.visible_last + 1))
        for one in self.segments:
            if one.state != "dropped":
                last = one.last_lsn if one.visible_last is None else one.visible_last
                shown |= set(range(one.first_lsn, last + 1))
        assert shown == self.expected
        assert all(lsn >= self.first_lsn for lsn in shown)
        unpublished = {
            lsn
            for one in self.segments
            if one.state == "sealed"
            for lsn in range(one.first_lsn, one.last_lsn + 1)
        }
        assert all(lsn > self.published for lsn in unpublished)


@pytest.mark.parametrize("seed", range(60))
def test_any_sequence_leaves_what_was_not_dropped(seed):
    draw = random.Random(seed)
    log = Log()
    for _ in range(40):
        match draw.randrange(6):
            case 0 | 1:
                log.append(draw.randrange(1, 6))
            case 2:
                log.checkpoint()
            case 3:
                log.release()
                log.restart()
            case 4:
                reach = max((row.first for row in log.chunks), default=log.first_lsn)
                low = max(reach, log.first_lsn)
                if low < log.next_lsn:
                    accepted = log.next_lsn
                    request = tail(draw.randrange(low, accepted), accepted - 1)
                    for _ in range(draw.randrange(3)):  # while it waits
                        draw.choice([lambda: log.append(2), log.checkpoint, log.release])()
                    log.truncate(request, accepted)
            case _:
                log.truncate(head(draw.randrange(1, log.next_lsn + 1)), log.next_lsn)
        log.check()
