"""What callers append, and what they are told."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from app.core.base.errors import InvariantViolation
from app.core.formats.frame_run import FrameFooter
from app.core.formats.segment import ENTRY_HEADER_BYTES, ENTRY_PAYLOAD_BYTES_MAX, EntryType
from app.core.formats.sqlite_wal import Words

UNIT_BYTES_MIN = 4
"""No record or frame takes fewer bytes of payload: this bounds the LSNs of a segment."""


class EntryPayload(Protocol):
    """Whole records or frames: in memory, or a slice of a spool file."""

    @property
    def count(self) -> int: ...

    @property
    def line_safe(self) -> bool: ...

    @property
    def payload_bytes(self) -> int: ...

    def load_blocking(self) -> bytes | memoryview:
        """Called once, when it is written, by a writer thread."""
        ...


class FramesPayload(EntryPayload, Protocol):
    """Of a libsql database. The last entry of a request has the footer."""

    @property
    def page_nos(self) -> Words: ...

    @property
    def commit_sizes(self) -> Words: ...

    @property
    def footer(self) -> FrameFooter | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LastRequest:
    """Where the newest request in a libsql database's WAL left it."""

    last_lsn: int
    footer: FrameFooter


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPayload:
    payload: bytes
    count: int
    line_safe: bool

    @property
    def payload_bytes(self) -> int:
        return len(self.payload)

    def load_blocking(self) -> bytes:
        return self.payload


@dataclass(frozen=True, slots=True, kw_only=True)
class AppendRequest:
    """All or nothing. With a key, the same append again is answered with the first's answer."""

    entries: Sequence[EntryPayload]
    entry_type: EntryType = EntryType.RECORDS
    expected_next_lsn: int | None = None
    key_hash: bytes | None = None
    body_hash: bytes | None = None

    def check(self) -> int:
        """The payload's bytes. Raises InvariantViolation on what no caller may send."""
        total = 0
        for entry in self.entries:
            size = entry.payload_bytes
            if not 0 < entry.count * UNIT_BYTES_MIN <= size <= ENTRY_PAYLOAD_BYTES_MAX:
                raise InvariantViolation(
                    "An entry of an impossible size.", count=entry.count, payload_bytes=size
                )
            total += size
        if total == 0:
            raise InvariantViolation("An append without entries.")
        if self.key_hash is not None and not (
            len(self.key_hash) == 16 and self.body_hash is not None and len(self.body_hash) == 16
        ):
            raise InvariantViolation("The hashes of a keyed append are 16 bytes each.")
        return total


def write_bytes_of(request: AppendRequest, *, payload_bytes: int) -> int:
    """What it will take of a segment's file; headers of new segments and trailers come on top."""
    return payload_bytes + ENTRY_HEADER_BYTES * len(request.entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class Appended:
    first_lsn: int
    last_lsn: int
    count: int
    payload_bytes: int
    replayed: bool = False
