"""Runs of a chunk's pages at one state, out of all that holds some of them.

A base's pages are read once for a window, whether they are wanted themselves or for patches
against them: unpacking blocks of the base is most of what reading a database costs.

Invariants: I5: nothing beyond the generation's page count but what the log has. I10: see
page_blobs.py. I11: a window's pages, and the blocks that hold them, at a time.
Concurrency: windows of one chunk may be read side by side. Cancellation: at any await.
Crash: nothing here is written.
"""

import asyncio
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from app.core.formats.page_blob import PageNos
from app.core.formats.sqlite_wal import lock_byte_page
from app.core.reads.delta_chain import NO_LAYER, BaseLayer, DeltaChain, LayerNumbers
from app.core.reads.page_blobs import OpenPages, PageBlobs
from app.core.reads.read_point import ReadPoint

Pages = npt.NDArray[np.uint8]


class OpenChunk:
    """A chunk's blobs while its windows are read; each is opened when it is first needed."""

    def __init__(self, blobs: PageBlobs, chain: DeltaChain) -> None:
        self.chain = chain
        self._blobs = blobs
        self._open: dict[int, OpenPages] = {}
        self._opening = asyncio.Lock()

    async def read(self, point: ReadPoint, first: int, count: int) -> Pages:
        """The pages [first, first + count), all of this chunk: shape (count, page size). Raises
        CorruptBlob, CorruptWal, RemoteUnavailable.
        """
        numbers = self.chain.layers_of(first, count)
        page_nos: PageNos = np.arange(first, first + count, dtype=np.uint32)
        numbers[page_nos > point.published_page_count] = NO_LAYER
        in_wal = point.wal.find(first, count) if point.wal is not None else None
        if in_wal is not None:
            numbers[in_wal.done] = NO_LAYER
        pages = await self._read_blobs(page_nos, numbers, page_size=point.page_size)
        if in_wal is not None:
            assert point.wal is not None
            await point.wal.put(pages, in_wal)
        lock_byte = lock_byte_page(point.page_size) - first
        if 0 <= lock_byte < count:
            pages[lock_byte] = 0
        return pages

    async def _read_blobs(
        self, page_nos: PageNos, numbers: LayerNumbers, *, page_size: int
    ) -> Pages:
        """Each page from the layer of its number; of those without one, zeros."""
        layers = self.chain.layers
        base_number = len(layers) - 1 if layers and isinstance(layers[-1], BaseLayer) else None
        from_base = numbers == base_number
        deltas = [
            (await self.open(number), np.flatnonzero(numbers == number))
            for number in np.unique(numbers).tolist()
            if number not in (NO_LAYER, base_number)
        ]
        patched: list[npt.NDArray[np.intp]] = []
        for delta, rows in deltas:
            mine = base_number is not None and delta.is_against(layers[base_number].blob)
            patched.append(rows[delta.are_patches(page_nos[rows])] if mine else rows[:0])
            from_base[patched[-1]] = True
        if base_number is not None and 2 * np.count_nonzero(from_base) > len(page_nos):
            # All of them, in one piece: cheaper than to leave some out.
            pages = await (await self.open(base_number)).read(page_nos)
            pages[numbers == NO_LAYER] = 0
        else:
            pages = np.zeros((len(page_nos), page_size), dtype=np.uint8)
            if base_number is not None and from_base.any():
                base = await self.open(base_number)
                pages[from_base] = await base.read(page_nos[from_base])
        for (delta, rows), needed in zip(deltas, patched, strict=True):
            # A row is of one layer: until it is written here it is the base's page.
            base_pages = {int(page_nos[row]): pages[row].data for row in needed.tolist()}
            pages[rows] = await delta.read(page_nos[rows], base_pages=base_pages or None)
        return pages

    async def open(self, number: int) -> OpenPages:
        found = self._open.get(number)
        if found is None:
            async with self._opening:
                found = self._open.get(number)
                if found is None:
                    found = await self._blobs.open(self.chain.layers[number])
                    self._open[number] = found
        return found

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


def windows(
    point: ReadPoint, first: int, last: int, *, window_bytes: int
) -> Iterator[tuple[int, int, int]]:
    """(chunk, first page, pages): aligned, so that windows begin where blocks do, and never over
    a chunk's end.
    """
    step = max(1, window_bytes // point.page_size)
    per_chunk = point.pages_per_chunk
    at = first
    while at <= last:
        chunk_id = (at - 1) // per_chunk
        chunk_first = chunk_id * per_chunk + 1
        stop = chunk_first + ((at - chunk_first) // step + 1) * step
        stop = min(stop, chunk_first + per_chunk, last + 1)
        yield chunk_id, at, stop - at
        at = stop
