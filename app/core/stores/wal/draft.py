"""The segments of one append, written while what goes into them arrives.

Where an append is to begin a segment of its own, and how long it is, is known before its bytes are:
so are its LSNs and where each entry will lie, unless something else is appended first. Its files
are written without names. The flush links them into the log, or, if the log has moved meanwhile,
leaves them and writes the append as any other.

Invariants: I1, I13: what has no name is no part of the log, whatever becomes of it; from the link
on it is a part of the group that links it. I16: a file whose sync failed is never linked, and
the flush that would ends the process.
Concurrency: one thread at a time writes, another may sync what is complete, any may close: the
files are closed by the last one that is at them. Cancellation, crash: files without names go with
their descriptors.
"""

import errno
import os
import threading
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

from app.core.base.errors import InvariantViolation, StorageFailure
from app.core.formats.segment import EngineCode, SegmentHeader
from app.core.stores.wal.disk import Disk
from app.core.stores.wal.failure import judge_write
from app.core.stores.wal.planning import GroupPlan, Run
from app.core.stores.wal.run_writer import RunWriter

GIVEN_AWAY = -1


class Draft:
    """`WalLog.draft` makes one."""

    def __init__(
        self,
        disk: Disk,
        plan: GroupPlan,
        *,
        root: Path,
        db_id: int,
        engine: EngineCode,
        chunk_bytes: int,
        now_us: int,
    ) -> None:
        """`plan` is of one request, with a segment for each of its runs."""
        self.plan = plan
        self._disk = disk
        self._root = root
        self._db_id = db_id
        self._engine = engine
        self._chunk_bytes = chunk_bytes
        self._now_us = now_us
        self._fds: list[int] = []  # of the first runs; GIVEN_AWAY once it is the log's
        counts = [len(run.entries) for run in plan.runs]
        self._first_entries = [0, *accumulate(counts)][:-1]
        self._entry_count = sum(counts)
        self._writer: RunWriter | None = None
        self._written = 0
        self._synced = 0
        self._failure: OSError | None = None
        self._lock = threading.Lock()
        self._users = 0
        self._is_closed = False

    @property
    def first_lsn(self) -> int:
        return self.plan.runs[0].first_lsn

    # --- while it arrives ---------------------------------------------------------------------

    def is_possible_blocking(self) -> bool:
        """Whether the disk can make files without names and name them later."""
        trial = self._root / f".draft-{os.getpid()}-{self._db_id}"
        try:
            fd = self._disk.create_unnamed(self._root)
            try:
                self._disk.link(fd, trial)
            finally:
                self._disk.close(fd)
                self._disk.unlink(trial)
        except OSError:
            return False
        return True

    def write_blocking(self, entries: int) -> None:
        """The first `entries` of the request that are not written yet: their payloads can be
        loaded. Raises DiskFull, NotReady, and OSError, after which it must not be used.
        """
        try:
            with self._in_use():
                self._write(entries)
        except OSError as error:
            judged = judge_write(
                error, disk=self._disk, directory=self._root, needed_bytes=self.plan.write_bytes
            )
            if isinstance(judged, StorageFailure):  # nothing of the log has failed
                raise
            raise judged from error

    def sync_blocking(self) -> None:
        """Files that are complete: then the flush has little left to wait for. `check` tells what
        became of it.
        """
        with self._in_use():
            while self._synced < len(self._fds) - 1:  # the last one may yet grow
                try:
                    self._disk.sync_data(self._fds[self._synced])
                except OSError as error:
                    self._failure = error
                self._synced += 1

    def check(self) -> None:
        """Raises StorageFailure once a sync has failed."""
        if self._failure is not None:
            raise StorageFailure(f"The WAL cannot be synced: {self._failure}") from self._failure

    def read_blocking(self, entry: int) -> bytes:
        """The payload of an entry that was written, and whose file was not given to the log. Raises
        OSError, StorageFailure.
        """
        self.check()
        if entry >= self._written:
            raise InvariantViolation("An entry was read that was not written.", entry=entry)
        number, first = self._run_of(entry)
        placed = self.plan.runs[number].entries[entry - first]
        length = placed.payload.payload_bytes
        with self._in_use():
            data = self._disk.read(self._fds[number], length, placed.payload_offset)
        if len(data) != length:
            raise OSError(errno.EIO, "a draft is shorter than what was written to it")
        return data

    def close_blocking(self) -> None:
        """What the log did not take goes. Again is harmless; after it, nothing else is."""
        with self._lock:
            self._is_closed = True
            is_last = not self._users
        if is_last:
            self._close_files()

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        with self._lock:
            if self._is_closed:
                raise InvariantViolation("A draft was used after it was closed.")
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                is_last = self._is_closed and not self._users
            if is_last:
                self._close_files()

    def _close_files(self) -> None:
        while self._fds:
            if (fd := self._fds.pop()) != GIVEN_AWAY:
                self._disk.close(fd)

    def _write(self, entries: int) -> None:
        while self._written < entries:
            number, first = self._run_of(self._written)
            run = self.plan.runs[number]
            if self._writer is None or self._writer.run is not run:
                self._writer = self._begin(run)
            stop = min(entries - first, len(run.entries))
            self._writer.write_blocking(stop)
            self._written = first + stop

    def _run_of(self, entry: int) -> tuple[int, int]:
        """The number of the run that the entry is in, and how many entries there are before it."""
        number = bisect_right(self._first_entries, entry) - 1
        return number, self._first_entries[number]

    def _begin(self, run: Run) -> RunWriter:
        fd = self._disk.create_unnamed(self._root)
        self._fds.append(fd)
        header = SegmentHeader(
            engine=self._engine, db_id=self._db_id, segment_id=run.segment_id,
            first_lsn=run.first_lsn, chunk_bytes=self._chunk_bytes,
        )  # fmt: skip
        return RunWriter(
            self._disk, fd, run,
            header=header, durable_lsn=self.first_lsn - 1, now_us=self._now_us,
        )  # fmt: skip

    # --- when it is flushed -------------------------------------------------------------------

    def fits(self, *, next_lsn: int, has_tail: bool) -> bool:
        """Whether the log has not moved, and all was written."""
        is_whole = self._written == self._entry_count
        return is_whole and not has_tail and next_lsn == self.first_lsn

    def link_blocking(self, run: Run, path: Path) -> int:
        """The run's file becomes `path`; its descriptor is the caller's. Raises OSError."""
        number = self.plan.runs.index(run)
        with self._in_use():
            fd = self._fds[number]
            self._disk.link(fd, path)
            self._fds[number] = GIVEN_AWAY
        return fd
