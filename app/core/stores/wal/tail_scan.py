"""Follows requests through the unsealed segments of a log, to find where the log ends.

Only bytes are judged here; nothing is changed.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

from app.core.formats.damage import Damage
from app.core.formats.segment import EntryFlag, EntryHeader, pack_directory
from app.core.stores.wal.remembered import REMEMBERED_COUNT_MAX, RememberedAppend, SegmentAppend
from app.core.stores.wal.scan import SegmentReader
from app.core.stores.wal.segments import Segment, SegmentMarks


@dataclass(frozen=True, slots=True)
class Boundary:
    """A place between two requests."""

    position: int  # of the segment in TailScan.segments
    marks: SegmentMarks


@dataclass(frozen=True, slots=True)
class ScanMark:
    """Where a scan was."""

    segments: int
    within: bool | None
    boundary: Boundary | None
    stop: str | None
    claimed: bool
    broken_seal: bool


class TailScan:
    """Segments are given in order. `within`: a request has begun and not ended; None where that
    cannot be known, since the segment before is gone.
    """

    def __init__(self, *, within: bool | None) -> None:
        self.segments: list[Segment] = []  # `written` is the end of the last intact entry
        self.within = within
        self.boundary: Boundary | None = None
        """The end of the last complete request. None while within one that an earlier segment
        began."""
        self.stop: str | None = None
        """Why the last segment could not be read to its end."""
        self.claimed = False
        """What lies after `boundary` was durable, says a later entry."""
        self.broken_seal = False
        """What lies after the last intact entry is part of a directory, as a crash leaves one."""

    def add(self, segment: Segment, reader: SegmentReader, requests: "KeyedRequests") -> None:
        """Raises nothing for bad entries: they set `stop`, and nothing may be added then."""
        assert self.stop is None
        before = self.segments[-1] if self.segments else None
        self.segments.append(segment)
        position = len(self.segments) - 1
        if not self.within:
            self.boundary = Boundary(position, segment.written)
        try:
            if before is not None and not _continues(before, segment, within=bool(self.within)):
                raise Damage("LSNs are not contiguous between segments")
            for offset, entry in reader.iter_entries(end=reader.size):
                self._check_place(entry, offset)
                segment.index.add(first_lsn=entry.first_lsn, offset=offset)
                segment.written = marks = marks_after(segment.written, entry, offset=offset)
                requests.add(entry, segment_id=segment.segment_id)
                self.within = not entry.flags & EntryFlag.ENDS
                if not self.within:
                    self.boundary = Boundary(position, marks)
        except Damage as damage:
            self.stop = str(damage)

    def mark(self) -> ScanMark:
        return ScanMark(
            len(self.segments), self.within, self.boundary, self.stop, self.claimed,
            self.broken_seal,
        )  # fmt: skip

    def leave_out_incomplete(self, mark: ScanMark) -> None:
        """Of the segments that were added since, those behind the last complete request: as if
        they had not been added.
        """
        boundary = self.boundary
        whole = 0 if boundary is None else boundary.position + bool(boundary.marks.entries)
        if whole <= mark.segments:
            del self.segments[mark.segments :]
            self.within, self.boundary, self.stop = mark.within, mark.boundary, mark.stop
            self.claimed, self.broken_seal = mark.claimed, mark.broken_seal
        elif whole < len(self.segments):
            del self.segments[whole:]
            self.stop = None
            if boundary is not None and boundary.position == whole:
                self.within, self.boundary = False, Boundary(whole - 1, self.segments[-1].written)

    def look_behind(self, reader: SegmentReader, *, db_id: int) -> None:
        """After a stop in the last segment: what is there instead of an entry?"""
        last = self.segments[-1]
        lsn = self.boundary.marks.next_lsn if self.boundary else last.first_lsn
        self.claimed = reader.claims_durable(lsn, start=last.written.entries_end)
        directory = pack_directory(last.written_summary(db_id), last.index.array())
        rest = reader.rest(last.written.entries_end, length_max=len(directory))
        self.broken_seal = rest is not None and _is_part_of(directory, rest)

    def goes_on_at(self, first_lsn: int) -> bool:
        """Whether no LSN is missing before `first_lsn`, where the next registered segment begins;
        if so, what lies behind the stop is nothing.
        """
        last = self.segments[-1]
        if self.claimed or not (self.broken_seal or last.written.next_lsn == first_lsn):
            return False
        self.stop = None
        return True

    def _check_place(self, entry: EntryHeader, offset: int) -> None:
        begins = bool(entry.flags & EntryFlag.BEGINS)
        if self.within is None:
            if not begins:
                self.boundary = None  # it began in a segment that is gone
        elif begins == self.within:
            raise Damage("the entry is out of place in its request", offset=offset)


def _is_part_of(whole: bytes, part: bytes) -> bool:
    """Sectors of a torn write are there, or are zeros."""
    there = np.frombuffer(part, dtype=np.uint8)
    wanted = np.frombuffer(whole, dtype=np.uint8, count=len(part))
    return bool(((there == wanted) | (there == 0)).all())


def _continues(before: Segment, segment: Segment, *, within: bool) -> bool:
    if within:
        return segment.first_lsn == before.written.next_lsn
    return segment.first_lsn >= before.written.next_lsn


def marks_after(marks: SegmentMarks, entry: EntryHeader, *, offset: int) -> SegmentMarks:
    return SegmentMarks(
        entries_end=offset + entry.entry_bytes,
        next_lsn=entry.first_lsn + entry.count,
        entries=marks.entries + 1,
        payload_bytes=marks.payload_bytes + entry.payload_bytes,
        line_safe=marks.line_safe and bool(entry.flags & EntryFlag.LINE_SAFE),
        keyed=marks.keyed or bool(entry.flags & EntryFlag.KEYED),
    )


class KeyedRequests:
    """Finds the keyed appends again, the newest of them: small ones, a WAL may hold in millions.
    One whose beginning is gone is in the manifest already.
    """

    def __init__(self) -> None:
        # As many again, of which the end of the log may yet be cut off.
        self.found: deque[SegmentAppend] = deque(maxlen=2 * REMEMBERED_COUNT_MAX)
        self._first: EntryHeader | None = None
        self._segment_id = 0
        self._payload_bytes = 0

    @property
    def unfinished(self) -> bool:
        return self._first is not None

    def add(self, entry: EntryHeader, *, segment_id: int) -> None:
        if not entry.flags & EntryFlag.KEYED:
            self._first = None
            return
        if entry.flags & EntryFlag.BEGINS:
            self._first, self._segment_id, self._payload_bytes = entry, segment_id, 0
        first = self._first
        if first is None:
            return
        self._payload_bytes += entry.payload_bytes
        if entry.flags & EntryFlag.ENDS:
            append = RememberedAppend(
                key_hash=first.key_hash, body_hash=first.body_hash, first_lsn=first.first_lsn,
                last_lsn=entry.last_lsn, payload_bytes=self._payload_bytes,
                appended_at_us=first.appended_at_us,
            )  # fmt: skip
            self.found.append(SegmentAppend(append=append, segment_id=self._segment_id))
            self._first = None
