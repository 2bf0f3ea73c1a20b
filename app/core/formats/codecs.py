"""Compression of single blocks: none, zstd, lz4.

A block is decompressed into exactly the size that its directory declares, and never into more:
what a frame says of itself is checked before anything is allocated. Every function may be called
from any thread.
"""

import threading
from enum import IntEnum
from typing import Literal, assert_never

import lz4.block
import zstandard

from app.core.formats.damage import Damage

CodecName = Literal["none", "zstd", "lz4"]

BLOCK_BYTES_MAX = (1 << 30) + (1 << 20)
"""No block is larger: the largest entry and what stands around it."""

ZSTD_LEVEL = 1
"""Level 3 saves another 6 % on JSON records and takes half as long again (330 and 220 MB/s): a
checkpoint is in a hurry, and each is written once by a service that has other things to do."""


class CodecCode(IntEnum):
    """As stored in a container."""

    NONE = 0
    ZSTD = 1
    LZ4 = 2


_CODES: dict[CodecName, CodecCode] = {
    "none": CodecCode.NONE,
    "zstd": CodecCode.ZSTD,
    "lz4": CodecCode.LZ4,
}


def codec_code(name: CodecName) -> CodecCode:
    return _CODES[name]


class _Contexts(threading.local):
    """zstd's contexts serve one thread at a time."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(
            level=ZSTD_LEVEL, write_checksum=False, write_content_size=True, write_dict_id=False
        )
        self.decompressor = zstandard.ZstdDecompressor()


_contexts = _Contexts()


def compress(codec: CodecCode, data: bytes | memoryview) -> bytes:
    """The same bytes for the same data, whatever was compressed before, with one build of a
    library; another version may give others.
    """
    match codec:
        case CodecCode.NONE:
            return bytes(data)
        case CodecCode.ZSTD:
            return _contexts.compressor.compress(data)
        case CodecCode.LZ4:
            packed: bytes = lz4.block.compress(data, store_size=False)
            return packed
        case _:
            assert_never(codec)


def decompress(codec: CodecCode, data: bytes | memoryview, *, raw_bytes: int) -> bytes:
    """Exactly `raw_bytes` bytes. Raises Damage for anything else."""
    if not 0 <= raw_bytes <= BLOCK_BYTES_MAX:
        raise Damage("a block of an impossible size")
    match codec:
        case CodecCode.NONE:
            raw = bytes(data)
        case CodecCode.ZSTD:
            raw = _decompress_zstd(data, raw_bytes)
        case CodecCode.LZ4:
            try:
                raw = lz4.block.decompress(data, uncompressed_size=raw_bytes)
            except (lz4.block.LZ4BlockError, ValueError) as error:
                raise Damage("a block that lz4 cannot decompress") from error
        case _:
            assert_never(codec)
    if len(raw) != raw_bytes:
        raise Damage(f"a block of {len(raw)} bytes instead of {raw_bytes}")
    return raw


def _decompress_zstd(data: bytes | memoryview, raw_bytes: int) -> bytes:
    try:
        # The library allocates what the frame promises, so the promise is looked at first.
        if zstandard.get_frame_parameters(data).content_size != raw_bytes:
            raise Damage("a zstd frame of another size than its block")
        return _contexts.decompressor.decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Damage("a block that zstd cannot decompress") from error
