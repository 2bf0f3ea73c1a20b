"""Finds out what a log holds, from its files and its rows in the manifest. Reads only.

Invariants: I1: what was acknowledged is kept whole, what was not is kept whole or cut; damage to
what was acknowledged is reported and nothing is cut. Files without a row are taken over where they
go on with the log, stop it where their entries say that they were acknowledged (`unregistered`),
and go otherwise. I14: LSNs go on above all that may have been given out.
Crash: nothing was changed.

A bad entry had been durable, so that it is damage and no torn tail, if a later intact entry says
so, if a later segment is registered, or if its request begins in a sealed segment.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from app.core.base.errors import StorageFailure
from app.core.formats.damage import Damage
from app.core.formats.segment import (
    SEGMENT_HEADER_BYTES,
    EngineCode,
    EntryFlag,
    IndexBuilder,
    SegmentHeader,
)
from app.core.stores.wal.disk import Disk
from app.core.stores.wal.remembered import SegmentAppend
from app.core.stores.wal.requests import UNIT_BYTES_MIN, LastRequest
from app.core.stores.wal.scan import SegmentReader
from app.core.stores.wal.segments import (
    CatalogSegment,
    LogConfig,
    NewSegment,
    Segment,
    SegmentInfo,
    SegmentMarks,
    segment_name,
)
from app.core.stores.wal.tail_scan import Boundary, KeyedRequests, ScanMark, TailScan
from app.core.stores.wal.unregistered import (
    known_lsn,
    newer_than_rows_blocking,
    opened,
    segment_ids_blocking,
)

Health = Literal["ok", "corrupt_wal", "wal_lost"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A torn tail: `lsn` and all after it was never acknowledged."""

    segment_id: int
    lsn: int
    offset: int
    reason: str


@dataclass(slots=True, kw_only=True)
class Recovered:
    segments: list[Segment] = field(default_factory=list)
    """With entries, in LSN order. Those of `unsealed` are among them."""
    unsealed: list[Segment] = field(default_factory=list)
    """All but the last are to be sealed. Only the last may be empty."""
    to_cut: list[Segment] = field(default_factory=list)
    """Their files are longer than `written`."""
    next_lsn: int
    health: Health = "ok"
    lost_from_lsn: int | None = None
    lost_segment_ids: tuple[int, ...] = ()
    unregistered_ids: tuple[int, ...] = ()
    """Files that hold nothing acknowledged, to be removed."""
    adopted: list[NewSegment] = field(default_factory=list)
    """Segments whose rows are to be written before anything else."""
    remembered: list[SegmentAppend] = field(default_factory=list)
    cut: Cut | None = None
    damage: str | None = None
    damaged_segment_id: int | None = None
    last_request: LastRequest | None = None  # of libsql databases

    def stop(self, segment_id: int, reason: str) -> None:
        """What was found stays readable; nothing is cut, sealed, registered or removed."""
        self.health, self.damage, self.damaged_segment_id = "corrupt_wal", reason, segment_id
        self.unsealed, self.to_cut, self.adopted, self.unregistered_ids = [], [], [], ()
        self.cut = None


class _Corrupt(Exception):
    def __init__(self, segment_id: int, reason: str) -> None:
        self.segment_id = segment_id
        super().__init__(reason)


def recover_blocking(
    disk: Disk, *, directory: Path, config: LogConfig, rows: Sequence[CatalogSegment]
) -> Recovered:
    """Raises StorageFailure where the disk cannot be read."""
    try:
        return _Recovery(disk, directory, config, rows).run()
    except OSError as error:
        raise StorageFailure(f"The WAL cannot be read: {error}") from error


class _Recovery:
    def __init__(
        self, disk: Disk, directory: Path, config: LogConfig, rows: Sequence[CatalogSegment]
    ) -> None:
        self._disk = disk
        self._directory = directory
        self._config = config
        self._rows = sorted(rows, key=lambda row: row.segment_id)
        self._files = segment_ids_blocking(disk, directory)
        self._found = Recovered(next_lsn=config.floor_lsn)
        self._requests = KeyedRequests()
        self._tail: TailScan | None = None
        self._strays = self._files - {row.segment_id for row in self._rows}

    def run(self) -> Recovered:
        found, config = self._found, self._config
        self._note_lost()
        try:
            for row in self._rows:
                if row.segment_id in self._files and row.segment_id not in found.lost_segment_ids:
                    self._take(row)
            newer = self._newer_than_rows()
            if newer is None and config.has_lived and found.health == "ok":
                self._adopt()
            self._end()
        except _Corrupt as corrupt:
            self._stop_at(corrupt)
        else:
            if newer is not None:
                found.stop(newer, "it holds what was acknowledged after this manifest was made")
            else:
                found.adopted = self._to_register()
                taken = {new.segment_id for new in found.adopted}
                found.unregistered_ids = tuple(sorted(self._strays - taken))
        found.remembered = list(self._requests.found)
        self._tail = None  # what it came to is in `found`
        found.next_lsn = self._next_lsn()
        return found

    def _newer_than_rows(self) -> int | None:
        return newer_than_rows_blocking(
            self._disk,
            self._directory,
            db_id=self._config.db_id,
            segment_ids=self._strays,
            known_lsn=known_lsn(self._config.floor_lsn, self._rows),
        )

    def _note_lost(self) -> None:
        lost = [
            row
            for row in self._rows
            if row.state != "checkpointed" and row.segment_id not in self._files
        ]
        if lost and self._config.engine is EngineCode.LIBSQL:
            # Frames mean something only on top of all that came before them.
            lost = [
                row
                for row in self._rows
                if row.state != "checkpointed" and row.segment_id >= lost[0].segment_id
            ]
        if lost:
            found = self._found
            found.health = "wal_lost"
            found.lost_from_lsn = lost[0].first_lsn
            found.lost_segment_ids = tuple(row.segment_id for row in lost)
            found.next_lsn = max(found.next_lsn, *(row.ceiling_lsn for row in lost))

    # --- segment by segment -------------------------------------------------------------------

    def _take(self, row: CatalogSegment) -> None:
        path = self._directory / segment_name(row.segment_id)
        tail = self._tail
        if tail is not None and tail.stop is not None:
            # This row was written only after the segment before had been synced: of that, nothing
            # but its sealing can have been broken off.
            if not tail.goes_on_at(row.first_lsn):
                raise _Corrupt(tail.segments[-1].segment_id, tail.stop)
            self._found.to_cut.append(tail.segments[-1])
        fd = self._disk.open(path, writable=False)
        try:
            reader = SegmentReader(self._disk, fd)
            header = self._header(row, reader)
            if row.state == "open":
                self._take_open(row, path, header, reader)
            else:
                self._take_sealed(row, path, header, reader)
        except Damage as damage:
            if row.state != "checkpointed":  # else published, and only waiting to be removed
                raise _Corrupt(row.segment_id, str(damage)) from damage
        finally:
            self._disk.close(fd)

    def _header(self, row: CatalogSegment, reader: SegmentReader) -> SegmentHeader:
        header = reader.header()
        expected = (self._config.db_id, row.segment_id, row.first_lsn, self._config.engine)
        if (header.db_id, header.segment_id, header.first_lsn, header.engine) != expected:
            raise Damage("the segment's header is of another segment", offset=0)
        return header

    def _take_sealed(
        self, row: CatalogSegment, path: Path, header: SegmentHeader, reader: SegmentReader
    ) -> None:
        info = _sealed_info(path, header, reader)
        if info.last_lsn != row.last_lsn:
            raise Damage("the trailer does not agree with the catalogue")
        if row.state == "sealed" and (info.summary.keyed or self._requests.unfinished):
            for _, entry in reader.iter_entries(end=info.entries_end):
                self._requests.add(entry, segment_id=row.segment_id)
        segment = _sealed_segment(info, ceiling_lsn=row.ceiling_lsn)
        segment.info = replace(info, state=row.state)
        self._found.segments.append(segment)

    def _take_open(
        self, row: CatalogSegment, path: Path, header: SegmentHeader, reader: SegmentReader
    ) -> None:
        segment = Segment(
            segment_id=row.segment_id, path=path, first_lsn=row.first_lsn,
            ceiling_lsn=row.ceiling_lsn,
        )  # fmt: skip
        tail = self._tail
        if tail is None:
            tail = TailScan(within=self._sealed_part_is_within())
        tail.add(segment, reader, self._requests)
        if tail.stop is not None:
            # Only where the entries end is a trailer looked for: a record may look like one.
            info = self._if_sealed(path, header, reader)
            if info is not None and info.entries_end == segment.written.entries_end:
                if any(earlier.written.entries for earlier in tail.segments[:-1]):
                    raise Damage("sealed before the segment before it")
                self._tail = None
                # The process ended before the row said so; sealing it again says it.
                sealed = _sealed_segment(info, ceiling_lsn=row.ceiling_lsn)
                sealed.index = IndexBuilder.of(info.index)  # read by until that was said
                self._found.segments.append(sealed)
                self._found.unsealed.append(sealed)
                return
            tail.look_behind(reader, db_id=self._config.db_id)
        self._tail = tail

    def _if_sealed(
        self, path: Path, header: SegmentHeader, reader: SegmentReader
    ) -> SegmentInfo | None:
        try:
            return _sealed_info(path, header, reader)
        except Damage:
            return None

    def _sealed_part_is_within(self) -> bool | None:
        """Whether the newest sealed segment breaks off within a request, to go on in the next."""
        if not self._found.segments:
            return None
        segment = self._found.segments[-1]
        info = segment.file_sealed
        assert info is not None
        fd = self._disk.open(segment.path, writable=False)
        try:
            reader = SegmentReader(self._disk, fd)
            offset, flags = int(info.index[-1, 1]), EntryFlag.ENDS
            while offset < info.entries_end:
                entry = reader.entry(offset, end=info.entries_end)
                offset, flags = offset + entry.entry_bytes, entry.flags
        except Damage:
            return None  # found when it is read
        finally:
            self._disk.close(fd)
        return not flags & EntryFlag.ENDS

    # --- files without a row ------------------------------------------------------------------

    def _adopt(self) -> None:
        """Takes those over that go on where the log ends, as far as they hold whole requests: of a
        crash, or acknowledged after the manifest, an older one, was made.
        """
        mark: ScanMark | None = None
        for segment_id in sorted(self._strays):
            if segment_id < self._next_lsn():
                continue  # it is of what was published or dropped
            if not self._goes_on_with(segment_id):
                break
            if self._tail is None:
                self._tail = TailScan(within=self._sealed_part_is_within())
            mark = mark or self._tail.mark()
            row = CatalogSegment(
                segment_id=segment_id, first_lsn=segment_id, ceiling_lsn=0, state="open", last_lsn=0
            )
            self._take(row)
            if self._tail is None:  # it was sealed
                mark = None
        if self._tail is not None and mark is not None:
            self._tail.leave_out_incomplete(mark)
            if not self._tail.segments:
                self._tail = None
        ends = self._found.segments[-1:] if self._tail is None else []
        if any(one.info is None and self._sealed_part_is_within() for one in ends):  # unpublished
            raise _Corrupt(ends[0].segment_id, "a sealed request is incomplete")

    def _next_lsn(self) -> int:
        found = self._found
        return max(
            found.next_lsn,
            *(row.last_lsn + 1 for row in self._rows if row.state != "open"),
            *(segment.written.next_lsn for segment in (*found.segments, *found.unsealed)),
            *(segment.written.next_lsn for segment in (self._tail.segments if self._tail else ())),
            1,
        )

    def _goes_on_with(self, segment_id: int) -> bool:
        """Whether the file begins with the log's next entry."""
        config = self._config
        expected = (config.db_id, config.engine, segment_id, segment_id, segment_id)
        within = self._tail.within if self._tail else self._sealed_part_is_within()
        try:
            with opened(self._disk, self._directory, segment_id) as reader:
                header = reader.header()
                entry = reader.entry(SEGMENT_HEADER_BYTES, end=reader.size)
        except Damage:
            return False
        found = (
            header.db_id, header.engine, header.segment_id, header.first_lsn, entry.first_lsn,
        )  # fmt: skip
        begins = bool(entry.flags & EntryFlag.BEGINS)
        return segment_id == self._next_lsn() and found == expected and begins != bool(within)

    def _to_register(self) -> list[NewSegment]:
        """With the ceilings that the log would have given them."""
        lsns_max = self._config.chunk_bytes // UNIT_BYTES_MIN + 1
        return [
            NewSegment(
                segment_id=segment.segment_id, first_lsn=segment.first_lsn,
                ceiling_lsn=max(segment.first_lsn + lsns_max, segment.written.next_lsn + 1),
            )
            for segment in self._found.segments
            if segment.segment_id in self._strays
        ]  # fmt: skip

    # --- the end ------------------------------------------------------------------------------

    def _end(self) -> None:
        tail, found = self._tail, self._found
        if tail is None:
            return
        last = tail.segments[-1]
        if tail.claimed:
            raise _Corrupt(last.segment_id, tail.stop or "")
        if tail.stop is not None or tail.within:
            boundary = tail.boundary
            if boundary is None:
                raise _Corrupt(last.segment_id, tail.stop or "a sealed request is incomplete")
            self._cut(tail, boundary)
        for segment in tail.segments:
            segment.durable = segment.written
            if segment.written.entries > 0:
                found.segments.append(segment)
                found.unsealed.append(segment)
        if last.written.entries == 0:
            found.unsealed.append(last)

    def _cut(self, tail: TailScan, boundary: Boundary) -> None:
        torn = tail.segments[boundary.position]
        for position, segment in enumerate(tail.segments):
            if position >= boundary.position:
                _set_end(segment, boundary if position == boundary.position else None)
                self._found.to_cut.append(segment)
        lsn = boundary.marks.next_lsn
        while self._requests.found and self._requests.found[-1].append.last_lsn >= lsn:
            self._requests.found.pop()
        self._found.cut = Cut(
            segment_id=torn.segment_id, lsn=lsn, offset=torn.written.entries_end,
            reason=tail.stop or "a request is incomplete",
        )  # fmt: skip

    def _stop_at(self, corrupt: _Corrupt) -> None:
        """What lies before the damage stays readable; nothing is cut, sealed or removed."""
        found, tail = self._found, self._tail
        found.stop(corrupt.segment_id, str(corrupt))
        if tail is None or tail.boundary is None:
            return
        for position, segment in enumerate(tail.segments[: tail.boundary.position + 1]):
            if position == tail.boundary.position:
                _set_end(segment, tail.boundary)
            segment.durable = segment.written
            if segment.written.entries > 0:
                found.segments.append(segment)


def _set_end(segment: Segment, boundary: Boundary | None) -> None:
    segment.written = (
        boundary.marks if boundary is not None else SegmentMarks(next_lsn=segment.first_lsn)
    )
    segment.index.truncate(offset=segment.written.entries_end)


def _sealed_info(path: Path, header: SegmentHeader, reader: SegmentReader) -> SegmentInfo:
    summary, index = reader.directory()
    named = (summary.db_id, summary.segment_id, summary.first_lsn)
    if named != (header.db_id, header.segment_id, header.first_lsn) or not len(index):
        raise Damage("the trailer is of another segment")
    return SegmentInfo.of(summary, path=path, engine=header.engine, index=index, state="sealed")


def _sealed_segment(info: SegmentInfo, *, ceiling_lsn: int) -> Segment:
    """Its row may yet have to be written: `info` is left to who knows."""
    marks = SegmentMarks(
        entries_end=info.entries_end, next_lsn=info.last_lsn + 1, entries=info.entries,
        payload_bytes=info.payload_bytes, line_safe=info.line_safe, keyed=info.summary.keyed,
    )  # fmt: skip
    segment = Segment(
        segment_id=info.segment_id, path=info.path, first_lsn=info.first_lsn,
        ceiling_lsn=ceiling_lsn, marks=marks,
    )  # fmt: skip
    segment.file_sealed = info
    return segment
