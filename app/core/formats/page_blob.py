"""Page blobs: containers of kind PAGES (a base) and DELTA, and how one page is read from them.

    header · blocks of slots · block of digests · block table · places · trailer

A *slot* is what is stored of a page: the page itself, or in a DELTA a patch against the base's page
where that is less than half as long. Equal pages share a slot, a page of zeros has none. Slots lie
back to back in blocks of up to 64 KiB, cut between slots; a block's key is its first page. The
last block holds a digest per page, in page order: readers never fetch it, planning does.

`places`, little-endian: number of pages, of slots, page size, dictionary bytes (u32 each), packed
bytes (u64), 8 zero bytes, SHA-256 of the base blob (zeros: every slot is a whole page); then one
zstd frame of the columns page number u32 (differences), slot u32 (differences; ffffffff stands
for the page of zeros), CRC-64 of the page u64, slot length u32 (one per slot), and the dictionary.

The header's `raw_bytes` is 0: it is not known yet when the header is written; the trailer has it.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from app.core.formats.container import (
    ContainerDirectory,
    ContainerKind,
    LogIdentity,
    parse_container_directory,
    stored_range,
)
from app.core.formats.crc64 import crc64
from app.core.formats.damage import Damage
from app.core.formats.page_codec import (
    PAGE_BLOCK_BYTES,
    PAGE_DIGEST_BYTES,
    BlockDecoder,
    apply_patch,
    pack_columns,
    unpack_columns,
)
from app.core.formats.sqlite_wal import PAGE_SIZES

ZERO_SLOT = 0xFFFFFFFF
NO_BASE = bytes(32)

PageNos = npt.NDArray[np.uint32]
Checksums = npt.NDArray[np.uint64]
Positions = npt.NDArray[np.intp]
Pages = npt.NDArray[np.uint8]

_PLACES = struct.Struct("<IIIIQ8x32s")
_PAGE_COLUMN_BYTES = 16
_SLOT_COLUMN_BYTES = 4
_DICTIONARY_BYTES_MAX = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PagePlace:
    """Where one page lies: `stored_bytes` at `stored_offset` of the blob are all that its reading
    takes, besides the base's page where `needs_base`. A page of zeros lies nowhere.
    """

    page_no: int
    is_zero: bool
    needs_base: bool
    block: int
    stored_offset: int
    stored_bytes: int
    offset_in_block: int
    slot_bytes: int
    checksum: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PageColumns:
    """What `places` says. `slot_bytes` has a row per slot, the others one per page."""

    page_size: int
    page_nos: PageNos
    slots: PageNos
    checksums: Checksums
    slot_bytes: PageNos
    base_sha256: bytes
    dictionary: bytes


def pack_places(columns: PageColumns) -> bytes:
    packed = pack_columns(
        b"".join(
            (
                _differences(columns.page_nos),
                _differences(columns.slots),
                columns.checksums.astype("<u8").tobytes(),
                columns.slot_bytes.astype("<u4").tobytes(),
                columns.dictionary,
            )
        )
    )
    head = _PLACES.pack(
        len(columns.page_nos), len(columns.slot_bytes), columns.page_size,
        len(columns.dictionary), len(packed), columns.base_sha256,
    )  # fmt: skip
    return head + packed


def parse_places(data: bytes) -> PageColumns:
    """Raises Damage."""
    if len(data) < _PLACES.size:
        raise Damage("the places of a page blob are cut off")
    pages, slots, page_size, dictionary_bytes, packed_bytes, base = _PLACES.unpack_from(data)
    if packed_bytes != len(data) - _PLACES.size or page_size not in PAGE_SIZES:
        raise Damage("the places of a page blob contradict themselves")
    if dictionary_bytes > _DICTIONARY_BYTES_MAX:
        raise Damage("a dictionary of an impossible size")
    raw = unpack_columns(
        memoryview(data)[_PLACES.size :],
        raw_bytes=_PAGE_COLUMN_BYTES * pages + _SLOT_COLUMN_BYTES * slots + dictionary_bytes,
    )
    at = 4 * pages
    return PageColumns(
        page_size=page_size,
        page_nos=np.cumsum(np.frombuffer(raw, "<u4", pages), dtype=np.uint32),
        slots=np.cumsum(np.frombuffer(raw, "<u4", pages, at), dtype=np.uint32),
        checksums=np.frombuffer(raw, "<u8", pages, 2 * at).astype(np.uint64),
        slot_bytes=np.frombuffer(raw, "<u4", slots, 4 * at).astype(np.uint32),
        base_sha256=bytes(base),
        dictionary=raw[4 * at + 4 * slots :],
    )


def _differences(values: PageNos) -> bytes:
    return np.diff(values, prepend=np.uint32(0)).astype("<u4").tobytes()


def page_blob_bytes_max(pages: int, *, page_size: int) -> int:
    """No blob of that many pages is larger."""
    blocks = pages // max(1, PAGE_BLOCK_BYTES // page_size) + 2
    columns = pages * (_PAGE_COLUMN_BYTES + _SLOT_COLUMN_BYTES + PAGE_DIGEST_BYTES)
    return pages * page_size + columns + columns // 64 + 2 * blocks * 40 + (128 << 10)


class PageBlobDirectory:
    """A page blob's directory, checked, and what it takes to unpack its pages. Immutable; any
    thread may use it.
    """

    __slots__ = ("_columns", "_decoder", "_first_slots", "_slot_ends", "container")

    def __init__(self, container: ContainerDirectory, columns: PageColumns) -> None:
        self.container = container
        self._columns = columns
        self._slot_ends = np.cumsum(columns.slot_bytes, dtype=np.uint64)
        self._first_slots = _check_columns(container, columns, self._slot_ends)
        self._decoder = BlockDecoder(container.header.codec, dictionary=columns.dictionary)

    @classmethod
    def parse(cls, data: bytes | memoryview) -> "PageBlobDirectory":
        """The directory that is all of `data`: `directory_bytes` at `directory_offset`. Raises
        Damage.
        """
        container = parse_container_directory(data)
        if container.header.kind not in (ContainerKind.PAGES, ContainerKind.DELTA):
            raise Damage("not a page blob")
        columns = parse_places(container.places)
        # `places` are in the columns now.
        bare = ContainerDirectory(
            header=container.header, first_key=container.first_key, last_key=container.last_key,
            directory_offset=container.directory_offset, blocks=container.blocks, places=b"",
        )  # fmt: skip
        return cls(bare, columns)

    def __repr__(self) -> str:
        who = self.identity
        return f"<PageBlobDirectory {self.kind.name} {who.chunk_id}@{who.generation} {len(self)}>"

    def __len__(self) -> int:
        """Its pages."""
        return len(self._columns.page_nos)

    def __contains__(self, page_no: int) -> bool:
        return self._position(page_no) is not None

    @property
    def kind(self) -> ContainerKind:
        return self.container.header.kind

    @property
    def identity(self) -> LogIdentity:
        return self.container.header.identity

    @property
    def delta_id(self) -> int:
        return self.container.header.part_id

    @property
    def page_size(self) -> int:
        return self._columns.page_size

    @property
    def page_nos(self) -> PageNos:
        """Ascending."""
        return self._columns.page_nos

    @property
    def base_sha256(self) -> bytes | None:
        """Of the blob that patches are against; None where every slot is a whole page."""
        return None if self._columns.base_sha256 == NO_BASE else self._columns.base_sha256

    @property
    def memory_bytes(self) -> int:
        columns = self._columns
        return (
            1024 + self.container.blocks.nbytes + self._slot_ends.nbytes + len(columns.dictionary)
            + columns.page_nos.nbytes + columns.slots.nbytes + columns.checksums.nbytes
            + columns.slot_bytes.nbytes
        )  # fmt: skip

    # --- where pages lie ----------------------------------------------------------------------

    def locate(self, page_no: int) -> PagePlace | None:
        """None: the blob does not hold that page."""
        position = self._position(page_no)
        return None if position is None else self.place(position)

    def place(self, position: int) -> PagePlace:
        """Of the page at `position` of `page_nos`."""
        columns = self._columns
        page_no, slot = int(columns.page_nos[position]), int(columns.slots[position])
        checksum = int(columns.checksums[position])
        if slot == ZERO_SLOT:
            return PagePlace(
                page_no=page_no, is_zero=True, needs_base=False, block=-1, stored_offset=0,
                stored_bytes=0, offset_in_block=0, slot_bytes=0, checksum=checksum,
            )  # fmt: skip
        block = int(np.searchsorted(self._first_slots, slot, side="right")) - 1
        row = self.container.blocks[block]
        slot_bytes = int(columns.slot_bytes[slot])
        start = int(self._slot_ends[slot]) - slot_bytes
        return PagePlace(
            page_no=page_no, is_zero=False, needs_base=slot_bytes < columns.page_size, block=block,
            stored_offset=int(row["stored_offset"]), stored_bytes=int(row["stored_bytes"]),
            offset_in_block=start - int(row["raw_offset"]), slot_bytes=slot_bytes,
            checksum=checksum,
        )  # fmt: skip

    def positions(self, page_nos: PageNos) -> Positions:
        """Of each page in `self.page_nos`; -1 where the blob does not hold it."""
        mine = self._columns.page_nos
        found = np.searchsorted(mine, page_nos)
        hits = mine[np.minimum(found, len(mine) - 1)] == page_nos
        return np.where(hits, found, -1).astype(np.intp)

    def blocks_of(self, positions: Positions) -> Positions:
        """The block of each page; -1 for pages of zeros."""
        slots = self._columns.slots[positions]
        blocks = np.searchsorted(self._first_slots, slots, side="right").astype(np.intp) - 1
        blocks[slots == ZERO_SLOT] = -1
        return blocks

    def are_patches(self, positions: Positions) -> npt.NDArray[np.bool_]:
        """Which of the pages take the base's page to be read."""
        slots = self._columns.slots[positions]
        lengths = self._columns.slot_bytes
        if not len(lengths):
            return np.zeros(len(positions), dtype=np.bool_)
        known = np.where(slots == ZERO_SLOT, 0, slots)
        patches: npt.NDArray[np.bool_] = (lengths[known] < self.page_size) & (slots != ZERO_SLOT)
        return patches

    def positions_in(self, first: int, stop: int) -> Positions:
        """The pages whose slots lie in the blocks [first, stop), ascending."""
        slots = self._columns.slots
        begin = self._first_slots[first]
        inside = (slots >= begin) & (slots != ZERO_SLOT)
        if stop < len(self._first_slots):
            inside &= slots < self._first_slots[stop]
        return np.flatnonzero(inside)

    def block_range(self, first: int, stop: int) -> tuple[int, int]:
        """Offset and length in the blob of the blocks [first, stop)."""
        return stored_range(self.container, first, stop)

    @property
    def digests_block(self) -> int:
        """The number of the block that holds a digest per page."""
        return len(self.container.blocks) - 1

    def _position(self, page_no: int) -> int | None:
        mine = self._columns.page_nos
        place = int(np.searchsorted(mine, np.uint32(page_no)))
        return place if place < len(mine) and int(mine[place]) == page_no else None

    # --- unpacking ----------------------------------------------------------------------------

    def unpack_block(self, number: int, stored: bytes | memoryview) -> bytes | memoryview:
        """A block's raw bytes from its stored ones. Raises Damage."""
        row = self.container.blocks[number]
        view = memoryview(stored)
        if len(view) != int(row["stored_bytes"]):
            raise Damage("block is cut off", offset=int(row["stored_offset"]))
        if crc64(view) != int(row["crc64"]):
            raise Damage("block fails its checksum", offset=int(row["stored_offset"]))
        return self._decoder.decode(view, raw_bytes=int(row["raw_bytes"]))

    def unpack_page(
        self, stored: bytes | memoryview, place: PagePlace, base_page: bytes | None = None
    ) -> bytes:
        """The page from its stored block (nothing, for a page of zeros). `base_page` is the base
        blob's; a page that this does not hold is zeros. Raises Damage.
        """
        raw = b"" if place.is_zero else self.unpack_block(place.block, stored)
        return self.page(raw, place, base_page)

    def page(
        self, raw: bytes | memoryview, place: PagePlace, base_page: bytes | None = None
    ) -> bytes:
        """The page from its unpacked block. Raises Damage unless it is the page that was stored."""
        if place.is_zero:
            return bytes(self.page_size)
        slot = raw[place.offset_in_block : place.offset_in_block + place.slot_bytes]
        if place.needs_base:
            if base_page is None or len(base_page) != self.page_size:
                raise Damage(f"page {place.page_no} is a patch and its base is not at hand")
            page = apply_patch(slot, base_page)
        else:
            page = bytes(slot)
        if len(page) != self.page_size or crc64(page) != place.checksum:
            raise Damage(f"page {place.page_no} fails its checksum")
        return page

    def unpack_pages(
        self,
        positions: Positions,
        blocks: Mapping[int, bytes | memoryview],
        *,
        base_pages: Mapping[int, bytes | memoryview] | None = None,
    ) -> bytearray:
        """Many pages back to back, from their unpacked blocks by number; `base_pages` by page
        number where patches may be among them. Raises as `unpack_into` does.
        """
        size = self.page_size
        out = bytearray(len(positions) * size)
        if base_pages is not None:
            for row, page_no in enumerate(self.page_nos[positions].tolist()):
                if (page := base_pages.get(page_no)) is not None:
                    out[row * size : (row + 1) * size] = page
        pages = np.frombuffer(out, dtype=np.uint8).reshape(-1, size)
        rows = np.arange(len(positions), dtype=np.intp)
        self.unpack_into(pages, rows, positions, blocks, has_base=base_pages is not None)
        return out

    def unpack_into(
        self,
        out: Pages,
        rows: Positions,
        positions: Positions,
        blocks: Mapping[int, bytes | memoryview],
        *,
        has_base: bool,
    ) -> None:
        """Puts the pages at `positions` into `rows` of `out`, shape (any, page size), C-contiguous,
        from their unpacked blocks by number. With `has_base` the rows of patches hold the base's
        pages before. Whole pages were checked with their block, patched ones are by their own
        checksum. Raises Damage.
        """
        size, columns = self.page_size, self._columns
        slots = columns.slots[positions]
        zeros = slots == ZERO_SLOT
        if zeros.any():
            out[rows[zeros]] = 0
            rows, positions, slots = rows[~zeros], positions[~zeros], slots[~zeros]
        if len(slots) == 0:
            return
        numbers = self.blocks_of(positions)
        lengths = columns.slot_bytes[slots].astype(np.int64)
        starts = self._slot_ends[slots].astype(np.int64) - lengths
        starts -= self.container.blocks["raw_offset"][numbers].astype(np.int64)
        flat = out.data.cast("B")
        is_whole = lengths == size
        if is_whole.all() and (np.diff(slots) == 1).all() and (np.diff(rows) == 1).all():
            # One slot after the other, as in a base whose pages all differ: no gathering.
            at, end, skip = int(rows[0]) * size, (int(rows[-1]) + 1) * size, int(starts[0])
            for number in range(int(numbers[0]), int(numbers[-1]) + 1):
                piece = memoryview(blocks[number])[skip : skip + end - at]
                flat[at : at + len(piece)] = piece
                at, skip = at + len(piece), 0
            return
        whole = np.flatnonzero(is_whole)
        whole = whole[np.argsort(numbers[whole], kind="stable")]
        for part in np.split(whole, np.flatnonzero(np.diff(numbers[whole])) + 1):
            if len(part):
                raw = np.frombuffer(blocks[int(numbers[part[0]])], dtype=np.uint8)
                out[rows[part]] = sliding_window_view(raw, size)[starts[part]]
        patches = np.flatnonzero(~is_whole)
        if len(patches) == 0:
            return
        if not has_base:
            page_no = int(columns.page_nos[positions[patches[0]]])
            raise Damage(f"page {page_no} is a patch and its base is not at hand")
        views = {number: memoryview(blocks[number]) for number in set(numbers[patches].tolist())}
        for position, row, number, start, length in zip(
            *(each[patches].tolist() for each in (positions, rows, numbers, starts, lengths)),
            strict=True,
        ):
            here = flat[row * size : (row + 1) * size]
            here[:] = self._patched(position, views[number][start : start + length], here)

    def _patched(self, position: int, patch: memoryview, base_page: memoryview) -> bytes:
        page = apply_patch(patch, base_page)
        if crc64(page) != self._columns.checksums[position]:
            raise Damage(f"page {self._columns.page_nos[position]} fails its checksum")
        return page

    def unpack_digests(self, stored: bytes | memoryview) -> bytes:
        """`PAGE_DIGEST_BYTES` per page, in page order, from the stored digest block. Raises
        Damage.
        """
        return bytes(self.unpack_block(self.digests_block, stored))


def _check_columns(
    container: ContainerDirectory, columns: PageColumns, slot_ends: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint32]:
    """The first slot of each block of slots. Raises Damage where blocks and columns disagree."""
    blocks, pages, size = container.blocks, columns.page_nos, columns.page_size
    lengths, stored = columns.slot_bytes, columns.slots[columns.slots != ZERO_SLOT]
    data_blocks = blocks[:-1]
    starts = slot_ends - lengths
    first_slots = np.searchsorted(starts, data_blocks["raw_offset"]).astype(np.uint32)
    has_base = columns.base_sha256 != NO_BASE
    agrees = (
        len(pages) > 0
        and pages[0] > 0
        and bool((pages[1:] > pages[:-1]).all())
        and (int(pages[0]), int(pages[-1])) == (container.first_key, container.last_key)
        and (len(stored) == 0 or int(stored.max()) + 1 == len(lengths))
        and (len(stored) > 0 or len(lengths) == 0)
        and bool((lengths > 0).all())
        and bool((lengths <= size).all() if has_base else (lengths == size).all())
        and int(slot_ends[-1] if len(lengths) else 0) == int(blocks[-1]["raw_offset"])
        and int(blocks[-1]["raw_bytes"]) == PAGE_DIGEST_BYTES * len(pages)
        and bool((data_blocks["raw_bytes"] <= PAGE_BLOCK_BYTES).all())
        # Every block begins with a slot: then none reaches over its block's end.
        and bool(np.isin(data_blocks["raw_offset"], starts).all())
        and (container.header.kind is ContainerKind.DELTA or not has_base)
    )
    if not agrees:
        raise Damage("a page blob's places contradict its blocks")
    return first_slots
