"""Verifies the frames of a WAL body that arrives in pieces of any size. A pure state machine.

What stops it, as SQLite's own recovery and a little beyond: frames with other salts are what an
older log left behind; a checksum that fails is a torn write. SQLite stops there too, but a commit
frame further on that links to the frame before it proves the log was whole once and was damaged.
"""

import struct
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from app.core.formats.sqlite_wal import (
    ORDERS,
    Flags,
    FrameRun,
    WalPosition,
    Words,
    frame_bytes,
    from_big_endian,
    linked,
)

BLOCK_BYTES = 1 << 20
"""What is verified at once: large enough for numpy, small enough for a CPU's cache."""

_SALTS_AND_CHECKSUM = struct.Struct(">4I")


class ScanEnd(Enum):
    WHOLE = "whole"  # every byte belongs to a verified frame
    LOG_ENDED = "log_ended"  # frames of an older log follow
    TORN = "torn"  # a cut-off frame, or a failed checksum that nothing committed builds on
    INVALID = "invalid"  # a failed checksum, and a commit frame that builds on it
    GAP = "gap"  # the body does not continue the position it was said to


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanResult:
    end: ScanEnd
    frame: int  # number, from 1, of the first frame that was not verified
    position: WalPosition  # after the last commit frame, or where the scan began
    frames: int  # new ones up to there
    commits: int
    page_count: int | None  # of the last commit; None without one


class WalScanner:
    """Verifies the frames of a body that arrives in pieces of any size; does no I/O.

    `position` is where the verified part of the log ends, `skip_bytes` how much of the body lies
    before it: the header, or frames that are stored already, whose last one must then be the
    position's own. With `must_continue` the first frame has to link to the position, or the scan
    ends in a gap. Holds one block of frames, whatever the size of the body.

    After INVALID or GAP nothing of the body may be kept, though runs were handed out.
    """

    def __init__(
        self,
        position: WalPosition,
        *,
        skip_bytes: int = 0,
        must_continue: bool = False,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self._frame_bytes = frame_bytes(position.page_size)
        self._block_frames = max(1, block_bytes // self._frame_bytes)
        self._block = bytearray()
        self._committed = position
        self._tail = (position.checksum1, position.checksum2)  # stored in the last frame seen
        self._order = position.order
        salts = np.array(position.salts, dtype=">u4")
        self._raw_salts = salts.view("<u4").astype(np.uint32)
        self._skip_bytes = skip_bytes
        self._seam_at = skip_bytes - self._frame_bytes + 8  # salts and checksum of the frame there
        self._seam = bytearray()
        self._read_bytes = 0
        self._must_continue = must_continue
        self._seen = 0  # whole frames looked at, verified or not
        self._verified = 0
        self._frames = 0
        self._commits = 0
        self._page_count: int | None = None
        self._broken = False  # a checksum failed: from here on only a commit can matter
        self._end: ScanEnd | None = None

    def __repr__(self) -> str:
        end = self._end.value if self._end else "broken" if self._broken else "scanning"
        return f"<WalScanner {end} frames={self._verified} committed={self._committed.offset}>"

    @property
    def ended(self) -> bool:
        """Nothing that follows can change the result: the rest of the body need not be fed."""
        return self._end is not None

    def feed(self, piece: bytes | bytearray | memoryview) -> list[FrameRun]:
        """The runs this piece completed; each owns its bytes."""
        view = memoryview(piece).cast("B")
        view = view[self._skip(view) :]
        runs: list[FrameRun] = []
        size = self._block_frames * self._frame_bytes
        while len(view) and not self.ended:
            taken = view[: size - len(self._block)]
            self._block += taken
            view = view[len(taken) :]
            if len(self._block) == size:
                self._verify(self._take_block(), runs)
        return runs

    def finish(self) -> tuple[list[FrameRun], ScanResult]:
        """The body is complete: the last runs, and what the scan came to."""
        runs: list[FrameRun] = []
        cut_off = False
        if not self.ended:
            cut_off = len(self._block) % self._frame_bytes != 0
            self._verify(self._take_block(), runs)
        end = self._end or (ScanEnd.TORN if self._broken or cut_off else ScanEnd.WHOLE)
        self._end = end
        return runs, ScanResult(
            end=end,
            frame=self._first_frame + self._verified,
            position=self._committed,
            frames=self._frames,
            commits=self._commits,
            page_count=self._page_count,
        )

    @property
    def _first_frame(self) -> int:
        return self._committed.frames - self._frames + 1

    def _take_block(self) -> bytearray:
        block, self._block = self._block, bytearray()
        return block

    def _skip(self, view: memoryview) -> int:
        """How much of `view` is stored already; ends the scan where that is not what is here."""
        begin = self._read_bytes
        self._read_bytes += len(view)
        if begin >= self._skip_bytes:
            return 0
        if self._seam_at >= 0:
            start = max(self._seam_at - begin, 0)
            self._seam += view[start : max(self._seam_at + _SALTS_AND_CHECKSUM.size - begin, 0)]
            if self._read_bytes >= self._skip_bytes:
                expected = _SALTS_AND_CHECKSUM.pack(*self._committed.salts, *self._tail)
                if self._seam != expected:
                    self._end = ScanEnd.GAP
        return self._skip_bytes - begin

    def _verify(self, block: bytearray, runs: list[FrameRun]) -> None:
        """Adds the frames of `block` before the first that fails, as a run."""
        count = len(block) // self._frame_bytes
        if count == 0:
            return
        words = np.frombuffer(block, dtype="<u4", count=count * self._frame_bytes // 4)
        rows = words.reshape(count, -1)
        live = _leading((rows[:, 2:4] == self._raw_salts).all(axis=1))
        page_nos, commit_sizes = from_big_endian(rows[:live, 0]), from_big_endian(rows[:live, 1])
        links = self._links(rows[:live], page_nos)
        good = 0 if self._broken else _leading(links)

        if self._must_continue and self._seen == 0 and good == 0:
            self._end = ScanEnd.GAP
            return
        if good:
            run = FrameRun(
                offset=self._offset_of(self._verified),
                page_size=self._committed.page_size,
                page_nos=page_nos[:good],
                commit_sizes=commit_sizes[:good],
                data=memoryview(block)[: good * self._frame_bytes],
            )
            self._advance(run, rows)
            runs.append(run)
        if good < live:
            self._broken = True
        if np.any(links[good:] & (commit_sizes[good:] != 0)):
            self._end = ScanEnd.INVALID
        elif live < count:
            self._end = ScanEnd.TORN if self._broken else ScanEnd.LOG_ENDED
        if live:
            self._tail = _stored_checksum(rows[live - 1])
        self._seen += count

    def _links(self, rows: Words, page_nos: Words) -> Flags:
        if len(rows) == 0:
            return np.zeros(0, dtype=np.bool_)
        page_size = self._committed.page_size
        if self._order is None:  # the first frame tells
            for order in ORDERS:
                if linked(rows[:1], page_size=page_size, order=order, start=self._tail)[0]:
                    self._order = order
        order = self._order or ORDERS[0]
        links = linked(rows, page_size=page_size, order=order, start=self._tail)
        links &= page_nos != 0  # no page has the number 0: SQLite stops there as well
        return links

    def _advance(self, run: FrameRun, rows: Words) -> None:
        committed = run.committed
        if committed:
            checksum1, checksum2 = _stored_checksum(rows[committed - 1])
            frames = self._verified + committed
            self._committed = replace(
                self._committed, offset=self._offset_of(frames), order=self._order,
                checksum1=checksum1, checksum2=checksum2,
            )  # fmt: skip
            self._frames = frames
            self._commits += int(np.count_nonzero(run.commit_sizes))
            self._page_count = int(run.commit_sizes[committed - 1])
        self._verified += len(run)

    def _offset_of(self, frames: int) -> int:
        return self._committed.offset + (frames - self._frames) * self._frame_bytes


def _leading(flags: Flags) -> int:
    """How many are True before the first that is not."""
    return len(flags) if flags.all() else int(np.argmin(flags))


def _stored_checksum(row: Words) -> tuple[int, int]:
    first, second = from_big_endian(row[4:6])
    return int(first), int(second)
