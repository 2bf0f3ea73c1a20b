"""Pages for planning and staging, by windows: what the sealed WAL holds, and what it cut off."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pyroaring import BitMap

from app.core.formats.page_blob import PageNos
from app.core.reads.read_point import ReadPoint

WINDOW_BYTES = 4 * 1024 * 1024

Rows = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class WalWindow:
    """Some pages, ascending, and their content: shape (pages, page size). Rows that are not
    `done` are not in the WAL; theirs is still zeros.
    """

    page_nos: PageNos
    pages: npt.NDArray[np.uint8]
    done: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.page_nos)

    @property
    def data(self) -> memoryview:
        """The pages back to back."""
        return self.pages.reshape(-1).data


async def read_wal_window(point: ReadPoint, page_nos: PageNos, *, low_page_count: int) -> WalWindow:
    """`page_nos` span at most a window. Pages above `low_page_count` that the WAL has not are
    zeros: the database ended below them, and nobody has written them since. Raises CorruptWal.
    """
    first = int(page_nos[0])
    span = np.zeros((int(page_nos[-1]) - first + 1, point.page_size), dtype=np.uint8)
    found = np.zeros(len(span), dtype=np.bool_)
    if point.wal is not None:
        found = await point.wal.fill(span, first_page=first)
    rows = page_nos.astype(np.intp) - first
    whole = len(rows) == len(span)
    return WalWindow(
        page_nos=page_nos,
        pages=span if whole else span[rows],
        done=(found if whole else found[rows]) | (page_nos > low_page_count),
    )


def windows(pages: BitMap, *, page_size: int) -> Iterator[PageNos]:
    """The pages in runs that each span at most WINDOW_BYTES of the database."""
    numbers = np.array(pages.to_array(), dtype=np.uint32)
    at, span = 0, max(1, WINDOW_BYTES // page_size)
    while at < len(numbers):
        stop = int(np.searchsorted(numbers, int(numbers[at]) + span, side="left"))
        yield numbers[at:stop]
        at = stop
