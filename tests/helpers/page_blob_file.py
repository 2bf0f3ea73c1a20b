"""Page blobs as files, written and read whole: by the formats' own code, without all that the
service does around it.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from app.core.formats.container import (
    CONTAINER_HEADER_BYTES,
    CONTAINER_TRAILER_BYTES,
    ContainerHeader,
    directory_offset_of,
    parse_container_header,
)
from app.core.formats.damage import Damage
from app.core.formats.page_blob import PageBlobDirectory, PageNos, Positions
from app.core.formats.page_blob_writer import (
    PageBatch,
    PageBlobSpec,
    PageBlobSummary,
    PageBlobWriter,
)
from app.core.formats.page_codec import PAGE_DIGEST_BYTES, page_digests

_PAGES_AT_ONCE_BYTES = 4 * 1024 * 1024
_BLOCKS_AT_ONCE = 64


class BasePages(Protocol):
    """The base blob that patches are made against."""

    @property
    def sha256(self) -> bytes: ...

    def read_blocking(self, page_nos: PageNos) -> dict[int, bytes]:
        """Those of the pages that it holds. Raises Damage."""
        ...


class PageBlobFile:
    """Raises Damage, and OSError, from every method."""

    def __init__(self, fd: int, *, sha256: bytes, owns_fd: bool = False) -> None:
        self._fd = fd
        self._owns_fd = owns_fd
        self.sha256 = sha256
        try:
            self._size = os.fstat(fd).st_size
            self.directory = self._load_directory_blocking()
        except BaseException:
            self.close()
            raise

    @classmethod
    def open_blocking(cls, path: Path, *, sha256: bytes) -> Self:
        return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC), sha256=sha256, owns_fd=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._owns_fd and self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def load_digests_blocking(self) -> bytes:
        """One per page, in page order."""
        number = self.directory.digests_block
        stored = self._pread(*self.directory.block_range(number, number + 1))
        return self.directory.unpack_digests(stored)

    def read_blocking(
        self, page_nos: PageNos, *, base: BasePages | None = None
    ) -> dict[int, bytes]:
        """Those of the pages (ascending) that it holds."""
        positions = self.directory.positions(page_nos)
        positions = positions[positions >= 0]
        if len(positions) == 0:
            return {}
        size = self.directory.page_size
        found: dict[int, bytes] = {}
        for some in self._by_blocks(positions):
            held = self.directory.page_nos[some]
            data = memoryview(self._unpack(some, held, base))
            for at, page_no in enumerate(held.tolist()):
                found[page_no] = bytes(data[at * size : (at + 1) * size])
        return found

    def iter_blocking(self, *, base: BasePages | None = None) -> Iterator[PageBatch]:
        """All of its pages, each also checked against its digest, and the header's say."""
        directory = self.directory
        self._check_header_blocking()
        digests = memoryview(self.load_digests_blocking())
        step = max(1, _PAGES_AT_ONCE_BYTES // directory.page_size)
        for first in range(0, len(directory), step):
            positions = np.arange(first, min(first + step, len(directory)), dtype=np.intp)
            page_nos = directory.page_nos[positions]
            data = memoryview(self._unpack(positions, page_nos, base))
            found = b"".join(page_digests(data, page_size=directory.page_size))
            if found != digests[PAGE_DIGEST_BYTES * first :][: len(found)]:
                raise Damage("a page does not have its digest")
            yield PageBatch(page_nos=page_nos, data=data)

    def _by_blocks(self, positions: Positions) -> list[Positions]:
        """In runs that need few blocks each, so that scattered pages do not unpack all at once."""
        numbers = self.directory.blocks_of(positions)
        changes = np.cumsum(np.diff(numbers, prepend=numbers[:1]) != 0) // _BLOCKS_AT_ONCE
        return np.split(positions, np.flatnonzero(np.diff(changes)) + 1)

    def _unpack(self, positions: Positions, page_nos: PageNos, base: BasePages | None) -> bytearray:
        numbers = np.unique(self.directory.blocks_of(positions))
        blocks = {
            number: self.directory.unpack_block(
                number, self._pread(*self.directory.block_range(number, number + 1))
            )
            for number in numbers[numbers >= 0].tolist()
        }
        base_pages = None
        if self.directory.base_sha256 is not None:
            if base is None or base.sha256 != self.directory.base_sha256:
                raise Damage("not the base that the delta is encoded against")
            base_pages = base.read_blocking(page_nos)
        return self.directory.unpack_pages(positions, blocks, base_pages=base_pages)

    def _load_directory_blocking(self) -> PageBlobDirectory:
        trailer_at = self._size - CONTAINER_TRAILER_BYTES
        if trailer_at < CONTAINER_HEADER_BYTES:
            raise Damage("container is cut off")
        offset = directory_offset_of(self._pread(trailer_at, CONTAINER_TRAILER_BYTES))
        if not CONTAINER_HEADER_BYTES <= offset <= trailer_at:
            raise Damage("container directory is not where it says")
        return PageBlobDirectory.parse(self._pread(offset, self._size - offset))

    def _check_header_blocking(self) -> None:
        told = self.directory.container.header
        header = parse_container_header(self._pread(0, CONTAINER_HEADER_BYTES))
        if header != ContainerHeader(
            kind=told.kind, codec=told.codec, identity=told.identity, part_id=told.part_id,
            raw_bytes=0,
        ):  # fmt: skip
            raise Damage("header and directory are not of one page blob")

    def _pread(self, offset: int, length: int) -> bytes:
        data = os.pread(self._fd, length, offset)
        while len(data) < length:
            more = os.pread(self._fd, length - len(data), offset + len(data))
            if not more:
                raise Damage("file is cut off", offset=offset + len(data))
            data += more
        return data


def write_pages_blocking(
    target: Path,
    spec: PageBlobSpec,
    pages: Iterable[PageBatch],
    *,
    base: BasePages | None = None,
    threads: int = 1,
) -> PageBlobSummary:
    """Writes `target`, replaced if it is there. Raises OSError, and Damage of the base."""
    sha256 = None if base is None else base.sha256
    with PageBlobWriter(target, spec, base_sha256=sha256, threads=threads) as writer:
        for batch in pages:
            held = None if base is None else base.read_blocking(batch.page_nos)
            writer.add_blocking(batch, base_pages=held)
        return writer.finish_blocking()
