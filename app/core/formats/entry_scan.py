"""A quick walk over the record entries of a segment, for reading and promoting.

It checks what `segment.check_entry` checks, without an object per field: entries of a hundred
bytes are common, and a 64 MiB segment holds half a million of them.
"""

import struct
from typing import NamedTuple

from app.core.formats.crc64 import crc64
from app.core.formats.damage import Damage
from app.core.formats.segment import (
    ENTRY_HEADER_BYTES,
    ENTRY_MAGIC,
    ENTRY_PAYLOAD_BYTES_MAX,
    VERSION,
    EntryType,
)

# magic, type, flags, version, first LSN, count, payload bytes; CRC at the end of the header
_FIELDS = struct.Struct("<4sBBHQII48xQ")
_RECORDS = int(EntryType.RECORDS)
_CHECKED_BYTES = ENTRY_HEADER_BYTES - 8
assert _FIELDS.size == ENTRY_HEADER_BYTES


class EntryPlace(NamedTuple):
    """An intact entry in the data that was scanned; its payload is `data[start:end]`."""

    first_lsn: int
    records: int
    flags: int
    start: int
    end: int


def scan_record_entries(data: bytes | memoryview, *, first_lsn: int) -> list[EntryPlace]:
    """The entries in `data`, which holds whole entries of records and nothing else, in order and
    without a hole from `first_lsn` on. Raises Damage if anything is not so.
    """
    places: list[EntryPlace] = []
    view = memoryview(data)
    unpack, place = _FIELDS.unpack_from, EntryPlace._make
    at, size, lsn = 0, len(view), first_lsn
    while at < size:
        start = at + ENTRY_HEADER_BYTES
        if start > size:
            raise Damage("entry header is cut off", offset=at)
        magic, kind, flags, version, entry_lsn, count, payload_bytes, stored = unpack(view, at)
        if magic != ENTRY_MAGIC or version != VERSION or kind != _RECORDS or flags > 15:
            raise Damage("no entry of records of a known version", offset=at)
        if payload_bytes > ENTRY_PAYLOAD_BYTES_MAX or count == 0:
            raise Damage("entry of an impossible size", offset=at)
        end = start + payload_bytes
        if end > size:
            raise Damage("entry payload is cut off", offset=at)
        if crc64(view[start:end], crc64(view[at : at + _CHECKED_BYTES])) != stored:
            raise Damage("entry fails its checksum", offset=at)
        if entry_lsn != lsn:
            raise Damage(f"entry begins at LSN {entry_lsn} instead of {lsn}", offset=at)
        places.append(place((entry_lsn, count, flags, start, end)))
        lsn += count
        at = end
    return places
