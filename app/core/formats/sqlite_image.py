"""The header of a SQLite database file, as far as a page store has to understand it.

https://www.sqlite.org/fileformat2.html, "The Database Header". The page count in the header holds
only where change counter and version-valid-for agree; very old writers leave it stale.
"""

import struct
from dataclasses import dataclass

from app.core.formats.damage import Damage
from app.core.formats.sqlite_wal import PAGE_SIZES

IMAGE_HEADER_BYTES = 100
MAGIC = b"SQLite format 3\0"
PAGE_COUNT_MAX = 0xFFFFFFFE
USABLE_BYTES_MIN = 480

_HEAD = struct.Struct(">16sH6BII")  # magic … change counter, page count
_VERSION_VALID_FOR = struct.Struct(">92xI")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageHeader:
    page_size: int
    page_count: int | None  # None where the header's own does not hold


def parse_image_header(head: bytes | memoryview) -> ImageHeader:
    """From the file's first 100 bytes. Raises Damage unless SQLite could open such a file."""
    if len(head) < IMAGE_HEADER_BYTES:
        raise Damage(f"a SQLite file has at least {IMAGE_HEADER_BYTES} bytes", offset=len(head))
    magic, page_size, write, read, reserved, *fractions, changes, count = _HEAD.unpack_from(head)
    if magic != MAGIC:
        raise Damage("not a SQLite database file", offset=0)
    if page_size == 1:  # 65536 does not fit the field
        page_size = 65536
    if page_size not in PAGE_SIZES:
        raise Damage(f"the page size {page_size} is no power of two from 512 to 65536", offset=16)
    if write not in (1, 2) or read not in (1, 2):
        raise Damage(f"the file format versions {write} and {read} are unknown", offset=18)
    if page_size - reserved < USABLE_BYTES_MIN:
        raise Damage(f"{reserved} reserved bytes leave too little of a page", offset=20)
    if fractions != [64, 32, 32]:
        raise Damage("the payload fractions are not 64, 32 and 32", offset=21)
    (valid_for,) = _VERSION_VALID_FOR.unpack_from(head)
    return ImageHeader(
        page_size=page_size,
        page_count=count if count and changes == valid_for else None,
    )


def image_page_count(header: ImageHeader, *, image_bytes: int) -> int:
    """The pages of a file of that size. Raises Damage where its header says otherwise."""
    count, rest = divmod(image_bytes, header.page_size)
    if rest:
        raise Damage(
            f"{image_bytes} bytes are not a whole number of {header.page_size}-byte pages",
            offset=image_bytes - rest,
        )
    if header.page_count is not None and header.page_count != count:
        raise Damage(
            f"the header counts {header.page_count} pages, the file has {count}", offset=28
        )
    if not 0 < count <= PAGE_COUNT_MAX:
        raise Damage(f"a SQLite file cannot have {count} pages")
    return count
