"""How single pages and blocks of pages are encoded: digests, patches, blocks, dictionaries.

A *patch* is one zstd frame without magic, made with the base blob's page as raw-content prefix
(docs/adr/0008-delta-encoding.md says what was measured). A *dictionary* is trained from a blob's
own pages: blocks of 64 KiB are too short to learn a database's vocabulary by themselves.

Every function may be called from any thread. Equal input gives equal bytes with one build of the
library; another version may give others.
"""

import hashlib
import struct
import threading
from collections.abc import Sequence
from itertools import pairwise

import lz4.block
import numpy as np
import numpy.typing as npt
import zstandard

from app.core.formats.codecs import CodecCode, compress, decompress
from app.core.formats.crc64 import crc64
from app.core.formats.damage import Damage

PAGE_BLOCK_BYTES = 64 * 1024
"""Raw, and of pages: what reading one page costs at most."""
PAGE_DIGEST_BYTES = 16
"""SHA-256 cut to 128 bits: as good as any against chance, 2^64 work against intent, and with the
CPU's own instructions twice as fast here as BLAKE2b (1.3 and 0.8 GB/s over 4 KiB pages)."""

PAGE_ZSTD_LEVEL = 2
"""With a dictionary 0.54 of a 256 MiB database; level 1 gives 0.65 in two thirds of the time, and
level 3 the same size in twice the time (docs/adr/0008-delta-encoding.md)."""
_HASH_LOG, _MIN_MATCH = 14, 6
"""Level 2 has 15 and 5 for blocks of this size. The table is set up anew for each block; one half
as large takes a fifth off the time for 2 % of the size."""
PATCH_ZSTD_LEVEL = 1
"""Higher levels save under 5 % of a patch and take up to ten times as long."""

DICTIONARY_BYTES = 64 * 1024
DICTIONARY_FROM_BYTES = 4 * 1024 * 1024
"""A blob with fewer bytes of pages does without: the dictionary would cost what it saves."""
_DICTIONARY_SAMPLES = 512
_TRAINING = {"k": 512, "d": 8, "f": 18, "accel": 5}
"""A smaller table of frequencies, every fifth segment: a fifth of the time for 0.4 % more bytes."""

_PIECE_BYTES = 2032
_HASHED_IN_PIECES_MAX = 16 * 1024
"""hashlib gives up the interpreter's lock for 2 KiB and more. Where several threads hash pages,
that takes three times the hash's own time; in pieces below that it takes none."""

Digests = npt.NDArray[np.void]
DIGEST = np.dtype(f"V{PAGE_DIGEST_BYTES}")


def page_digest(page: bytes | memoryview) -> bytes:
    return hashlib.sha256(page).digest()[:PAGE_DIGEST_BYTES]


def page_digests(data: memoryview, *, page_size: int) -> list[bytes]:
    """Of each page of a run."""
    sha256, cut = hashlib.sha256, PAGE_DIGEST_BYTES
    if page_size > _HASHED_IN_PIECES_MAX:
        return [
            sha256(data[at : at + page_size]).digest()[:cut]
            for at in range(0, len(data), page_size)
        ]
    edges = [*range(0, page_size, _PIECE_BYTES), page_size]
    (_, head), *rest = pairwise(edges)
    digests: list[bytes] = []
    for at in range(0, len(data), page_size):
        page = data[at : at + page_size]
        hashed = sha256(page[:head])
        for start, stop in rest:
            hashed.update(page[start:stop])
        digests.append(hashed.digest()[:cut])
    return digests


def page_checksums(data: memoryview, *, page_size: int) -> list[int]:
    return [crc64(data[at : at + page_size]) for at in range(0, len(data), page_size)]


# --- patches ----------------------------------------------------------------------------------


_MAGIC = struct.pack("<I", 0xFD2FB528)
_PLAIN_HEADER = 0x00
"""The first byte of a frame's header that says no size, checksum or dictionary, but a window, in
the second byte (RFC 8878, 3.1.1.1)."""
_SIZED_HEADER = b"\xa0"
"""The same for a frame in one segment whose size follows, in four bytes."""
_RAW_LAST_BLOCK = 1


class _Contexts(threading.local):
    def __init__(self) -> None:
        self.parameters: dict[int, zstandard.ZstdCompressionParameters] = {}
        self.reader = zstandard.ZstdDecompressor()


_contexts = _Contexts()


def make_patch(page: bytes, base_page: bytes) -> bytes:
    """What turns `base_page` into `page`; both of one size."""
    size = len(page)
    parameters = _contexts.parameters.get(size)
    if parameters is None:
        parameters = zstandard.ZstdCompressionParameters.from_level(
            PATCH_ZSTD_LEVEL,
            source_size=size,
            dict_size=size,
            write_checksum=False,
            write_content_size=False,
            write_dict_id=False,
            format=zstandard.FORMAT_ZSTD1_MAGICLESS,
        )
        _contexts.parameters[size] = parameters
    prefix = zstandard.ZstdCompressionDict(base_page, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    return zstandard.ZstdCompressor(dict_data=prefix, compression_params=parameters).compress(page)


def apply_patch(patch: bytes | memoryview, base_page: bytes | memoryview) -> bytes:
    """The page, not yet checked against its checksum. Raises Damage."""
    size = len(base_page)
    try:
        if len(patch) > 2 and patch[0] == _PLAIN_HEADER:
            page = _after(base_page, patch)
        else:
            page = _with_prefix(base_page, patch)
    except zstandard.ZstdError as error:
        raise Damage("a page's patch does not fit its base") from error
    if len(page) != size:
        raise Damage(f"a patch makes {len(page)} bytes of a page of {size}")
    return page


def _after(base_page: bytes | memoryview, patch: bytes | memoryview) -> bytes:
    """As `_with_prefix`, by a context that is kept: on virtual machines, where zstd's question for
    the CPU's features leaves the guest, making one takes ten times as long as using it. The library
    lends a kept context another prefix only for a chain of frames each of which is the next one's:
    so the base's page becomes a frame, stored, and the patch one that tells its size.
    """
    size = len(base_page)
    header = _MAGIC + _SIZED_HEADER + size.to_bytes(4, "little")
    block = (size << 3 | _RAW_LAST_BLOCK).to_bytes(3, "little")
    return _contexts.reader.decompress_content_dict_chain(
        [b"".join((header, block, base_page)), header + patch[2:]]
    )


def _with_prefix(base_page: bytes | memoryview, patch: bytes | memoryview) -> bytes:
    magicless = zstandard.FORMAT_ZSTD1_MAGICLESS
    told_bytes = zstandard.get_frame_parameters(patch, format=magicless).content_size
    if told_bytes not in (zstandard.CONTENTSIZE_UNKNOWN, len(base_page)):
        raise Damage("a patch of another size than its page")  # it would be allocated
    prefix = zstandard.ZstdCompressionDict(base_page, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    reader = zstandard.ZstdDecompressor(dict_data=prefix, format=magicless)
    return reader.decompress(patch, max_output_size=len(base_page), allow_extra_data=False)


# --- blocks -----------------------------------------------------------------------------------


def train_dictionary(data: memoryview, *, page_size: int) -> bytes:
    """From pages spread evenly over `data`; empty where nothing can be learned from them."""
    pages = len(data) // page_size
    stride = max(1, pages // _DICTIONARY_SAMPLES)
    samples: list[bytes | bytearray | memoryview[int]] = [
        bytes(data[at * page_size : (at + 1) * page_size]) for at in range(0, pages, stride)
    ]
    try:
        trained = zstandard.train_dictionary(
            DICTIONARY_BYTES, samples, level=PAGE_ZSTD_LEVEL, **_TRAINING
        )
    except zstandard.ZstdError:  # too few samples, or all the same
        return b""
    return trained.as_bytes()


class BlockEncoder:
    """Compresses the blocks of one blob, several at once. Belongs to one thread at a time."""

    def __init__(self, codec: CodecCode, *, dictionary: bytes = b"", threads: int = 1) -> None:
        self._codec = codec
        self._threads = threads
        self._zstd: zstandard.ZstdCompressor | None = None
        if codec is CodecCode.ZSTD:
            self._zstd = _compressor(dictionary)

    def encode(self, raw: memoryview, lengths: Sequence[int]) -> list[bytes | memoryview]:
        """The blocks of these lengths, back to back in `raw`; raw where that is no longer."""
        ends = np.cumsum(np.asarray(lengths, dtype=np.uint64))
        starts = ends - np.asarray(lengths, dtype=np.uint64)
        pieces = [raw[int(a) : int(b)] for a, b in zip(starts, ends, strict=True)]
        packed: Sequence[bytes | memoryview]
        if self._zstd is not None:
            segments = np.column_stack([starts, ends - starts]).astype("<u8")
            buffers = self._zstd.multi_compress_to_buffer(
                zstandard.BufferWithSegments(raw[: int(ends[-1])], segments.tobytes()),
                threads=self._threads,
            )
            packed = [buffers[number].tobytes() for number in range(len(pieces))]
        elif self._codec is CodecCode.LZ4:
            packed = [lz4.block.compress(piece, store_size=False) for piece in pieces]
        else:
            packed = pieces
        return [
            small if len(small) < len(piece) else piece
            for small, piece in zip(packed, pieces, strict=True)
        ]


class BlockDecoder:
    """Decompresses the blocks of one blob, from any thread."""

    def __init__(self, codec: CodecCode, *, dictionary: bytes = b"") -> None:
        self._codec = codec
        self._dictionary = _compression_dictionary(dictionary)
        self._idle: list[zstandard.ZstdDecompressor] = []  # a context serves one thread at a time

    def decode(self, stored: memoryview, *, raw_bytes: int) -> bytes | memoryview:
        """Raises Damage unless it comes to exactly `raw_bytes` bytes."""
        if len(stored) == raw_bytes:
            return stored
        if self._dictionary is None:
            return decompress(self._codec, stored, raw_bytes=raw_bytes)
        try:
            if zstandard.get_frame_parameters(stored).content_size != raw_bytes:
                raise Damage("a zstd frame of another size than its block")
            reader = self._reader()
            raw = reader.decompress(stored, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise Damage("a block that zstd cannot decompress") from error
        self._idle.append(reader)
        return raw

    def _reader(self) -> zstandard.ZstdDecompressor:
        """An idle one, or a new one."""
        try:
            return self._idle.pop()
        except IndexError:
            assert self._dictionary is not None
            return zstandard.ZstdDecompressor(dict_data=self._dictionary)


def _compressor(dictionary: bytes) -> zstandard.ZstdCompressor:
    learned = _compression_dictionary(dictionary)
    if learned is None:
        return zstandard.ZstdCompressor(
            level=PAGE_ZSTD_LEVEL, write_checksum=False, write_content_size=True
        )
    parameters = zstandard.ZstdCompressionParameters.from_level(
        PAGE_ZSTD_LEVEL,
        source_size=PAGE_BLOCK_BYTES,
        dict_size=len(dictionary),
        hash_log=_HASH_LOG,
        min_match=_MIN_MATCH,
        write_checksum=False,
        write_content_size=True,
        write_dict_id=False,
    )
    learned.precompute_compress(compression_params=parameters)
    return zstandard.ZstdCompressor(dict_data=learned, compression_params=parameters)


def _compression_dictionary(data: bytes) -> zstandard.ZstdCompressionDict | None:
    return zstandard.ZstdCompressionDict(data) if data else None


def pack_columns(columns: bytes) -> bytes:
    """A directory's columns, smaller; always zstd, whatever the blob's codec."""
    return compress(CodecCode.ZSTD, columns)


def unpack_columns(packed: bytes | memoryview, *, raw_bytes: int) -> bytes:
    """Raises Damage."""
    return decompress(CodecCode.ZSTD, packed, raw_bytes=raw_bytes)
