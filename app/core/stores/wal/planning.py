"""Decides what one flush writes: LSNs, If-Match, and which entry goes into which segment. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from app.core.base.errors import LsnMismatch
from app.core.formats.segment import ENTRY_HEADER_BYTES, SEGMENT_HEADER_BYTES, EntryFlag, EntryType
from app.core.stores.wal.requests import UNIT_BYTES_MIN, Appended, AppendRequest, EntryPayload
from app.core.stores.wal.segments import SegmentMarks

HEADERS_BYTES_MIN = 1024 * 1024
"""Entry headers may take as much of a file as its payload, and this much in any case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSegment:
    """The segment that takes appends, if there is one."""

    segment_id: int
    ceiling_lsn: int
    marks: SegmentMarks


@dataclass(slots=True)
class PlacedEntry:
    payload: EntryPayload
    type: EntryType
    flags: int
    first_lsn: int
    offset: int
    key_hash: bytes | None
    body_hash: bytes | None

    @property
    def payload_offset(self) -> int:
        return self.offset + ENTRY_HEADER_BYTES


@dataclass(slots=True, kw_only=True, eq=False)
class Run:
    """Entries that follow each other in one segment. A segment's id is the first LSN it was made
    for: unique for the life of the database, since LSNs are (I14).
    """

    segment_id: int
    creates: bool
    first_lsn: int
    ceiling_lsn: int
    offset: int
    entries: list[PlacedEntry] = field(default_factory=list)
    marks: SegmentMarks

    @property
    def write_bytes(self) -> int:
        return self.marks.entries_end - self.offset


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A request that is written: its answer, and the segment where it begins."""

    appended: Appended
    segment_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    runs: tuple[Run, ...]
    outcomes: tuple[Placed | LsnMismatch, ...]  # one for each request, in order
    next_lsn: int

    @property
    def write_bytes(self) -> int:
        return sum(run.write_bytes for run in self.runs)


def plan_group(
    requests: Sequence[AppendRequest],
    *,
    next_lsn: int,
    tail: OpenSegment | None,
    chunk_bytes: int,
) -> GroupPlan:
    """Requests take LSNs in their order; one whose If-Match fails takes none."""
    outcomes: list[Placed | LsnMismatch] = []
    placing = _Placing(tail, chunk_bytes)
    for request in requests:
        expected = request.expected_next_lsn
        if expected is not None and expected != next_lsn:
            outcomes.append(
                LsnMismatch(f"next_lsn is {next_lsn}, not {expected}.", next_lsn=next_lsn)
            )
            continue
        appended, segment_id = placing.place(request, first_lsn=next_lsn)
        outcomes.append(Placed(appended=appended, segment_id=segment_id))
        next_lsn = appended.last_lsn + 1
    return GroupPlan(runs=placing.finish(), outcomes=tuple(outcomes), next_lsn=next_lsn)


class _Placing:
    def __init__(self, tail: OpenSegment | None, chunk_bytes: int) -> None:
        self._chunk_bytes = chunk_bytes
        self._entries_end_max = chunk_bytes + max(chunk_bytes, HEADERS_BYTES_MIN)
        self._runs: list[Run] = []
        self._run: Run | None = None
        self._end = self._next_lsn = self._entries = self._payload_bytes = 0
        self._line_safe, self._keyed = True, False
        if tail is not None:
            self._run = Run(
                segment_id=tail.segment_id, creates=False, first_lsn=tail.marks.next_lsn,
                ceiling_lsn=tail.ceiling_lsn, offset=tail.marks.entries_end, marks=tail.marks,
            )  # fmt: skip
            self._load_marks(tail.marks)

    def place(self, request: AppendRequest, *, first_lsn: int) -> tuple[Appended, int]:
        keyed = EntryFlag.KEYED if request.key_hash is not None else 0
        flags: int = EntryFlag.BEGINS | keyed
        lsn, payload_bytes, begins_in = first_lsn, 0, 0
        last = len(request.entries) - 1
        for position, payload in enumerate(request.entries):
            size, count = payload.payload_bytes, payload.count
            run = self._run_for(size, count, lsn)
            if position == 0:
                begins_in = run.segment_id
            if position == last:
                flags |= EntryFlag.ENDS
            safe = payload.line_safe
            run.entries.append(
                PlacedEntry(
                    payload, request.entry_type, flags | EntryFlag.LINE_SAFE if safe else flags,
                    lsn, self._end, request.key_hash, request.body_hash,
                )
            )  # fmt: skip
            self._end += ENTRY_HEADER_BYTES + size
            self._payload_bytes += size
            self._entries += 1
            self._line_safe = self._line_safe and safe
            self._keyed = self._keyed or bool(keyed)
            lsn += count
            self._next_lsn = lsn
            payload_bytes += size
            flags = keyed
        return (
            Appended(
                first_lsn=first_lsn, last_lsn=lsn - 1, count=lsn - first_lsn,
                payload_bytes=payload_bytes,
            ),
            begins_in,
        )  # fmt: skip

    def finish(self) -> tuple[Run, ...]:
        self._close_run()
        return tuple(self._runs)

    def _run_for(self, size: int, count: int, lsn: int) -> Run:
        """The current run, or one in a new segment where this entry does not fit or would leave a
        hole within the segment.
        """
        run = self._run
        if run is None or self._next_lsn != lsn or not self._fits(size):
            self._close_run()
            marks = SegmentMarks(next_lsn=lsn)
            self._load_marks(marks)
            run = self._run = Run(
                segment_id=lsn, creates=True, first_lsn=lsn, ceiling_lsn=0,
                offset=SEGMENT_HEADER_BYTES, marks=marks,
            )  # fmt: skip
        if self._entries == 0:
            # Either this entry will be alone, or all payload together is at most chunk_bytes.
            lsns_max = max(count, self._chunk_bytes // UNIT_BYTES_MIN) + 1
            run.ceiling_lsn = max(run.ceiling_lsn, lsn + lsns_max)
        return run

    def _fits(self, size: int) -> bool:
        return self._entries == 0 or (
            self._payload_bytes + size <= self._chunk_bytes
            and self._end + ENTRY_HEADER_BYTES + size <= self._entries_end_max
        )

    def _load_marks(self, marks: SegmentMarks) -> None:
        self._end = marks.entries_end
        self._next_lsn = marks.next_lsn
        self._entries = marks.entries
        self._payload_bytes = marks.payload_bytes
        self._line_safe = marks.line_safe
        self._keyed = marks.keyed

    def _close_run(self) -> None:
        run = self._run
        if run is not None and run.entries:
            run.marks = replace(
                run.marks, entries_end=self._end, next_lsn=self._next_lsn, entries=self._entries,
                payload_bytes=self._payload_bytes, line_safe=self._line_safe, keyed=self._keyed,
            )  # fmt: skip
            self._runs.append(run)
