"""Plans a read of a log whose published chunks come page by page: pure.

A plan of all pages at once (`read_plan.plan_spans`) would say the same, but hold the rows of the
whole log. Pages are consecutive: a page's rows are all that reach into the LSNs from the end of the
page before to its own last row's, or, in the last page, to the end of the log.
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from app.core.reads.read_plan import ReadableSegment, Span, plan_spans
from app.core.stores.manifest.records import ChunkRecord


@dataclass(frozen=True, slots=True)
class ChunkPage:
    rows: Sequence[ChunkRecord]
    is_last: bool


class ChunkPages(Protocol):
    """The published chunks of a log at one generation."""

    def pages(self, lsn: int) -> AsyncGenerator[ChunkPage, None]:
        """Those that hold the LSN or later ones, in order; the same each time. Close it if it is
        not read to its end.
        """
        ...


@dataclass(frozen=True, slots=True)
class ListedChunks:
    """Few enough to have them all."""

    rows: Sequence[ChunkRecord]

    async def pages(self, lsn: int) -> AsyncGenerator[ChunkPage, None]:
        del lsn
        yield ChunkPage(self.rows, is_last=True)


class PagedPlan:
    """Takes pages until it is `done`. `first_lsn`, `last_lsn` and `next_lsn` are then those of a
    `ReadPlan`.
    """

    def __init__(
        self,
        segments: Sequence[ReadableSegment],
        *,
        from_lsn: int,
        to_lsn: int | None,
        limit: int | None,
        next_lsn: int,
        cut: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._segments = segments
        self._limit = limit
        self._log_end = next_lsn
        self._cut = cut
        self._end = next_lsn - 1 if to_lsn is None else min(to_lsn, next_lsn - 1)
        self.first_lsn: int | None = None
        self.last_lsn: int | None = None
        self.next_lsn = max(from_lsn, 1)
        self.done = False

    def add(self, page: ChunkPage) -> tuple[Span, ...]:
        """What the next page adds to the plan."""
        assert not self.done
        at = self.next_lsn
        stop = self._end if page.is_last else min(self._end, page.rows[-1].last)
        plan = plan_spans(
            page.rows,
            [one for one in self._segments if one.first_lsn <= stop and one.durable_last_lsn >= at],
            from_lsn=at,
            to_lsn=stop,
            limit=self._limit if self.first_lsn is None else None,
            next_lsn=self._log_end,
            cut=self._cut,
        )
        spans = plan.spans
        if plan.first_lsn is None:
            self.next_lsn = plan.next_lsn
        elif self.last_lsn is not None and plan.first_lsn != self.last_lsn + 1:
            self.next_lsn, self.done, spans = plan.first_lsn, True, ()  # behind a gap
        else:
            if self.first_lsn is None:
                self.first_lsn = plan.first_lsn
                if self._limit is not None:
                    self._end = min(self._end, plan.first_lsn + self._limit - 1)
            self.last_lsn, self.next_lsn = plan.last_lsn, plan.next_lsn
            self.done = self.next_lsn <= stop  # there is a gap in this page
        self.done = self.done or page.is_last or self.next_lsn > self._end
        return spans
