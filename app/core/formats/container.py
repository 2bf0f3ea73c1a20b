"""Byte layout of the container `BOPC`, version 1. All little-endian.

    header (64 bytes) · blocks, one after the other · block table · places · trailer (96 bytes)

What comes after the blocks is the directory: the blob's end, which a reader fetches first. A
block is compressed on its own; stored as long as raw, it is not compressed (so a container is
never much larger than what it holds). The block table has 40 bytes per block: raw offset, stored
offset, raw bytes, stored bytes, first key, CRC-64/NVME of the stored bytes. One CRC covers the
whole directory, and header and trailer both say whose blob it is, so that one object in the place
of another is noticed.

LOG holds a sealed WAL segment of records, byte for byte. Blocks are cut at points of its sparse
index and hold whole entries; the first also holds the segment header. A block's key is its first
LSN; the last block is the segment's own index and trailer, its key the LSN after the last one.

PAGES and DELTA hold pages (`page_blob.py`). Their keys are page numbers, `part_id` is the delta's
id, and `places` says where in a block each page lies; for LOG there are none.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from app.core.formats.codecs import BLOCK_BYTES_MAX, CodecCode, decompress
from app.core.formats.crc64 import crc64
from app.core.formats.damage import Damage

VERSION = 1
MAGIC = b"BOPC"
TRAILER_MAGIC = b"BOPCEND\x01"

_HEADER = struct.Struct("<4sHBB8xQQQQQQ")
_TRAILER = struct.Struct("<8sHBBIQQQQQQQQIIQ")
_CRC = struct.Struct("<Q")

CONTAINER_HEADER_BYTES = _HEADER.size
CONTAINER_TRAILER_BYTES = _TRAILER.size
BLOCK_ROW_BYTES = 40

assert (CONTAINER_HEADER_BYTES, CONTAINER_TRAILER_BYTES) == (64, 96)

BLOCK_ROW = np.dtype(
    [
        ("raw_offset", "<u8"),
        ("stored_offset", "<u8"),
        ("raw_bytes", "<u4"),
        ("stored_bytes", "<u4"),
        ("first_key", "<u8"),
        ("crc64", "<u8"),
    ]
)
assert BLOCK_ROW.itemsize == BLOCK_ROW_BYTES

BlockTable = npt.NDArray[np.void]


class ContainerKind(IntEnum):
    LOG = 1
    PAGES = 2
    DELTA = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LogIdentity:
    """Whose blob it is. `generation` is the one that the blob was made for."""

    db_id: int
    chunk_id: int
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerHeader:
    kind: ContainerKind
    codec: CodecCode
    identity: LogIdentity
    part_id: int
    raw_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerDirectory:
    """A container's end, checked. `directory_offset` is where its blocks end."""

    header: ContainerHeader
    first_key: int
    last_key: int
    directory_offset: int
    blocks: BlockTable
    places: bytes

    @property
    def directory_bytes(self) -> int:
        return self.blocks.nbytes + len(self.places) + CONTAINER_TRAILER_BYTES

    @property
    def container_bytes(self) -> int:
        return self.directory_offset + self.directory_bytes


def pack_container_header(header: ContainerHeader) -> bytes:
    who = header.identity
    head = _HEADER.pack(
        MAGIC, VERSION, header.kind, header.codec,
        who.db_id, who.chunk_id, who.generation, header.part_id, header.raw_bytes, 0,
    )[:-8]  # fmt: skip
    return head + _CRC.pack(crc64(head))


def parse_container_header(data: bytes | memoryview) -> ContainerHeader:
    """Raises Damage unless `data` begins with a whole, intact container header."""
    if len(data) < CONTAINER_HEADER_BYTES:
        raise Damage("container header is cut off", offset=0)
    magic, version, kind, codec, db_id, chunk_id, generation, part_id, raw_bytes, stored = (
        _HEADER.unpack_from(data)
    )
    if magic != MAGIC or version != VERSION:
        raise Damage("not a container of a known version", offset=0)
    if crc64(memoryview(data)[: CONTAINER_HEADER_BYTES - 8]) != stored:
        raise Damage("container header fails its checksum", offset=0)
    return ContainerHeader(
        kind=_kind(kind), codec=_codec(codec), part_id=part_id, raw_bytes=raw_bytes,
        identity=LogIdentity(db_id=db_id, chunk_id=chunk_id, generation=generation),
    )  # fmt: skip


def pack_container_directory(directory: ContainerDirectory) -> bytes:
    header, who = directory.header, directory.header.identity
    body = directory.blocks.tobytes() + directory.places
    head = _TRAILER.pack(
        TRAILER_MAGIC, VERSION, header.kind, header.codec, len(directory.blocks),
        who.db_id, who.chunk_id, who.generation, header.part_id, header.raw_bytes,
        directory.first_key, directory.last_key, directory.directory_offset,
        len(directory.places), 0, 0,
    )[:-8]  # fmt: skip
    return body + head + _CRC.pack(crc64(head, crc64(body)))


def parse_container_directory(data: bytes | memoryview) -> ContainerDirectory:
    """The directory that is all of `data`. Raises Damage unless it is intact and its blocks
    follow one another, raw and stored, from the header to the directory.
    """
    end = len(data) - CONTAINER_TRAILER_BYTES
    if end < 0:
        raise Damage("container trailer is cut off")
    fields = _TRAILER.unpack_from(data, end)
    magic, version, kind, codec, block_count, db_id, chunk_id, generation = fields[:8]
    part_id, raw_bytes, first_key, last_key, offset, places_bytes, _, stored = fields[8:]
    if magic != TRAILER_MAGIC or version != VERSION:
        raise Damage("not the end of a container of a known version")
    table_bytes = block_count * BLOCK_ROW_BYTES
    if table_bytes + places_bytes != end:
        raise Damage("container directory is not as long as it says")
    view = memoryview(data)
    if crc64(view[: len(data) - 8]) != stored:
        raise Damage("container directory fails its checksum")
    # Copied, so that a directory kept in memory keeps nothing else alive.
    blocks = np.frombuffer(bytes(view[:table_bytes]), dtype=BLOCK_ROW)
    directory = ContainerDirectory(
        header=ContainerHeader(
            kind=_kind(kind), codec=_codec(codec), part_id=part_id, raw_bytes=raw_bytes,
            identity=LogIdentity(db_id=db_id, chunk_id=chunk_id, generation=generation),
        ),
        first_key=first_key, last_key=last_key, directory_offset=offset,
        blocks=blocks, places=bytes(view[table_bytes:end]),
    )  # fmt: skip
    _check_blocks(directory)
    return directory


def _check_blocks(directory: ContainerDirectory) -> None:
    blocks = directory.blocks
    raw, stored = blocks["raw_bytes"].astype(np.uint64), blocks["stored_bytes"].astype(np.uint64)
    raw_ends = np.cumsum(raw)
    stored_ends = np.cumsum(stored) + np.uint64(CONTAINER_HEADER_BYTES)
    keys = blocks["first_key"]
    in_order = (
        len(blocks) > 0
        and np.array_equal(blocks["raw_offset"], raw_ends - raw)
        and np.array_equal(blocks["stored_offset"], stored_ends - stored)
        and int(raw_ends[-1]) == directory.header.raw_bytes
        and int(stored_ends[-1]) == directory.directory_offset
        and bool((raw > 0).all())
        and bool((stored > 0).all())
        and bool((stored <= raw).all())
        and int(raw.max()) <= BLOCK_BYTES_MAX
        and bool((keys[:-1] <= keys[1:]).all())
    )
    if not in_order:
        raise Damage("container directory contradicts itself")


def _kind(code: int) -> ContainerKind:
    try:
        return ContainerKind(code)
    except ValueError as error:
        raise Damage("container of an unknown kind") from error


def _codec(code: int) -> CodecCode:
    try:
        return CodecCode(code)
    except ValueError as error:
        raise Damage("container of an unknown codec") from error


def stored_range(directory: ContainerDirectory, first: int, stop: int) -> tuple[int, int]:
    """Offset and length of the blocks [first, stop) as they are stored; not empty."""
    begin, last = directory.blocks[first], directory.blocks[stop - 1]
    offset = int(begin["stored_offset"])
    return offset, int(last["stored_offset"]) + int(last["stored_bytes"]) - offset


def unpack_blocks(
    directory: ContainerDirectory, first: int, stop: int, stored: bytes | memoryview
) -> Iterator[bytes | memoryview]:
    """The raw bytes of each block of [first, stop), from the bytes of their `stored_range`.
    Raises Damage.
    """
    view = memoryview(stored)
    codec, at = directory.header.codec, 0
    for row in directory.blocks[first:stop]:
        stored_bytes, raw_bytes = int(row["stored_bytes"]), int(row["raw_bytes"])
        piece = view[at : at + stored_bytes]
        if len(piece) != stored_bytes:
            raise Damage("block is cut off", offset=int(row["stored_offset"]))
        if crc64(piece) != int(row["crc64"]):
            raise Damage("block fails its checksum", offset=int(row["stored_offset"]))
        if stored_bytes == raw_bytes:
            yield piece
        else:
            yield decompress(codec, piece, raw_bytes=raw_bytes)
        at += stored_bytes
    if at != len(view):
        raise Damage("more bytes than the blocks have")


def directory_offset_of(trailer: bytes | memoryview) -> int:
    """Where the directory begins, says the last part of a container of which nothing is known yet.
    Raises Damage if that is no trailer; what it says is checked by `parse_container_directory`.
    """
    if len(trailer) != CONTAINER_TRAILER_BYTES or bytes(trailer[:8]) != TRAILER_MAGIC:
        raise Damage("not the end of a container of a known version")
    offset: int = _TRAILER.unpack(trailer)[12]
    return offset
