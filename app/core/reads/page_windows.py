"""Runs of a chunk's pages at one state, out of all that holds some of them.

A base's pages are read once for a window, whether they are wanted themselves or for patches
against them: unpacking blocks of the base is most of what reading a database costs.

Invariants: I5: nothing beyond the generation's page count but what the log has. I10: see
page_blobs.py. I11: a window's pages, and the blocks that hold them, at a time.
Concurrency: windows of one chunk may be read side by side. Cancellation: at any await.
Crash: nothing here is written.
"""

import asyncio
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from app.core.formats.page_blob import PageNos
from app.core.formats.sqlite_wal import lock_byte_page
from app.core.reads.delta_chain import NO_LAYER, BaseLayer, DeltaChain, LayerNumbers
from app.core.reads.open_pages import OpenPages, Step, read_steps
from app.core.reads.page_blobs import PageBlobs
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
        shape = (len(page_nos), page_size)
        found = [number for number in np.unique(numbers).tolist() if number != NO_LAYER]
        if not found:
            return np.zeros(shape, dtype=np.uint8)
        opened = {number: await self.open(number) for number in found}
        layers = self.chain.layers
        base: OpenPages | None = None
        if isinstance(layers[-1], BaseLayer):
            number, blob = len(layers) - 1, layers[-1].blob
            if number in opened or any(delta.is_against(blob) for delta in opened.values()):
                base = await self.open(number)
                opened.pop(number, None)
        involved = [each for each in (base, *opened.values()) if each is not None]
        involved += [each.base for each in opened.values() if each.base is not None]
        pages = await read_steps(
            self._blobs.reader,
            involved,
            lambda: _steps(page_nos, numbers, base, opened),
            shape=shape,
        )
        pages[numbers == NO_LAYER] = 0
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


def _steps(
    page_nos: PageNos,
    numbers: LayerNumbers,
    base: OpenPages | None,
    deltas: Mapping[int, OpenPages],
) -> list[Step]:
    """The chain's base first, for its own pages and for patches against it; then the deltas, each
    behind an older base that its patches are against.
    """
    from_base = ~np.isin(numbers, [NO_LAYER, *deltas])
    steps: list[Step] = []
    for number, delta in deltas.items():
        rows = np.flatnonzero(numbers == number)
        if delta.base is not None:
            patched = rows[delta.patches_among(page_nos[rows])]
            if base is not None and delta.is_against(base.blob.ref):
                from_base[patched] = True
            else:
                steps.append(Step.of(delta.base, page_nos[patched], patched))
        steps.append(Step.of(delta, page_nos[rows], rows))
    if base is not None and from_base.any():
        rows = np.flatnonzero(from_base)
        if 2 * len(rows) > len(page_nos):  # all, in one piece: cheaper than to leave some out
            rows = np.arange(len(page_nos), dtype=np.intp)
        steps.insert(0, Step.of(base, page_nos[rows], rows))
    return steps


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
