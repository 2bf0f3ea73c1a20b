"""Checks a sealed segment byte for byte: for fsck and for whoever promotes one."""

from pathlib import Path

import numpy as np

from app.core.formats.damage import Damage
from app.core.formats.segment import (
    SEGMENT_HEADER_BYTES,
    EntryFlag,
    IndexBuilder,
    SegmentSummary,
)
from app.core.stores.wal.disk import Disk, SystemDisk
from app.core.stores.wal.scan import SegmentReader


def verify_segment_blocking(path: Path, *, disk: Disk | None = None) -> SegmentSummary:
    """Its trailer, which all of its entries agree with. Raises Damage, FileNotFoundError."""
    disk = disk or SystemDisk()
    fd = disk.open(path, writable=False)
    try:
        return _verify(SegmentReader(disk, fd))
    finally:
        disk.close(fd)


def _verify(reader: SegmentReader) -> SegmentSummary:
    summary, index = reader.directory()
    header = reader.header()
    builder = IndexBuilder()
    entries, payload_bytes, end, last_lsn = 0, 0, SEGMENT_HEADER_BYTES, header.first_lsn - 1
    flags = EntryFlag.LINE_SAFE
    keyed = EntryFlag(0)
    for offset, entry in reader.iter_entries(end=summary.entries_end):
        builder.add(first_lsn=entry.first_lsn, offset=offset)
        entries += 1
        payload_bytes += entry.payload_bytes
        end = offset + entry.entry_bytes
        last_lsn = entry.last_lsn
        flags &= entry.flags
        keyed |= entry.flags & EntryFlag.KEYED
    found = SegmentSummary(
        db_id=header.db_id, segment_id=header.segment_id, first_lsn=header.first_lsn,
        last_lsn=last_lsn, entries=entries, entries_end=end, payload_bytes=payload_bytes,
        index_points=len(builder), line_safe=bool(flags), keyed=bool(keyed),
    )  # fmt: skip
    if found != summary:
        raise Damage("the trailer does not agree with the entries")
    if not np.array_equal(index, builder.array()):
        raise Damage("the index does not agree with the entries")
    return summary
