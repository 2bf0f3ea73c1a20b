"""Writes page blobs (`page_blob.py`), page by page in ascending order, in bounded memory.

Equal pages, options and base give equal bytes, however the pages are cut into batches (I7). What is
uploaded is hashed as it is written (I2). Crash: a half-written file is replaced by the next
attempt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from pyroaring import BitMap

from app.core.base import failpoints
from app.core.base.errors import InvariantViolation
from app.core.formats.codecs import CodecCode, CodecName, codec_code
from app.core.formats.container import (
    BLOCK_ROW,
    ContainerDirectory,
    ContainerHeader,
    ContainerKind,
    LogIdentity,
    pack_container_directory,
    pack_container_header,
)
from app.core.formats.crc64 import crc64
from app.core.formats.hashed_output import HashedOutput
from app.core.formats.page_blob import (
    NO_BASE,
    ZERO_SLOT,
    PageColumns,
    PageNos,
    pack_places,
)
from app.core.formats.page_codec import (
    DICTIONARY_FROM_BYTES,
    PAGE_BLOCK_BYTES,
    BlockEncoder,
    make_patch,
    page_checksums,
    page_digest,
    page_digests,
    train_dictionary,
)

_GROUP_BYTES = 4 * 1024 * 1024
"""Blocks that are compressed together."""
_TRAINING_BYTES = 8 * 1024 * 1024
"""Held back at the beginning, for the dictionary to learn from."""
_EQUAL_PAGES_MAX = 256 * 1024
"""Distinct pages that later ones are compared with; bounds the memory of large chunks (I11)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageBatch:
    """Pages back to back, which stay as they are; `page_nos` ascends."""

    page_nos: PageNos
    data: memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class PageBlobSpec:
    kind: ContainerKind
    codec: CodecName
    identity: LogIdentity
    page_size: int
    delta_id: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PageBlobSummary:
    """A written blob: what its catalogue row needs to know."""

    sha256: bytes
    crc64: int
    bytes: int
    directory_offset: int
    directory_bytes: int
    digests_offset: int
    digests_bytes: int
    raw_bytes: int
    """Of its pages, before anything was saved."""
    pages: BitMap
    patches: int
    """Pages stored as a difference to the base."""


class PageBlobWriter:
    """Belongs to one thread at a time. Leaving the context without `finish_blocking` leaves a
    rubbish file.
    """

    def __init__(
        self,
        target: Path,
        spec: PageBlobSpec,
        *,
        base_sha256: bytes | None = None,
        threads: int = 1,
    ) -> None:
        if base_sha256 is not None and spec.kind is not ContainerKind.DELTA:
            raise InvariantViolation("only a delta has a base")
        self._spec = spec
        self._base_sha256 = base_sha256
        self._threads = threads
        self._codec = codec_code(spec.codec)
        self._header = ContainerHeader(
            kind=spec.kind, codec=self._codec, identity=spec.identity, part_id=spec.delta_id,
            raw_bytes=0,
        )  # fmt: skip
        target.unlink(missing_ok=True)  # never through a link into another blob
        self._file = target.open("xb")
        self._output = HashedOutput(self._file)
        self._output.write(pack_container_header(self._header))
        self._zero_digest = page_digest(bytes(spec.page_size))
        self._slot_of: dict[bytes, int] = {}
        self._page_nos: list[PageNos] = []
        self._slots: list[int] = []
        self._checksums: list[int] = []
        self._digests: list[bytes] = []
        self._slot_bytes: list[int] = []
        self._slot_pages: list[int] = []
        self._blocks: list[tuple[int, int, int, int, int, int]] = []
        self._raw: bytearray | memoryview = bytearray()  # slots that are not compressed yet …
        self._raw_offset = 0  # … and where they begin
        self._raw_slot = 0
        self._encoder: BlockEncoder | None = None
        self._dictionary = b""
        self._patches = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Again is harmless."""
        self._file.close()

    def add_blocking(
        self, batch: PageBatch, *, base_pages: Mapping[int, bytes] | None = None
    ) -> None:
        """`base_pages` are those of these pages that the base blob holds. Raises OSError."""
        if base_pages and self._base_sha256 is None:
            raise InvariantViolation("pages of a base in a blob without one")
        size, count = self._spec.page_size, len(batch.page_nos)
        if len(batch.data) != count * size:
            raise InvariantViolation("a batch of pages of another length than its numbers say")
        if count == 0:
            return
        before = int(self._page_nos[-1][-1]) if self._page_nos else 0
        if (
            int(batch.page_nos[0]) <= before
            or not (np.diff(batch.page_nos.astype(np.int64)) > 0).all()
        ):
            raise InvariantViolation("pages are not in order")
        digests = page_digests(batch.data, page_size=size)
        if base_pages:
            self._add_patches(batch, digests, base_pages)
        else:
            self._add_whole(batch, digests)
        self._page_nos.append(batch.page_nos.astype(np.uint32))
        self._checksums += page_checksums(batch.data, page_size=size)
        self._digests += digests
        limit = _GROUP_BYTES if self._encoder is not None else _TRAINING_BYTES
        if len(self._raw) >= limit:
            self._pack_blocks_blocking(final=False)

    def finish_blocking(self) -> PageBlobSummary:
        """Raises InvariantViolation for a blob without pages."""
        if not self._page_nos:
            raise InvariantViolation("a page blob without pages")
        self._pack_blocks_blocking(final=True)
        page_nos = np.concatenate(self._page_nos)
        digests = b"".join(self._digests)
        digests_offset = self._output.bytes
        self._add_blocks([len(digests)], [digests], keys=[int(page_nos[-1]) + 1])
        blocks = np.array(self._blocks, dtype=BLOCK_ROW)
        directory = ContainerDirectory(
            header=ContainerHeader(
                kind=self._header.kind, codec=self._header.codec, identity=self._header.identity,
                part_id=self._header.part_id, raw_bytes=self._raw_offset,
            ),
            first_key=int(page_nos[0]),
            last_key=int(page_nos[-1]),
            directory_offset=self._output.bytes,
            blocks=blocks,
            places=pack_places(
                PageColumns(
                    page_size=self._spec.page_size,
                    page_nos=page_nos,
                    slots=np.array(self._slots, dtype=np.uint32),
                    checksums=np.array(self._checksums, dtype=np.uint64),
                    slot_bytes=np.array(self._slot_bytes, dtype=np.uint32),
                    base_sha256=self._base_sha256 or NO_BASE,
                    dictionary=self._dictionary,
                )
            ),
        )  # fmt: skip
        self._output.write(pack_container_directory(directory))
        self._file.close()
        digest = self._output.digest()
        return PageBlobSummary(
            sha256=digest.sha256, crc64=digest.crc64, bytes=digest.bytes,
            directory_offset=directory.directory_offset,
            directory_bytes=directory.directory_bytes,
            digests_offset=digests_offset, digests_bytes=len(digests),
            raw_bytes=len(page_nos) * self._spec.page_size,
            pages=BitMap(page_nos), patches=self._patches,
        )  # fmt: skip

    def _add_whole(self, batch: PageBatch, digests: Sequence[bytes]) -> None:
        """Pages as they are, taken over all at once where all are new."""
        size, numbers = self._spec.page_size, batch.page_nos.tolist()
        known, zero, limit = self._slot_of, self._zero_digest, _EQUAL_PAGES_MAX
        slots, next_slot = self._slots, len(self._slot_bytes)
        fresh: list[int] = []
        for at, digest in enumerate(digests):  # a loop over every page of a database: no calls
            slot = ZERO_SLOT if digest == zero else known.get(digest)
            if slot is None:
                slot = next_slot
                next_slot += 1
                if len(known) < limit:
                    known[digest] = slot
                fresh.append(at)
            slots.append(slot)
        self._slot_bytes += [size] * len(fresh)
        self._slot_pages += [numbers[at] for at in fresh]
        if len(fresh) == len(numbers):
            self._hold(batch.data)
        else:
            pages = np.frombuffer(batch.data, dtype=np.uint8).reshape(-1, size)
            self._hold(pages[fresh].reshape(-1).data)

    def _add_patches(
        self, batch: PageBatch, digests: Sequence[bytes], base_pages: Mapping[int, bytes]
    ) -> None:
        size = self._spec.page_size
        stored_pages: list[bytes] = []
        for at, page_no in enumerate(batch.page_nos.tolist()):
            slot = self._known_slot(digests[at])
            if slot is None:
                page = bytes(batch.data[at * size : (at + 1) * size])
                base_page = base_pages.get(page_no)
                stored = page if base_page is None else _shorter(page, base_page)
                slot = self._new_slot(page_no, len(stored), digests[at])
                stored_pages.append(stored)
            self._slots.append(slot)
        self._hold(memoryview(b"".join(stored_pages)))

    def _hold(self, data: memoryview) -> None:
        """Until it is compressed; not copied where nothing else is held."""
        if not self._raw:
            self._raw = data
            return
        if isinstance(self._raw, memoryview):
            self._raw = bytearray(self._raw)
        self._raw += data

    def _known_slot(self, digest: bytes) -> int | None:
        return ZERO_SLOT if digest == self._zero_digest else self._slot_of.get(digest)

    def _new_slot(self, page_no: int, slot_bytes: int, digest: bytes) -> int:
        slot = len(self._slot_bytes)
        self._slot_bytes.append(slot_bytes)
        self._slot_pages.append(page_no)
        if slot_bytes < self._spec.page_size:
            self._patches += 1  # fits its own base page only, so nothing else can share it
        elif len(self._slot_of) < _EQUAL_PAGES_MAX:
            self._slot_of[digest] = slot
        return slot

    def _pack_blocks_blocking(self, *, final: bool) -> None:
        if self._encoder is None:
            if self._codec is CodecCode.ZSTD and len(self._raw) >= DICTIONARY_FROM_BYTES:
                self._dictionary = train_dictionary(
                    memoryview(self._raw)[:_TRAINING_BYTES], page_size=self._spec.page_size
                )
            self._encoder = BlockEncoder(
                self._codec, dictionary=self._dictionary, threads=self._threads
            )
        lengths, keys = self._cut(final=final)
        if not lengths:
            return
        held, total = self._raw, sum(lengths)
        self._raw = memoryview(held)[total:]  # less than a block
        raw = memoryview(held)[:total]
        packed = self._encoder.encode(raw, lengths)
        self._add_blocks(lengths, packed, keys=keys)
        failpoints.fp("stage.mid_write")

    def _cut(self, *, final: bool) -> tuple[list[int], list[int]]:
        """Lengths and first pages of the next blocks; the last, which may yet grow, only if
        `final`.
        """
        lengths: list[int] = []
        keys: list[int] = []
        slot, slots = self._raw_slot, len(self._slot_bytes)
        while slot < slots:
            key, length, start = self._slot_pages[slot], 0, slot
            while slot < slots and length + self._slot_bytes[slot] <= PAGE_BLOCK_BYTES:
                length += self._slot_bytes[slot]
                slot += 1
            if slot == slots and length < PAGE_BLOCK_BYTES and not final:
                slot = start
                break
            lengths.append(length)
            keys.append(key)
        self._raw_slot = slot
        return lengths, keys

    def _add_blocks(
        self,
        raw_lengths: Sequence[int],
        stored: Sequence[bytes | memoryview],
        *,
        keys: Sequence[int],
    ) -> None:
        offset = self._output.bytes
        for raw_bytes, block, key in zip(raw_lengths, stored, keys, strict=True):
            self._blocks.append(
                (self._raw_offset, offset, raw_bytes, len(block), key, crc64(block))
            )
            self._raw_offset += raw_bytes
            offset += len(block)
        self._output.write(b"".join(stored))  # at once: each write waits for the interpreter's lock


def _shorter(page: bytes, base_page: bytes) -> bytes:
    """A patch, unless it saves little over the page within its block: it costs a reader a block of
    the base.
    """
    patch = make_patch(page, base_page)
    return patch if 2 * len(patch) < len(page) else page
