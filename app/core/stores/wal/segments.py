"""Segments as the rest of the house and the log itself see them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from app.core.formats.segment import (
    SEGMENT_HEADER_BYTES,
    EngineCode,
    IndexArray,
    IndexBuilder,
    SegmentSummary,
)
from app.core.stores.wal.remembered import RememberedAppend

SegmentState = Literal["open", "sealed", "checkpointed"]

_ENGINE_NAMES: dict[EngineCode, Literal["append_only", "libsql"]] = {
    EngineCode.APPEND_ONLY: "append_only",
    EngineCode.LIBSQL: "libsql",
}


def segment_name(segment_id: int) -> str:
    return f"{segment_id:016d}.wal"


def segment_id_of(name: str) -> int | None:
    stem = name.removesuffix(".wal")
    return int(stem) if stem != name and len(stem) == 16 and stem.isdecimal() else None


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogSegment:
    """A row of the manifest's wal_catalog. `ceiling_lsn` is exclusive."""

    segment_id: int
    first_lsn: int
    ceiling_lsn: int
    state: SegmentState
    last_lsn: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    db_id: int
    engine: EngineCode
    chunk_bytes: int
    floor_lsn: int
    has_lived: bool = False
    """Its directory was opened before, so that files there are its own; else they may be those of
    another database that had the id in a life that the manifest, an older one, does not know.
    """
    remembered: Sequence[RememberedAppend] = ()
    page_size: int = 0  # of libsql databases


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentInfo:
    """A sealed segment: its file never changes again."""

    db_id: int
    segment_id: int
    engine: EngineCode
    path: Path
    first_lsn: int
    last_lsn: int
    entries: int
    entries_end: int
    payload_bytes: int
    file_bytes: int
    line_safe: bool
    index: IndexArray = field(compare=False, repr=False)
    state: SegmentState
    summary: SegmentSummary

    @classmethod
    def of(
        cls,
        summary: SegmentSummary,
        *,
        path: Path,
        engine: EngineCode,
        index: IndexArray,
        state: SegmentState,
    ) -> "SegmentInfo":
        return cls(
            db_id=summary.db_id, segment_id=summary.segment_id, engine=engine, path=path,
            first_lsn=summary.first_lsn, last_lsn=summary.last_lsn, entries=summary.entries,
            entries_end=summary.entries_end, payload_bytes=summary.payload_bytes,
            file_bytes=summary.segment_bytes, line_safe=summary.line_safe, index=index,
            state=state, summary=summary,
        )  # fmt: skip

    @property
    def engine_name(self) -> Literal["append_only", "libsql"]:
        return _ENGINE_NAMES[self.engine]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSegment:
    """A segment whose file is durable and whose row is to be written."""

    segment_id: int
    first_lsn: int
    ceiling_lsn: int


class SegmentCatalog(Protocol):
    """The durable list of segments (the manifest). Called on writer threads.

    An error that is no FatalError says that nothing was written.
    """

    def register_blocking(self, *, db_id: int, segments: Sequence[NewSegment]) -> None:
        """All of them in one commit: a request may span several. One that is open already may
        raise its ceiling.
        """
        ...

    def seal_blocking(self, info: SegmentInfo) -> None:
        """Said again with the same values it changes nothing."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentMarks:
    """How far a segment is filled, always up to the end of an entry."""

    entries_end: int = SEGMENT_HEADER_BYTES
    next_lsn: int
    entries: int = 0
    payload_bytes: int = 0
    line_safe: bool = True
    keyed: bool = False


class Segment:
    """One segment of a log.

    `written`, `index`, `fd` and the sealing flags belong to the one writer thread that is at work
    on the log; `durable`, `info` and `pins` to the event loop. `written` runs ahead of `durable`
    for the moment between an fdatasync and its acknowledgement.
    """

    __slots__ = (
        "ceiling_lsn", "durable", "fd", "file_sealed", "first_lsn", "identity", "index", "info",
        "path", "pins", "segment_id", "written",
    )  # fmt: skip

    def __init__(
        self,
        *,
        segment_id: int,
        path: Path,
        first_lsn: int,
        ceiling_lsn: int = 0,
        marks: SegmentMarks | None = None,
    ) -> None:
        self.segment_id = segment_id
        self.path = path
        self.first_lsn = first_lsn
        self.ceiling_lsn = ceiling_lsn  # as registered; 0: not yet
        self.written = self.durable = marks or SegmentMarks(next_lsn=first_lsn)
        self.index = IndexBuilder()
        self.fd: int | None = None
        self.identity = (0, 0)
        """Device and inode of the file."""
        self.file_sealed: SegmentInfo | None = None
        """Set once the trailer is durable; the catalogue's row may yet have to follow."""
        self.info: SegmentInfo | None = None
        self.pins = 0

    @property
    def file_bytes(self) -> int:
        return self.info.file_bytes if self.info is not None else self.durable.entries_end

    @property
    def durable_last_lsn(self) -> int:
        return self.durable.next_lsn - 1

    def written_summary(self, db_id: int) -> SegmentSummary:
        """The trailer that sealing it now would write."""
        marks = self.written
        return SegmentSummary(
            db_id=db_id, segment_id=self.segment_id, first_lsn=self.first_lsn,
            last_lsn=marks.next_lsn - 1, entries=marks.entries, entries_end=marks.entries_end,
            payload_bytes=marks.payload_bytes, index_points=len(self.index),
            line_safe=marks.line_safe, keyed=marks.keyed,
        )  # fmt: skip

    def durable_index(self) -> IndexArray:
        if self.info is not None:
            return self.info.index
        return self.index.array(end=self.durable.entries_end)

    def __repr__(self) -> str:
        state = self.info.state if self.info else "open"
        return f"<Segment {self.segment_id} {state} [{self.first_lsn}, {self.durable.next_lsn})>"
