"""Pages of published blobs: one page through the page cache, or many at once past it.

Invariants: I10: see blob_reader.py; a page is checked once more by its own checksum. A directory
is used only if it is of the blob that its row means. I11: directories are kept up to a limit,
blocks not at all.
Concurrency: a directory and a block are fetched by one reader at a time, for all who wait.
Cancellation: a fetch ends with the last one who waits for it. Crash: nothing here is written.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from app.core.base.errors import BopError
from app.core.base.tasks import TaskScope, both
from app.core.formats.codecs import codec_code
from app.core.formats.container import ContainerKind
from app.core.formats.damage import Damage
from app.core.formats.page_blob import PageBlobDirectory
from app.core.reads.blob_reader import BlobReader, corrupt_blob
from app.core.reads.byte_source import Tier
from app.core.reads.delta_chain import BaseLayer, DeltaLayer, Layer
from app.core.reads.open_pages import Block, OpenPages, unpack_blocks
from app.core.reads.page_cache import FetchOptions, PageCache, PageKey
from app.core.reads.single_flight import SingleFlight

PageTier = Literal["wal", "page_cache", "local", "remote"]

DIRECTORIES_BYTES = 64 * 1024 * 1024
READ_AHEAD_BYTES = 512 * 1024
"""What is fetched beyond a block when pages are read one after the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What one fetch of blocks gave: those asked for and whole pages of them."""

    blocks: Mapping[int, Block]
    pages: Mapping[int, bytes]
    tier: Tier


class KeptDirectories(Protocol):
    """Directories on the local disk, by their blobs' SHA-256 in hex (stores/local)."""

    async def get(self, sha256: str) -> bytes | None: ...

    async def put(self, sha256: str, data: bytes) -> None: ...

    async def drop(self, sha256: str) -> None: ...


class PageBlobs:
    def __init__(
        self,
        reader: BlobReader,
        cache: PageCache,
        *,
        scope: TaskScope,
        directories_bytes: int = DIRECTORIES_BYTES,
        kept: KeptDirectories | None = None,
    ) -> None:
        self.reader = reader
        self._cache = cache
        self._kept = kept
        self._directories = _DirectoryCache(limit_bytes=directories_bytes)
        self._directory_flights = SingleFlight[bytes, PageBlobDirectory](scope)
        self._block_flights = SingleFlight[tuple[bytes, int], _Run](scope)

    # --- one page -----------------------------------------------------------------------------

    def get_page(self, layer: Layer, page_no: int) -> bytes | None:
        """Where the page cache has it."""
        key = PageKey(layer.blob.sha256, page_no)
        return self._cache.get(key) if key in self._cache else None

    async def read_page(
        self, layer: Layer, page_no: int, options: FetchOptions
    ) -> tuple[bytes, PageTier] | None:
        """None: the blob does not hold it. Raises CorruptBlob, RemoteUnavailable."""
        key = PageKey(layer.blob.sha256, page_no)
        if not options.bypass and (known := self._cache.get(key)) is not None:
            return known, "page_cache"
        directory = await self._directory_to_patch(layer)
        place = directory.locate(page_no)
        if place is None:
            return None
        if place.is_zero:
            return bytes(directory.page_size), "page_cache"
        block = self._block(layer, directory, place.block, page_no, options)
        base_page: bytes | None = None
        if place.needs_base:
            run, base_page = await both(block, self._base_page(layer, page_no, options))
        else:
            run = await block
        page = run.pages.get(page_no)
        if page is None:
            try:
                page = directory.page(run.blocks[place.block], place, base_page)
            except Damage as error:
                raise corrupt_blob(layer.blob, f"The blob is damaged: {error}.") from error
            if options.populate and not options.bypass:
                self._cache.put(key, page)
        return page, run.tier

    async def _directory_to_patch(self, layer: Layer) -> PageBlobDirectory:
        """The layer's directory, and with it that of the base, most likely to be asked next: what
        a cold patch takes is two round trips then, not four.
        """
        match layer:
            case DeltaLayer(encoded_against=BaseLayer() as base) if (
                self._directories.get(layer.blob.sha256) is None
                and self._directories.get(base.blob.sha256) is None
            ):
                directory, _ = await both(self._directory(layer), self._try_directory(base))
                return directory
            case _:
                return await self._directory(layer)

    async def _try_directory(self, layer: Layer) -> None:
        with contextlib.suppress(BopError):  # told to whoever needs it
            await self._directory(layer)

    async def _base_page(self, layer: Layer, page_no: int, options: FetchOptions) -> bytes | None:
        match layer:
            case DeltaLayer(encoded_against=BaseLayer() as base):
                found = await self.read_page(base, page_no, options)
                return None if found is None else found[0]
            case _:
                raise corrupt_blob(layer.blob, f"Page {page_no} is a patch, and has no base.")

    async def _block(
        self,
        layer: Layer,
        directory: PageBlobDirectory,
        block: int,
        page_no: int,
        options: FetchOptions,
    ) -> _Run:
        sha256 = layer.blob.sha256
        stop = block + 1
        if options.populate and not options.bypass:
            sequential = PageKey(sha256, page_no - 1) in self._cache
            if sequential:
                stop = self._read_ahead(directory, block)

        async def fetch() -> _Run:
            mine = await self.reader.open(layer.blob)
            try:
                first, length = directory.block_range(block, stop)
                blocks, pages = await mine.fetch(
                    first, length, lambda data: _unpack_run(directory, block, stop, data)
                )
                tier = mine.tier
            finally:
                mine.close()
            if options.populate and not options.bypass:
                for number, page in pages.items():
                    self._cache.put(PageKey(sha256, number), page)
            return _Run(blocks=blocks, pages=pages, tier=tier)

        return await self._block_flights.run((sha256, block), fetch)

    def _read_ahead(self, directory: PageBlobDirectory, block: int) -> int:
        """Behind the last block to be fetched along with `block`."""
        budget = min(READ_AHEAD_BYTES, self._cache.stats().limit_bytes // 4)
        ends = np.cumsum(directory.container.blocks["raw_bytes"][block : directory.digests_block])
        return block + max(1, int(np.searchsorted(ends, budget, side="right")))

    # --- many pages ---------------------------------------------------------------------------

    async def open(self, layer: Layer) -> "OpenPages":
        """For reading much of a blob; to be closed by the caller. Raises CorruptBlob,
        RemoteUnavailable.
        """
        blob = await self.reader.open(layer.blob)
        base: OpenPages | None = None
        try:
            directory = await self._directory(layer)
            if directory.base_sha256 is not None:
                assert isinstance(layer, DeltaLayer)
                assert layer.encoded_against is not None
                base = await self.open(layer.encoded_against)
        except BaseException:
            blob.close()
            raise
        return OpenPages(self.reader, blob, directory, base)

    async def _directory(self, layer: Layer) -> PageBlobDirectory:
        sha256 = layer.blob.sha256
        directory = self._directories.get(sha256)
        if directory is None:
            directory = await self._directory_flights.run(
                sha256, lambda: self._load_directory(layer)
            )
        try:
            _check_directory(layer, directory)  # another row may mean the same blob
        except Damage as error:
            raise corrupt_blob(layer.blob, f"The blob is damaged: {error}.") from error
        return directory

    async def _load_directory(self, layer: Layer) -> PageBlobDirectory:
        """From where it was kept on the disk, else from the blob."""
        found = await self._read_kept(layer)
        if found is None:
            found = await self._fetch_directory(layer)
        self._directories.put(layer.blob.sha256, found)
        return found

    async def _read_kept(self, layer: Layer) -> PageBlobDirectory | None:
        if self._kept is None or (data := await self._kept.get(layer.blob.sha256.hex())) is None:
            return None
        try:
            return await self.reader.pool.run(_parse_directory, layer, data)
        except Damage:
            await self._kept.drop(layer.blob.sha256.hex())
            return None

    async def _fetch_directory(self, layer: Layer) -> PageBlobDirectory:
        mine = await self.reader.open(layer.blob)
        try:
            found, data = await mine.fetch(
                layer.row.directory_offset,
                layer.row.directory_bytes,
                lambda data: (_parse_directory(layer, data), data),
            )
        finally:
            mine.close()
        if self._kept is not None:
            await self._kept.put(layer.blob.sha256.hex(), data)
        return found


class _DirectoryCache:
    """By the blob's SHA-256, least recently used go first (I11)."""

    def __init__(self, *, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._directories: OrderedDict[bytes, PageBlobDirectory] = OrderedDict()
        self.used_bytes = 0

    def get(self, sha256: bytes) -> PageBlobDirectory | None:
        directory = self._directories.get(sha256)
        if directory is not None:
            self._directories.move_to_end(sha256)
        return directory

    def put(self, sha256: bytes, directory: PageBlobDirectory) -> None:
        if sha256 in self._directories:
            return
        self._directories[sha256] = directory
        self.used_bytes += directory.memory_bytes
        while self.used_bytes > self._limit_bytes:
            _, oldest = self._directories.popitem(last=False)
            self.used_bytes -= oldest.memory_bytes


def _parse_directory(layer: Layer, data: bytes) -> PageBlobDirectory:
    directory = PageBlobDirectory.parse(data)
    _check_directory(layer, directory)
    return directory


def _check_directory(layer: Layer, directory: PageBlobDirectory) -> None:
    """Raises Damage unless the blob is the one the row means: an object in another's place."""
    row, who = layer.row, directory.identity
    owner = row.origin_db_id or row.db_id
    is_it = (
        _is_of_kind(layer, directory)
        and (who.db_id, who.chunk_id) == (owner, row.chunk_id)
        # A row may be renewed (a fork) without its blob.
        and (owner != row.db_id or who.generation <= row.generation)
        and directory.container.header.codec == codec_code(row.codec)
        and directory.container.directory_offset == row.directory_offset
        and len(directory) == row.count
    )
    if not is_it:
        raise Damage("the blob is another one than its row says")


def _is_of_kind(layer: Layer, directory: PageBlobDirectory) -> bool:
    match layer:
        case BaseLayer():
            return directory.kind is ContainerKind.PAGES
        case DeltaLayer(row=row, encoded_against=base):
            against = directory.base_sha256
            return (
                directory.kind is ContainerKind.DELTA
                and directory.delta_id == row.delta_id
                and (against is None or (base is not None and against == base.blob.sha256))
            )


def _unpack_run(
    directory: PageBlobDirectory, first: int, stop: int, data: bytes
) -> tuple[dict[int, Block], dict[int, bytes]]:
    """The blocks, and their pages but for patches. Raises Damage."""
    blocks = unpack_blocks(directory, first, stop, data)
    positions = directory.positions_in(first, stop)
    whole = positions[~directory.are_patches(positions)]
    unpacked = memoryview(directory.unpack_pages(whole, blocks))
    size = directory.page_size
    pages = {
        number: bytes(unpacked[at * size : (at + 1) * size])
        for at, number in enumerate(directory.page_nos[whole].tolist())
    }
    return blocks, pages
