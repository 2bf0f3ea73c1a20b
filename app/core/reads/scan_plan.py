"""Which part of a generation a cold scan reads: pure.

Every bound is inclusive, and None where there is none; what is asked beyond the end is empty, so
that a reader who resumes behind the last page or record needs no special case.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from app.core.base.errors import LsnTruncated
from app.core.stores.manifest.records import ChunkRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanRange:
    first_chunk: int | None = None
    last_chunk: int | None = None
    first_page: int | None = None
    last_page: int | None = None
    from_lsn: int | None = None
    to_lsn: int | None = None

    @property
    def names_pages(self) -> bool:
        return self.first_page is not None or self.last_page is not None

    @property
    def names_lsns(self) -> bool:
        return self.from_lsn is not None or self.to_lsn is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class PageScan:
    """Pages [first_page, last_page]."""

    first_page: int
    last_page: int
    chunks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkScan:
    """The records [first_lsn, last_lsn] of one chunk."""

    row: ChunkRecord
    first_lsn: int
    last_lsn: int


def plan_pages(wanted: ScanRange, *, page_count: int, pages_per_chunk: int) -> PageScan | None:
    """None: nothing of the database lies in the range."""
    first = max(wanted.first_page or 1, (wanted.first_chunk or 0) * pages_per_chunk + 1)
    last = page_count if wanted.last_page is None else min(wanted.last_page, page_count)
    if wanted.last_chunk is not None:
        last = min(last, (wanted.last_chunk + 1) * pages_per_chunk)
    if first > last:
        return None
    chunks = (last - 1) // pages_per_chunk - (first - 1) // pages_per_chunk + 1
    return PageScan(first_page=first, last_page=last, chunks=chunks)


def plan_records(wanted: ScanRange, rows: Sequence[ChunkRecord]) -> list[ChunkScan]:
    """From the generation's rows. Raises LsnTruncated for LSNs before its oldest record."""
    kept = sorted((row for row in rows if row.blob is not None), key=lambda row: row.first)
    if wanted.from_lsn is not None and kept and wanted.from_lsn < kept[0].first:
        raise LsnTruncated(
            f"LSN {wanted.from_lsn} was truncated; the oldest readable one is {kept[0].first}.",
            first_lsn=kept[0].first,
        )
    scans = []
    for row in kept:
        if wanted.first_chunk is not None and row.chunk_id < wanted.first_chunk:
            continue
        if wanted.last_chunk is not None and row.chunk_id > wanted.last_chunk:
            continue
        first = max(row.first, wanted.from_lsn or 0)
        last = row.visible_last if wanted.to_lsn is None else min(row.visible_last, wanted.to_lsn)
        if first <= last:
            scans.append(ChunkScan(row=row, first_lsn=first, last_lsn=last))
    return scans
