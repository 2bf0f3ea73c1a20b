"""Pages of a few published blobs at once, past the page cache: runs of blocks, unpacked into rows.

Where all the blobs are files of the hot cache, a read is one turn of the pool: what it takes is
looked up, read, unpacked and patched there. Else, and where such a file is damaged, runs of blocks
are fetched one by one, each from wherever it can be had.

Invariants: I10: see blob_reader.py; patched pages are checked by their own checksum.
Concurrency: reads may run side by side. Cancellation: at any await; a file that is being read is
closed after it.
Crash: nothing here is written.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from app.core.base.tasks import for_each, uninterrupted
from app.core.formats.damage import Damage
from app.core.formats.page_blob import PageBlobDirectory, PageNos, Pages, Positions
from app.core.reads.blob_reader import BlobReader, OpenBlob, corrupt_blob
from app.core.reads.byte_source import read_exactly_blocking
from app.core.stores.manifest.records import BlobRef

Block = bytes | memoryview

FETCHES_AT_ONCE = 4
GAP_BYTES_MAX = 128 * 1024
"""Blocks that are not needed but lie between needed ones are read along up to here: cheaper than
another request."""

NO_BLOCK = -1


class OpenPages:
    """A page blob, and the one that its patches are against."""

    def __init__(
        self,
        reader: BlobReader,
        blob: OpenBlob,
        directory: PageBlobDirectory,
        base: "OpenPages | None",
    ) -> None:
        self.directory = directory
        self.base = base
        self.blob = blob
        self._reader = reader

    @property
    def page_nos(self) -> PageNos:
        """Of the pages that the blob holds, ascending."""
        return self.directory.page_nos

    def is_against(self, blob: BlobRef) -> bool:
        """Whether its patches are against that blob's pages."""
        return self.directory.base_sha256 == blob.sha256

    def patches_among(self, page_nos: PageNos) -> npt.NDArray[np.bool_]:
        """Which of the pages take the base's page to be read; it holds all of them."""
        return self.directory.are_patches(self.directory.positions(page_nos))

    async def read(self, page_nos: PageNos) -> Pages:
        """The pages, ascending: shape (pages, page size). What the blob does not hold is zeros.
        Raises CorruptBlob, RemoteUnavailable.
        """
        rows = np.arange(len(page_nos), dtype=np.intp)

        def steps() -> list[Step]:
            found: list[Step] = []
            if self.base is not None:
                patched = np.flatnonzero(self.patches_among(page_nos))
                found.append(Step.of(self.base, page_nos[patched], rows[patched]))
            return [*found, Step.of(self, page_nos, rows)]

        involved = [self] if self.base is None else [self, self.base]
        shape = (len(page_nos), self.directory.page_size)
        return await read_steps(self._reader, involved, steps, shape=shape)

    async def read_digests(self) -> bytes:
        """`PAGE_DIGEST_BYTES` for each of `page_nos`. Raises CorruptBlob, RemoteUnavailable."""
        number = self.directory.digests_block
        first, length = self.directory.block_range(number, number + 1)
        return await self.blob.fetch(first, length, self.directory.unpack_digests)

    def close(self) -> None:
        """Again is harmless."""
        self.blob.close()
        if self.base is not None:
            self.base.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Pages of one blob that go into rows of what is read; rows of patches hold the base's pages by
    then.
    """

    source: OpenPages
    positions: Positions
    rows: Positions
    runs: Sequence[tuple[int, int]]
    """Blocks [start, stop) that hold them."""
    blocks: dict[int, Block] = field(default_factory=dict)

    @classmethod
    def of(cls, source: OpenPages, page_nos: PageNos, rows: Positions) -> "Step":
        """Pages that the blob does not hold are left out."""
        directory = source.directory
        positions = directory.positions(page_nos)
        held = positions >= 0
        if not held.all():
            positions, rows = positions[held], rows[held]
        numbers = np.unique(directory.blocks_of(positions))
        runs = block_runs(directory, numbers[numbers != NO_BLOCK])
        return cls(source=source, positions=positions, rows=rows, runs=runs)

    def load_blocking(self, descriptor: int) -> int:
        """The blocks from the blob's file; how many bytes. Raises Damage, OSError."""
        loaded = 0
        for start, stop in self.runs:
            first, length = self.source.directory.block_range(start, stop)
            data = read_exactly_blocking(descriptor, first, length)
            self.blocks.update(unpack_blocks(self.source.directory, start, stop, data))
            loaded += length
        return loaded

    async def fetch(self, run: tuple[int, int]) -> None:
        """Raises CorruptBlob, RemoteUnavailable."""
        directory, (start, stop) = self.source.directory, run
        first, length = directory.block_range(start, stop)

        def unpack(data: bytes) -> Mapping[int, Block]:
            return unpack_blocks(directory, start, stop, data)

        self.blocks.update(await self.source.blob.fetch(first, length, unpack))

    def fill(self, out: Pages) -> None:
        """Raises Damage."""
        self.source.directory.unpack_into(
            out, self.rows, self.positions, self.blocks, has_base=self.source.base is not None
        )
        self.blocks.clear()


async def read_steps(
    reader: BlobReader,
    involved: Sequence[OpenPages],
    steps: Callable[[], Sequence[Step]],
    *,
    shape: tuple[int, int],
) -> Pages:
    """What `steps`, of blobs among those involved, fill in, one after the other; the rest is zeros.
    `steps` is called in the pool. Raises CorruptBlob, RemoteUnavailable.
    """
    with ExitStack() as stack:
        files = {one: stack.enter_context(one.blob.held_file()) for one in involved}
        descriptors = {one: file for one, file in files.items() if file is not None}
        if len(descriptors) == len(files):
            started = reader.clock.monotonic()
            try:
                pages, loaded = await uninterrupted(
                    reader.pool.run(_read_files_blocking, descriptors, steps, shape)
                )
            except (Damage, OSError):
                pass  # found again below, blob by blob: told, dropped, fetched
            else:
                seconds = reader.clock.monotonic() - started
                reader.events.debug("read.served", tier="local", bytes=loaded, seconds=seconds)
                return pages
    planned = await reader.pool.run(steps)
    await for_each(
        [(step, run) for step in planned for run in step.runs],
        lambda each: each[0].fetch(each[1]),
        limit=FETCHES_AT_ONCE,
    )
    return await reader.pool.run(_filled_blocking, planned, shape)


def _read_files_blocking(
    descriptors: Mapping[OpenPages, int],
    steps: Callable[[], Sequence[Step]],
    shape: tuple[int, int],
) -> tuple[Pages, int]:
    """Raises Damage, OSError."""
    pages, loaded = np.zeros(shape, dtype=np.uint8), 0
    for step in steps():
        loaded += step.load_blocking(descriptors[step.source])
        step.fill(pages)
    return pages, loaded


def _filled_blocking(steps: Sequence[Step], shape: tuple[int, int]) -> Pages:
    """Raises CorruptBlob."""
    pages = np.zeros(shape, dtype=np.uint8)
    for step in steps:
        try:
            step.fill(pages)
        except Damage as error:
            ref = step.source.blob.ref
            raise corrupt_blob(ref, f"The blob is damaged: {error}.") from error
    return pages


def block_runs(
    directory: PageBlobDirectory, numbers: npt.NDArray[np.intp]
) -> list[tuple[int, int]]:
    """Blocks [start, stop) to be fetched at once, from those needed, ascending."""
    if len(numbers) == 0:
        return []
    table = directory.container.blocks[int(numbers[0]) : int(numbers[-1]) + 1]
    mine = numbers - numbers[0]
    offsets = table["stored_offset"].astype(np.int64)
    ends = offsets + table["stored_bytes"]
    far = offsets[mine[1:]] - ends[mine[:-1]] > GAP_BYTES_MAX
    breaks = (np.flatnonzero(far) + 1).tolist()
    return [
        (int(numbers[start]), int(numbers[stop - 1]) + 1)
        for start, stop in zip([0, *breaks], [*breaks, len(numbers)], strict=True)
    ]


def unpack_blocks(
    directory: PageBlobDirectory, first: int, stop: int, data: bytes
) -> dict[int, Block]:
    """Raises Damage."""
    view, at = memoryview(data), 0
    blocks: dict[int, Block] = {}
    for number, length in enumerate(
        directory.container.blocks["stored_bytes"][first:stop].tolist(), start=first
    ):
        blocks[number] = directory.unpack_block(number, view[at : at + length])
        at += length
    return blocks
