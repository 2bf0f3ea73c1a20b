"""Joins the chunk files of one database, in LSN order and without a gap, into one sealed segment.

Entries are copied as they stand: an entry knows its LSNs, not its place. Each is checked on the
way, since damage must not be sealed under fresh checksums (I10). Memory is bounded by the largest
entry. The same sources give the same bytes (I7). Crash: a half-written file is replaced.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from app.core.base import failpoints
from app.core.formats.chunk import iter_entry_blocks_blocking
from app.core.formats.codecs import CodecName
from app.core.formats.damage import Damage
from app.core.formats.entry_scan import scan_record_entries
from app.core.formats.segment import (
    ENTRY_HEADER_BYTES,
    SEGMENT_HEADER_BYTES,
    EntryFlag,
    IndexBuilder,
    SegmentHeader,
    SegmentSummary,
    pack_directory,
    pack_segment_header,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeInput:
    descriptor: int
    codec: CodecName
    first_lsn: int
    last_lsn: int


def merge_segments_blocking(
    inputs: Sequence[MergeInput], target: Path, *, header: SegmentHeader
) -> SegmentSummary:
    """Writes `target`, replaced if it is there. Raises Damage, and OSError; it is then rubbish."""
    target.unlink(missing_ok=True)  # never through a link into another file
    index = IndexBuilder()
    entries, payload_bytes, at, lsn = 0, 0, SEGMENT_HEADER_BYTES, header.first_lsn
    common, any_flag = EntryFlag.LINE_SAFE, EntryFlag(0)
    with target.open("xb") as file:
        file.write(pack_segment_header(header))
        for each in inputs:
            if each.first_lsn != lsn:
                raise Damage(f"a chunk begins at LSN {each.first_lsn} instead of {lsn}")
            for block in iter_entry_blocks_blocking(each.descriptor, codec=each.codec):
                places = scan_record_entries(block, first_lsn=lsn)
                if not places:
                    raise Damage("a block without an entry")
                for place in places:
                    index.add(
                        first_lsn=place.first_lsn, offset=at + place.start - ENTRY_HEADER_BYTES
                    )
                    payload_bytes += place.end - place.start
                    common &= EntryFlag(place.flags)
                    any_flag |= EntryFlag(place.flags)
                entries += len(places)
                lsn = places[-1].first_lsn + places[-1].records
                file.write(block)
                at += len(block)
                failpoints.fp("coalesce.mid_write")
            if lsn != each.last_lsn + 1:
                raise Damage(f"a chunk ends at LSN {lsn - 1} instead of {each.last_lsn}")
        points = index.array()
        summary = SegmentSummary(
            db_id=header.db_id, segment_id=header.segment_id, first_lsn=header.first_lsn,
            last_lsn=lsn - 1, entries=entries, entries_end=at, payload_bytes=payload_bytes,
            index_points=len(points), line_safe=bool(common & EntryFlag.LINE_SAFE),
            keyed=bool(any_flag & EntryFlag.KEYED),
        )  # fmt: skip
        file.write(pack_directory(summary, points))
    return summary
