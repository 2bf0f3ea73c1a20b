"""Which copies of which LSNs a read takes: pure.

The WAL is preferred where it has an LSN, then a published chunk (from the hot cache or the remote
store; that is found out when it is opened). A read never crosses a gap.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from app.core.formats.segment import IndexArray
from app.core.stores.manifest.records import ChunkRecord


class ReadableSegment(Protocol):
    """A WAL segment as it was durable when it was pinned."""

    @property
    def segment_id(self) -> int: ...
    @property
    def path(self) -> Path: ...
    @property
    def first_lsn(self) -> int: ...
    @property
    def durable_last_lsn(self) -> int: ...
    @property
    def entries_end(self) -> int: ...
    @property
    def index(self) -> IndexArray: ...
    @property
    def line_safe(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WalSpan:
    first_lsn: int
    last_lsn: int
    segment: ReadableSegment
    published: ChunkRecord | None
    """A chunk that holds all of the span too: what to read if the segment is damaged."""

    @property
    def line_safe(self) -> bool:
        return self.segment.line_safe


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkSpan:
    first_lsn: int
    last_lsn: int
    row: ChunkRecord

    @property
    def line_safe(self) -> bool:
        return self.row.line_safe


Span = WalSpan | ChunkSpan


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPlan:
    """`spans` follow one another without a hole. Nothing to read: no spans, no first, no last."""

    spans: tuple[Span, ...]
    first_lsn: int | None
    last_lsn: int | None
    next_lsn: int
    """Where to go on; never below the LSN that was asked for."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A copy of [first, last]."""

    first: int
    last: int
    source: ReadableSegment | ChunkRecord


def plan_spans(
    chunks: Sequence[ChunkRecord],
    segments: Sequence[ReadableSegment],
    *,
    from_lsn: int,
    to_lsn: int | None,
    limit: int | None,
    next_lsn: int,
    cut: Iterable[tuple[int, int]] = (),
) -> ReadPlan:
    """The first readable LSN at or after `from_lsn`, and what follows it without a gap: up to
    `to_lsn` (inclusive), at most `limit` records.

    `next_lsn`: every LSN below it is durable in what is given here, or will never exist.
    `segments` need only be those that reach into the range. `cut`: what truncations took of them,
    first and last LSNs.
    """
    end = next_lsn - 1 if to_lsn is None else min(to_lsn, next_lsn - 1)
    visible = [row for row in chunks if row.blob is not None]
    wal = _line_up(_wal_pieces(segments, _hidden(visible, cut)))
    published = _line_up(_Piece(row.first, row.visible_last, row) for row in visible)

    def following(lsn: int) -> int:
        """Where the next piece begins; `end + 1` if not within the range."""
        starts = wal.start_after(lsn), published.start_after(lsn)
        return min(
            (start for start in starts if start is not None and start <= end), default=end + 1
        )

    spans: list[Span] = []
    first = at = max(from_lsn, 1)
    while at <= end:
        piece, stop = wal.covering(at), end
        if piece is None:
            piece, stop = published.covering(at), min(end, (wal.start_after(at) or end + 1) - 1)
        if piece is None:
            at = following(at)
            if spans:
                break
            first = at
            continue
        if limit is not None and not spans:
            end = min(end, first + limit - 1)
        last = min(piece.last, stop, end)
        spans.append(_span(piece.source, at, last, published))
        at = last + 1
    if not spans:
        return ReadPlan(spans=(), first_lsn=None, last_lsn=None, next_lsn=max(from_lsn, at))
    return ReadPlan(spans=tuple(spans), first_lsn=first, last_lsn=spans[-1].last_lsn, next_lsn=at)


class _Line:
    """Pieces in LSN order that do not overlap."""

    def __init__(self, pieces: list[_Piece]) -> None:
        self._pieces = pieces
        self._firsts = [piece.first for piece in pieces]

    def covering(self, lsn: int) -> _Piece | None:
        place = bisect_right(self._firsts, lsn) - 1
        if place < 0 or self._pieces[place].last < lsn:
            return None
        return self._pieces[place]

    def start_after(self, lsn: int) -> int | None:
        place = bisect_right(self._firsts, lsn)
        return self._firsts[place] if place < len(self._firsts) else None


def _line_up(pieces: Iterable[_Piece]) -> _Line:
    kept = [piece for piece in pieces if piece.first <= piece.last]
    return _Line(sorted(kept, key=lambda piece: piece.first))


def _hidden(chunks: Iterable[ChunkRecord], cut: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """What tail truncations took, of chunks or of the WAL: no copy of it may be shown."""
    of_chunks = ((max(row.visible_last + 1, row.first), row.last) for row in chunks)
    return sorted((first, last) for first, last in (*of_chunks, *cut) if first <= last)


def _wal_pieces(
    segments: Iterable[ReadableSegment], hidden: Sequence[tuple[int, int]]
) -> Iterable[_Piece]:
    for segment in segments:
        at = segment.first_lsn
        for first, last in hidden:
            if last >= at and first <= segment.durable_last_lsn:
                yield _Piece(at, first - 1, segment)
                at = max(at, last + 1)
        yield _Piece(at, segment.durable_last_lsn, segment)


def _span(
    source: ReadableSegment | ChunkRecord, first_lsn: int, last_lsn: int, published: _Line
) -> Span:
    if isinstance(source, ChunkRecord):
        return ChunkSpan(first_lsn=first_lsn, last_lsn=last_lsn, row=source)
    copy = published.covering(first_lsn)
    also = copy.source if copy is not None and copy.last >= last_lsn else None
    return WalSpan(
        first_lsn=first_lsn, last_lsn=last_lsn, segment=source,
        published=also if isinstance(also, ChunkRecord) else None,
    )  # fmt: skip
