"""Segment files that no row names: of a crash, or newer than the manifest.

A group's files are written before their rows, so that a crash may leave files without rows, with
nothing acknowledged in them. The same is seen where the manifest was put back from a backup that
is older than the WAL; then those files hold what was acknowledged since, and nobody may take them
for remains. An entry proves it that says of an LSN in them that it was durable. A file with one
group of appends has no such entry, and cannot be told from a crash's: recovery takes it over.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from app.core.formats.damage import Damage
from app.core.formats.segment import SEGMENT_HEADER_BYTES
from app.core.stores.wal.disk import Disk
from app.core.stores.wal.scan import SegmentReader
from app.core.stores.wal.segments import segment_id_of, segment_name


class SegmentRow(Protocol):
    @property
    def segment_id(self) -> int: ...

    @property
    def first_lsn(self) -> int: ...

    @property
    def last_lsn(self) -> int: ...

    @property
    def state(self) -> str: ...


def newer_than_rows_blocking(
    disk: Disk, directory: Path, *, db_id: int, segment_ids: Iterable[int], known_lsn: int
) -> int | None:
    """The first of these files that holds acknowledged LSNs from `known_lsn` on; None: none does.
    Raises OSError.
    """
    first_lsns: dict[int, int] = {}
    for segment_id in sorted(segment_ids):
        with suppress(Damage, FileNotFoundError), opened(disk, directory, segment_id) as reader:
            header = reader.header()
            if header.db_id == db_id and header.first_lsn >= known_lsn:
                first_lsns[segment_id] = header.first_lsn
    lsn = min(first_lsns.values(), default=0)
    for segment_id in first_lsns:
        with suppress(FileNotFoundError), opened(disk, directory, segment_id) as reader:
            if reader.claims_durable(lsn, start=SEGMENT_HEADER_BYTES):
                return segment_id
    return None


@contextmanager
def opened(disk: Disk, directory: Path, segment_id: int) -> Iterator[SegmentReader]:
    """A file that nothing names may go at any time."""
    fd = disk.open(directory / segment_name(segment_id), writable=False)
    try:
        yield SegmentReader(disk, fd)
    finally:
        disk.close(fd)


def segment_ids_blocking(disk: Disk, directory: Path) -> frozenset[int]:
    """Of the files that are there. Raises OSError."""
    found = (segment_id_of(name) for name in disk.list_names(directory))
    return frozenset(one for one in found if one is not None)


def known_lsn(floor_lsn: int, rows: Iterable[SegmentRow]) -> int:
    """LSNs below it are the rows' affair. What an open segment holds beyond its first LSN, its
    row does not know.
    """
    ends = (row.first_lsn + 1 if row.state == "open" else row.last_lsn + 1 for row in rows)
    return max(floor_lsn, *ends, 1)
