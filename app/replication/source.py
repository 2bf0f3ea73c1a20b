"""One live SQLite database file: its lock, its committed log, its image. Everything here blocks.

Invariants: while `lock` is not None, a read transaction has been held without a break since the log
was as `lock` says (see `plan`). Bytes that are given out of the log were committed.
Concurrency: one call at a time, from any thread. SQLite's locks belong to the process, and closing
any descriptor of the database file or of `-shm` would drop them all: both are opened once, here,
and closed behind the last connection (see `open_files`).
Crash: the system drops the locks; nothing is left behind but what SQLite itself recovers.

Connections: one of two tailers holds the read transaction; the other one takes over where it has to
begin anew with writers about. They are read-only, so that closing them last leaves the log where it
is (a closing last writer would copy the log and delete it, and the next run would have to send an
image). The guard holds BEGIN IMMEDIATE and never writes. The last one runs sqlite_checkpoints. None
of them does so by itself.
"""

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Self

from app.replication.image import (
    PIECE_BYTES,
    Image,
    find_frames_blocking,
    read_piece_blocking,
    read_whole_blocking,
)
from app.replication.open_files import FileId, claim_blocking, disclaim, file_id
from app.replication.plan import Carried
from app.replication.posix_locks import holder
from app.replication.wal_index import (
    FRAME_HEADER_BYTES,
    INDEX_BYTES,
    LOG_HEADER_BYTES,
    Checksums,
    Log,
    Salts,
    parse_frame,
    parse_index,
    parse_log_salts,
)

LOOKED_THROUGH_BYTES = 64 * PIECE_BYTES
HEADER_BYTES = 100
MAGIC = b"SQLite format 3\x00"
BUSY_SECONDS = 2.0
WRITE_LOCK_PAUSE_SECONDS = 0.0005
WRITE_LOCK_TRIES = 1000
HAND_OVER_TRIES = 5
INDEX_READS_MAX = 100
SIDE_FILES = ("-wal", "-shm", "-journal")

_WRITE_LOCK_BYTE, _CHECKPOINT_LOCK_BYTE = 120, 121
"""Of -shm: who writes, and who runs a sqlite_checkpoint (https://sqlite.org/walformat.html)."""


class SourceProblem(Exception):
    """The file cannot be followed now; another try later may do better."""


class SourceBusy(SourceProblem):
    """Somebody else holds a lock."""


class NotFollowable(Exception):
    """The file cannot be followed as it is: someone has to change something."""


class LogMoved(Exception):
    """The log was restarted while it was read: the bytes are not those asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    is_in_place: bool
    """Whether the path that was given still names the file, by links or without."""
    log: Log | None
    """None while it is being rebuilt."""
    waiting_pid: int | None
    """Who waits for the lock (`waiting_pid_blocking`), while it is held."""


class Source:
    """`open_blocking` makes one."""

    def __init__(self, path: Path, given: Path, claimed: FileId, database_fd: int) -> None:
        self.path = path
        """Without links, as SQLite's own files beside it are named."""
        self._given = given
        self.lock: Log | None = None
        self.page_size = 0
        self._database_fd = database_fd
        self._log_fd = -1
        self._index_fd = -1
        self._connections: list[sqlite3.Connection] = []
        self._tailer_no = 0
        self.file_id = claimed

    @classmethod
    def open_blocking(cls, path: Path, *, set_wal: bool = False) -> Self:
        """Raises SourceProblem, NotFollowable."""
        real = Path(os.path.realpath(path))
        try:
            claimed = claim_blocking(real)
        except OSError as error:
            raise SourceProblem(f"{path} cannot be opened: {error.strerror}") from error
        if claimed is None:
            raise SourceProblem(f"{path} is followed already, under another name")
        try:
            # writable, though nothing is written: on an overlay file system a descriptor of the
            # lower layer would not see what SQLite writes to the upper one
            descriptor = os.open(real, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            disclaim(claimed)
            raise SourceProblem(f"{path} cannot be opened: {error.strerror}") from error
        source = cls(real, path, claimed, descriptor)
        try:
            status = os.fstat(descriptor)
            if (status.st_dev, status.st_ino) != claimed:
                raise SourceProblem(f"{path} is being replaced")
            source._open(set_wal=set_wal)
        except sqlite3.Error as error:
            source.close_blocking()
            raise _problem(f"{path} cannot be opened", error) from error
        except OSError as error:
            source.close_blocking()
            raise SourceProblem(f"{path} cannot be opened: {error.strerror}") from error
        except BaseException:
            source.close_blocking()
            raise
        return source

    def close_blocking(self) -> None:
        self.lock = None
        # the read-only ones are the first of them, so they close last
        for connection in reversed(self._connections):
            with contextlib.suppress(sqlite3.Error):
                connection.close()
        self._connections = []
        for descriptor in (self._index_fd, self._log_fd, self._database_fd):
            if descriptor >= 0:
                os.close(descriptor)
        self._index_fd = self._log_fd = self._database_fd = -1
        disclaim(self.file_id)

    def look_blocking(self) -> Look:
        """All that is seen of it at once: a look is one call."""
        is_in_place = file_id(self._given) == self.file_id == file_id(self.path)
        return Look(
            is_in_place=is_in_place,
            log=self.log_blocking() if is_in_place else None,
            waiting_pid=self.waiting_pid_blocking() if self.lock is not None else None,
        )

    # --- the lock

    def take_lock_blocking(self) -> None:
        """Though a writer holds its own, if the log stands still. Raises SourceProblem."""
        for _ in range(HAND_OVER_TRIES):
            if self._is_handed_over(self._log_or_problem()):
                return
        with self._writers_out():
            self._renew()

    def let_go_blocking(self) -> None:
        self.lock = None
        self._rollback(self._tailer)

    def sqlite_checkpoint_blocking(
        self, *, salts: Salts, offset: int, carried_bytes_max: int
    ) -> Carried | None:
        """Copies the log into the database file, so that the next write restarts it. The frames
        from `offset` on are given out: they may be overwritten from now on. None if the log has
        grown too long for that, or is another: nothing was done. Raises SourceProblem, with the
        lock gone if it could not be taken again.
        """
        with self._writers_out():
            log = self._log_or_problem()
            if log.salts != salts or not 0 <= log.end - offset <= carried_bytes_max:
                return None
            data = self.read_log_blocking(salts, offset, log.end)
            self._renew(passive_checkpoint=True)
            return Carried(salts=salts, offset=offset, data=data)

    def waiting_pid_blocking(self) -> int | None:
        """The other process that runs a sqlite_checkpoint with writers locked out, if one does: it
        is to restart the log, and waits for readers. None where that cannot be told.
        """
        writer = holder(self._index_fd, _WRITE_LOCK_BYTE)
        return writer if writer == holder(self._index_fd, _CHECKPOINT_LOCK_BYTE) else None

    def step_aside_blocking(
        self, *, salts: Salts, offset: int, carried_bytes_max: int
    ) -> Carried | None:
        """The read transaction anew, without locking writers out: somebody else has done so. The
        other tailer begins before this one ends, so that the lock is never gone: the frames from
        `offset` on are given out, and may be overwritten from now on. None if the log is another,
        is too long for that or does not stand still: nothing was done. Raises SourceProblem.
        """
        for _ in range(HAND_OVER_TRIES):
            before = self._log_or_problem()
            if self.lock is None or before.salts != salts:
                return None
            if not 0 <= before.end - offset <= carried_bytes_max:
                return None
            try:
                data = self.read_log_blocking(salts, offset, before.end)
            except LogMoved:
                return None
            if self._is_handed_over(before):
                return Carried(salts=salts, offset=offset, data=data)
        return None

    def _is_handed_over(self, before: Log) -> bool:
        """The other tailer begins and this one ends, if the log stands as it did `before`: what is
        the same before and behind is what the successor sees, for a log never stands again where it
        stood once.
        """
        successor = self._connections[1 - self._tailer_no]
        try:
            successor.execute("BEGIN")
            successor.execute("PRAGMA schema_version").fetchone()
            after = self._log_or_problem()
            if (after.salts, after.frames) != (before.salts, before.frames):
                return False
            self._rollback(self._tailer)
            self._tailer_no = 1 - self._tailer_no
            # as of before: were it copied only now, the successor would still read the log
            self.lock = replace(after, backfilled=before.backfilled)
        except sqlite3.Error as error:
            raise _problem(f"{self.path}", error) from error
        else:
            return True
        finally:
            self._rollback(self._connections[1 - self._tailer_no])

    def backfill_blocking(self) -> None:
        """Without the lock: shortens a log that nobody else shortens."""
        with contextlib.suppress(sqlite3.Error):
            self._checkpointer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()

    def mend_index_blocking(self) -> None:
        """Who reads mends an index that a writer left half written when it was killed."""
        with contextlib.suppress(sqlite3.Error):
            self._checkpointer.execute("PRAGMA schema_version").fetchone()

    # --- the log

    def log_blocking(self) -> Log | None:
        """The committed log; None while it is being rebuilt."""
        for _ in range(INDEX_READS_MAX):
            log = parse_index(os.pread(self._index_fd, INDEX_BYTES, 0))
            if log is not None:
                # the index of a log that never had a frame does not know the page size
                return log if log.page_size else replace(log, page_size=self.page_size)
        return None

    def read_log_blocking(self, salts: Salts, offset: int, end: int) -> bytes:
        """Raises LogMoved. The log's index changes before its frames are overwritten, so looking
        at it behind the read tells whether the bytes are still those of `salts`.
        """
        data = read_whole_blocking(self._log_fd, end - offset, offset)
        log = self.log_blocking()
        if log is None or log.salts != salts or log.end < end or len(data) < end - offset:
            raise LogMoved
        if offset == 0 and parse_log_salts(data) != salts:
            raise LogMoved
        return data

    def checksums_at_blocking(self, log: Log, offset: int) -> Checksums | None:
        """Those of the frame that ends at `offset`, if there is one with the salts of `log`."""
        start = offset - log.frame_bytes
        if start < LOG_HEADER_BYTES or offset > log.end:
            return None
        if (start - LOG_HEADER_BYTES) % log.frame_bytes:
            return None
        frame = parse_frame(os.pread(self._log_fd, FRAME_HEADER_BYTES, start))
        return frame.checksums if frame is not None and frame.salts == log.salts else None

    # --- the image

    def image_blocking(self) -> Image:
        """Takes the lock anew and fixes an image to it. Raises SourceProblem.

        It is exact: the end of the log at the lock is the state that the read transaction sees.
        Pages with a frame in the log up to there are read from the log, which the transaction
        keeps from being restarted. The others are read from the database file, which a
        sqlite_checkpoint changes only by pages of the first kind, because it goes no further than
        the oldest reader. If the whole log has been copied, the file alone is the image: then the
        transaction reads the file, and SQLite lets nobody change it.
        """
        # a log that is copied is restarted by the next write, and whoever follows this database
        # after a break could not go on in it: so only one that is too long to be looked through
        if self._log_or_problem().end > LOOKED_THROUGH_BYTES:
            self._renew_copied()
        else:
            self.take_lock_blocking()
        log = self.lock
        assert log is not None, "it was just taken"
        try:
            (page_count,) = self._tailer.execute("PRAGMA page_count").fetchone()
        except sqlite3.Error as error:
            raise _problem(f"{self.path}", error) from error
        frames = {} if self._is_copied(log) else find_frames_blocking(self._log_fd, log)
        return Image(log=log, page_count=page_count, frames_of_pages=MappingProxyType(frames))

    def _renew_copied(self) -> None:
        try:
            with self._writers_out():
                self._renew(passive_checkpoint=True)
        except SourceProblem:  # a long transaction, or no room
            self.take_lock_blocking()

    def _is_copied(self, log: Log) -> bool:
        """Whether the transaction at the end of `log` reads the database file alone, or might as
        well. A log that is another one by now had been copied. Looked at twice: a restart changes
        the salts before it sets back how far the log is copied.
        """
        looks = (self._log_or_problem(), self._log_or_problem())
        return any(each.salts != log.salts or each.backfilled >= log.frames for each in looks)

    def read_image_blocking(self, image: Image, offset: int) -> bytes:
        """At most a piece of it; nothing at its end. The lock is held since `image` was made."""
        assert self.lock is not None, "an image is as good as its lock"
        return read_piece_blocking(self._database_fd, self._log_fd, image, offset)

    # --- inside

    def _open(self, *, set_wal: bool) -> None:
        header = os.pread(self._database_fd, HEADER_BYTES, 0)
        if not header:
            raise SourceProblem(f"{self.path} is empty: no database has been made of it yet")
        if not header.startswith(MAGIC):
            raise NotFollowable(f"{self.path} is not a SQLite database")
        size = int.from_bytes(header[16:18], "big")
        self.page_size = 65536 if size == 1 else size
        if header[18] != 2 or header[19] != 2:
            self._switch_to_wal(set_wal)
        guard = self._connect("rw")
        # makes -wal and -shm where they are missing, and recovers them after a crash
        guard.execute("PRAGMA schema_version").fetchone()
        guard.execute("PRAGMA busy_timeout=0")
        self._index_fd = os.open(f"{self.path}-shm", os.O_RDONLY | os.O_CLOEXEC)
        self._log_fd = os.open(f"{self.path}-wal", os.O_RDONLY | os.O_CLOEXEC)
        self._connections = [
            *(self._connect("ro"), self._connect("ro")),
            *(guard, self._connect("rw")),
        ]
        # opened now, so that a file that is moved later is not opened anew by its name
        for connection in self._connections:
            connection.execute("PRAGMA schema_version").fetchone()

    def _switch_to_wal(self, set_wal: bool) -> None:
        if not set_wal:
            raise NotFollowable(
                f"{self.path} is not in WAL mode; --set-wal, or PRAGMA journal_mode=WAL, changes it"
            )
        with contextlib.closing(self._connect("rw")) as connection:
            (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
        self._connections = []
        if mode != "wal":
            raise NotFollowable(f"{self.path} stays in journal mode {mode}")

    def _connect(self, mode: str) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{self.path.as_uri()}?mode={mode}",
            uri=True,
            timeout=BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        self._connections.append(connection)
        connection.execute("PRAGMA wal_autocheckpoint=0")
        return connection

    @property
    def _tailer(self) -> sqlite3.Connection:
        return self._connections[self._tailer_no]

    @property
    def _guard(self) -> sqlite3.Connection:
        return self._connections[2]

    @property
    def _checkpointer(self) -> sqlite3.Connection:
        return self._connections[3]

    @contextlib.contextmanager
    def _writers_out(self) -> Iterator[None]:
        self._lock_writers_out()
        try:
            yield
        finally:
            self._rollback(self._guard)

    def _lock_writers_out(self) -> None:
        """SQLite's own busy handler sleeps up to 100 ms between its tries, and loses against an
        application that writes without a pause.
        """
        pause = threading.Event()
        for attempt in range(1, WRITE_LOCK_TRIES + 1):
            try:
                self._guard.execute("BEGIN IMMEDIATE")
            except sqlite3.Error as error:
                problem = _problem(f"{self.path}", error)
                if not isinstance(problem, SourceBusy) or attempt == WRITE_LOCK_TRIES:
                    raise problem from error
                pause.wait(WRITE_LOCK_PAUSE_SECONDS)
            else:
                return

    def _renew(self, *, passive_checkpoint: bool = False) -> None:
        """The read transaction anew, with writers locked out: nothing is committed meanwhile."""
        self.let_go_blocking()
        try:
            if passive_checkpoint:
                self._checkpointer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            self._tailer.execute("BEGIN")
            self._tailer.execute("PRAGMA schema_version").fetchone()
            self.lock = self._log_or_problem()
        except sqlite3.Error as error:
            self.let_go_blocking()
            raise _problem(f"{self.path}", error) from error
        except SourceProblem:
            self.let_go_blocking()
            raise

    def _log_or_problem(self) -> Log:
        log = self.log_blocking()
        if log is None:
            raise SourceProblem(f"{self.path}-shm is being rebuilt")
        return log

    def _rollback(self, connection: sqlite3.Connection) -> None:
        with contextlib.suppress(sqlite3.Error):
            if connection.in_transaction:
                connection.execute("ROLLBACK")


def _problem(what: str, error: sqlite3.Error) -> SourceProblem:
    code = getattr(error, "sqlite_errorcode", None)
    is_busy = code is not None and code & 0xFF == sqlite3.SQLITE_BUSY
    return (SourceBusy if is_busy else SourceProblem)(f"{what}: {error}")
