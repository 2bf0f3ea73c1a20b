"""Writes the entries of a run into the run's file, in order and in few calls.

Concurrency: one thread at a time. Crash: what is there of an entry is cut by recovery.
"""

import errno
from collections.abc import Sequence

from app.core.base import failpoints
from app.core.base.errors import InvariantViolation
from app.core.formats.segment import (
    NO_HASH,
    EntryFlag,
    EntryHeader,
    SegmentHeader,
    pack_entry_header,
    pack_segment_header,
)
from app.core.stores.wal.disk import Buffer, Disk
from app.core.stores.wal.planning import PlacedEntry, Run

PIECES_MAX = 1024  # IOV_MAX
BATCH_BYTES_MAX = 4 * 1024 * 1024  # of payload held in memory at once


class RunWriter:
    """`fd` stays the caller's. `header` begins the file of a run that creates its segment."""

    def __init__(
        self,
        disk: Disk,
        fd: int,
        run: Run,
        *,
        header: SegmentHeader | None,
        durable_lsn: int,
        now_us: int,
    ) -> None:
        self.fd = fd
        self.run = run
        self._disk = disk
        self._durable_lsn = durable_lsn
        self._now_us = now_us
        self._written = 0
        self._pieces: list[Buffer] = []
        self._pending_bytes = 0
        self._offset = run.offset
        if header is not None:
            self._offset = 0
            self._pieces.append(pack_segment_header(header))
            self._pending_bytes = len(self._pieces[0])

    @property
    def is_done(self) -> bool:
        return self._written == len(self.run.entries)

    def write_blocking(self, stop: int | None = None) -> None:
        """The entries before the `stop`th that are not written yet; all of them by default. Raises
        OSError, InvariantViolation.
        """
        entries = self.run.entries
        for entry in entries[self._written : stop]:
            payload = entry.payload.load_blocking()
            self._pieces += (self._head_of(entry, payload), payload)
            self._pending_bytes += len(self._pieces[-2]) + len(payload)
            self._written += 1
            if self._pending_bytes >= BATCH_BYTES_MAX or len(self._pieces) > PIECES_MAX - 2:
                self._flush()
        if self._pieces:
            self._flush()
        if self.is_done:
            assert self._offset == self.run.marks.entries_end

    def _head_of(self, entry: PlacedEntry, payload: Buffer) -> bytes:
        if len(payload) != entry.payload.payload_bytes:
            raise InvariantViolation(
                "An entry's payload is not as long as announced.",
                announced=entry.payload.payload_bytes, loaded=len(payload),
            )  # fmt: skip
        head = EntryHeader(
            type=entry.type, flags=EntryFlag(entry.flags), first_lsn=entry.first_lsn,
            count=entry.payload.count, payload_bytes=len(payload),
            durable_lsn=self._durable_lsn, appended_at_us=self._now_us,
            key_hash=entry.key_hash or NO_HASH,
            body_hash=entry.body_hash if entry.body_hash and entry.key_hash else NO_HASH,
        )  # fmt: skip
        return pack_entry_header(head, (payload,))

    def _flush(self) -> None:
        pieces, offset = self._pieces, self._offset
        if failpoints.armed():
            data = b"".join(pieces)
            half = len(data) // 2
            write_all(self._disk, self.fd, [data[:half]], offset)
            failpoints.fp("wal.mid_write")
            pieces, offset = [data[half:]], offset + half
        write_all(self._disk, self.fd, pieces, offset)
        self._offset += self._pending_bytes
        self._pieces, self._pending_bytes = [], 0


def write_all(disk: Disk, fd: int, pieces: Sequence[Buffer], offset: int) -> None:
    """Completes short writes."""
    left = list(pieces)
    while left:
        count = disk.write(fd, left[:PIECES_MAX], offset)
        offset += count
        done = 0
        while done < len(left) and count >= len(left[done]):
            count -= len(left[done])
            done += 1
        del left[:done]
        if count:
            left[0] = memoryview(left[0])[count:]
        elif not done:
            raise OSError(errno.EIO, "a write wrote nothing")
