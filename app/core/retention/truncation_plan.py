"""What a truncation drops: pure.

A truncation publishes a generation of its own, even where it only cuts WAL: a checkpoint that was
planned before it finds the generation moved and plans anew, so that nothing dropped is published
again (I6). Rows are superseded, never deleted: earlier generations stay as they were.

- head: chunks that end below the LSN. The WAL's records are not touched; a segment that only
  waits to be removed goes with its chunk.
- tail: everything from the LSN to the newest record at acceptance, which is where sealed segments
  ended then. What came later has segments and chunks of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from app.core.base.errors import InvariantViolation, LsnOutOfRange
from app.core.stores.manifest.records import ChunkRecord, DatabaseRecord, WalSegmentRecord

Direction = Literal["head", "tail"]
OnLease = Literal["wait", "cancel"]


class TruncationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What was accepted; kept as the job's `params`."""

    direction: Direction
    lsn: int
    end_lsn: int
    """The newest LSN at acceptance: a tail truncation reaches no further."""
    on_lease: OnLease = "wait"
    lease_timeout_seconds: float = 30.0

    def params(self) -> dict[str, Any]:
        return msgspec.structs.asdict(self)

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> "TruncationRequest":
        return msgspec.convert(params, cls)


@dataclass(frozen=True, slots=True, kw_only=True)
class TruncationContext:
    """The manifest at one moment."""

    database: DatabaseRecord
    published_lsn: int
    """The newest generation's `last_lsn`."""
    chunks: Sequence[ChunkRecord]
    """The newest generation's, in LSN order; drops left out."""
    segments: Sequence[WalSegmentRecord]


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentCut:
    segment_id: int
    visible_last: int
    drops_all: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TruncationPlan:
    db_id: int
    expected_generation: int
    covered_from: int
    """The first LSN that no generation has spoken for yet."""
    published_lsn: int
    """Up to here the new generation speaks for every LSN, dropped ones included. Never falls, or
    LSNs would be given out again after a recovery from the bucket (I14).
    """
    superseded: tuple[ChunkRecord, ...]
    """Their time ends with the new generation."""
    renewed: tuple[ChunkRecord, ...]
    """Rows of the new generation over the blobs of superseded ones, with a lower visible end."""
    cuts: tuple[SegmentCut, ...]
    first_lsn: int
    """Where reading starts from now on."""
    floor_lsn: int
    """LSNs below it are never given out again, though no row may be left that says so."""
    dropped_first: int
    dropped_last: int

    @property
    def target_generation(self) -> int:
        return self.expected_generation + 1


def check_range(
    request: TruncationRequest, database: DatabaseRecord, chunks: Sequence[ChunkRecord]
) -> None:
    """At acceptance. Raises LsnOutOfRange."""
    next_lsn = request.end_lsn + 1
    if request.direction == "head":
        if request.lsn > next_lsn:
            raise LsnOutOfRange(
                f"LSN {request.lsn} lies beyond the next one, {next_lsn}.", next_lsn=next_lsn
            )
        return
    lowest = max((row.first for row in chunks), default=database.first_lsn)
    if not max(lowest, database.first_lsn) <= request.lsn <= request.end_lsn:
        raise LsnOutOfRange(
            "A tail truncation reaches back over the WAL and, at most, the newest chunk: "
            f"from LSN {lowest} to {request.end_lsn}.",
            first_lsn=lowest,
            last_lsn=request.end_lsn,
        )


def plan_truncation(
    request: TruncationRequest, context: TruncationContext
) -> TruncationPlan | None:
    """None: there is nothing left to drop."""
    plan = _plan_head if request.direction == "head" else _plan_tail
    return plan(request, context)


def _plan_head(request: TruncationRequest, context: TruncationContext) -> TruncationPlan | None:
    database = context.database
    gone = tuple(row for row in context.chunks if row.visible_last < request.lsn)
    if not gone:
        return None
    left = [row.first for row in context.chunks if row.visible_last >= request.lsn]
    left += [
        segment.first_lsn
        for segment in context.segments
        if segment.state in {"open", "sealed"} and segment.first_lsn > context.published_lsn
    ]
    first_lsn = min(left, default=max(database.floor_lsn, gone[-1].last + 1))
    return TruncationPlan(
        db_id=database.db_id,
        expected_generation=database.generation,
        covered_from=context.published_lsn + 1,
        published_lsn=context.published_lsn,
        superseded=gone,
        renewed=(),
        cuts=tuple(
            _cut(segment, 0)
            for segment in context.segments
            if segment.state == "checkpointed" and segment.last_lsn < first_lsn
        ),
        first_lsn=first_lsn,
        floor_lsn=database.floor_lsn,
        dropped_first=gone[0].first,
        dropped_last=gone[-1].last,
    )


def _plan_tail(request: TruncationRequest, context: TruncationContext) -> TruncationPlan | None:
    database, last_left = context.database, request.lsn - 1
    chunks = [
        row
        for row in context.chunks
        if row.visible_last >= request.lsn and row.first <= request.end_lsn
    ]
    segments = [
        segment
        for segment in context.segments
        if segment.state in {"sealed", "checkpointed"}
        and _visible_last(segment) >= request.lsn
        and segment.first_lsn <= request.end_lsn
    ]
    if not chunks and not segments:
        return None
    if any(piece.last > request.end_lsn for piece in chunks) or any(
        segment.last_lsn > request.end_lsn for segment in segments
    ):
        raise InvariantViolation("a truncation within a segment or chunk", db_id=database.db_id)
    cuts = tuple(_cut(segment, last_left) for segment in segments)
    dropped_ids = {cut.segment_id for cut in cuts if cut.drops_all}
    unpublished = any(
        segment.state == "sealed"
        and segment.segment_id not in dropped_ids
        and segment.first_lsn <= request.end_lsn
        for segment in context.segments
    )
    return TruncationPlan(
        db_id=database.db_id,
        expected_generation=database.generation,
        covered_from=context.published_lsn + 1,
        # With no unpublished record left below it, the generation covers the dropped ones too.
        published_lsn=context.published_lsn
        if unpublished
        else max(context.published_lsn, request.end_lsn),
        superseded=tuple(chunks),
        renewed=tuple(
            msgspec.structs.replace(row, generation=database.generation + 1, visible_last=last_left)
            for row in chunks
            if row.first <= last_left
        ),
        cuts=cuts,
        first_lsn=database.first_lsn,
        floor_lsn=max(database.floor_lsn, request.end_lsn + 1),
        dropped_first=request.lsn,
        dropped_last=request.end_lsn,
    )


def _cut(segment: WalSegmentRecord, last_left: int) -> SegmentCut:
    return SegmentCut(
        segment_id=segment.segment_id,
        visible_last=max(last_left, segment.first_lsn - 1),
        drops_all=last_left < segment.first_lsn,
    )


def _visible_last(segment: WalSegmentRecord) -> int:
    return segment.last_lsn if segment.visible_last is None else segment.visible_last
