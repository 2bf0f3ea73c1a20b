"""What a follower does next. Pure.

Why no frame is lost. `Lock` is the log as it was, writers locked out, when the read transaction
that is still held began. While it is held nobody can restart the log, unless all of `Lock` had been
copied into the database file; then it can be restarted once, and the new log starts from exactly
the end of `Lock`, for a further sqlite_checkpoint would overwrite what the transaction reads. So:

- the same salts: the log has only grown, and goes on where the service's position is, if the frame
  there bears the checksums that the service has;
- other salts, and the service's position is the end of `Lock`: the new log follows it
  (`offset=0&after_lsn=`);
- anything else: frames may have been missed, and only a new image makes it right.
"""

import sys
from dataclasses import dataclass

from app.replication.wal_index import Checksums, Log, Salts

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    log_bytes: int = 64 * MIB
    """With the service away, a log beyond this lets go of the read lock."""
    unsent_bytes: int = 256 * MIB
    """A service that is behind by more than this, and by more than the database's size, is not
    waited for either. An image would be the longer way to catch up until then: a database that is
    written to while its image is sent would be sent again and again.
    """
    checkpoint_bytes: int = 4 * MIB
    """A log of this size is copied into the database file, as SQLite itself does by default."""
    carried_bytes: int = 8 * MIB
    """Frames held in memory across a sqlite_checkpoint; with more to send, it waits."""
    carried_bytes_max: int = 64 * MIB
    """And once the log is longer than `log_bytes`: a service that is just as fast as the
    application would be waited for forever.
    """
    carried_bytes_all: int = 512 * MIB
    """Of all followers of a process together."""
    request_bytes: int = 64 * MIB
    request_bytes_max: int = 1024 * MIB - MIB
    """A transaction longer than a request makes it grow up to this: what the service takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """How far the service has a log of this database."""

    last_lsn: int
    salts: Salts | None
    offset: int
    checksums: Checksums | None = None
    """None: this process sent the frames itself and was answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """Frames read before the lock was renewed: the log may have been restarted since."""

    salts: Salts
    offset: int
    data: bytes

    @property
    def end(self) -> int:
        return self.offset + len(self.data)


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """All that a decision rests on."""

    log: Log
    lock: Log | None
    position: Position | None
    found_checksums: Checksums | None
    """Those of the local frame that ends at the position's offset, if its salts are the log's."""
    carried: Carried | None
    away: bool
    """The service did not answer, and it is not yet time to ask again."""
    may_checkpoint: bool
    image_reason: str | None = None
    free_bytes: int = sys.maxsize
    """Of the memory for what all followers of the process carry."""
    confirmed: Position | None = None
    """The last place that the service said it has: it is there, or further on."""
    quiet: bool = False
    """Nothing has come for a while, and nobody looks again soon."""
    waited_for: bool = False
    """Another process keeps writers out until it has the log for itself (a sqlite_checkpoint that
    restarts or truncates it), which the lock is in the way of.
    """


@dataclass(frozen=True, slots=True)
class AskPosition:
    pass


@dataclass(frozen=True, slots=True)
class TakeLock:
    pass


@dataclass(frozen=True, slots=True)
class LetGo:
    """Of the read lock, so that the log can be restarted."""

    reason: str


@dataclass(frozen=True, slots=True)
class SendWal:
    offset: int
    end: int
    after_lsn: int | None


@dataclass(frozen=True, slots=True)
class SendCarried:
    start: int
    """Within the carried bytes."""


@dataclass(frozen=True, slots=True)
class SendImage:
    reason: str


@dataclass(frozen=True, slots=True)
class SqliteCheckpoint:
    """Let the application's next write restart the log."""

    offset: int
    """Frames from here are carried."""


@dataclass(frozen=True, slots=True)
class StepAside:
    """Begin the read transaction anew, so that who waits for it gets on."""

    offset: int
    """Frames from here are carried."""


@dataclass(frozen=True, slots=True)
class Wait:
    caught_up: bool


Action = (
    AskPosition
    | TakeLock
    | LetGo
    | SendWal
    | SendCarried
    | SendImage
    | SqliteCheckpoint
    | StepAside
    | Wait
)


def decide(view: View, limits: Limits) -> Action:
    if view.lock is None:
        if view.away:
            return Wait(caught_up=False)
        return AskPosition() if view.position is None else TakeLock()
    if view.away:
        if view.log.end > limits.log_bytes:
            return LetGo("the service is away")
        return _step_aside_unsent(view, limits) if _is_in_the_way(view) else Wait(caught_up=False)
    if view.position is None:
        return AskPosition()
    if view.image_reason is not None:
        return SendImage(view.image_reason)
    return _go_on(view, view.position, view.lock, limits)


def carried_bytes_max(log: Log, limits: Limits, free_bytes: int) -> int:
    most = limits.carried_bytes if log.end <= limits.log_bytes else limits.carried_bytes_max
    return min(most, free_bytes)


def behind_bytes_max(log: Log, limits: Limits) -> int:
    return max(limits.unsent_bytes, log.page_count * log.page_size)


def unsent_bytes(log: Log, position: Position | None, carried: Carried | None) -> int:
    """How far the service is behind, as far as that can be told."""
    if position is None:
        return log.end
    if position.salts == log.salts:
        return max(0, log.end - position.offset)
    held = carried.end - position.offset if carried and carried.salts == position.salts else 0
    return log.end + max(0, held)


def _go_on(view: View, position: Position, lock: Log, limits: Limits) -> Action:
    log, carried = view.log, view.carried
    if position.offset > 0 and position.salts == log.salts:
        if reason := _mismatch(view, position):
            return SendImage(reason)
        return _same_log(view, position, limits)
    if (
        carried is not None
        and carried.salts == position.salts
        and carried.offset <= position.offset < carried.end
    ):
        return SendCarried(position.offset - carried.offset)
    if not _is_at(position, lock):
        return SendImage(_why_not(position))
    if log.frames == 0:
        return Wait(caught_up=True)
    if log.end > behind_bytes_max(log, limits):
        return LetGo("the service is too far behind")
    return SendWal(0, log.end, position.last_lsn)


def _same_log(view: View, position: Position, limits: Limits) -> Action:
    log = view.log
    unsent = log.end - position.offset
    carried_max = carried_bytes_max(log, limits, view.free_bytes)
    behind_max = behind_bytes_max(log, limits)
    if unsent > behind_max or (log.end > 2 * behind_max and unsent > carried_max):
        return LetGo("the service is too far behind")
    if view.may_checkpoint and _is_checkpoint_due(view, limits) and unsent <= carried_max:
        return SqliteCheckpoint(position.offset)
    if unsent > 0:
        return SendWal(position.offset, log.end, None)
    if _is_in_the_way(view) or _is_idle_in_the_way(view):
        return StepAside(position.offset)
    return Wait(caught_up=True)


def _step_aside_unsent(view: View, limits: Limits) -> Action:
    """The application does not wait for a service that is away: what is not sent is kept in memory,
    if it is of one log and not too much.
    """
    log, confirmed = view.log, view.confirmed
    if (
        confirmed is not None
        and confirmed.salts == log.salts
        and confirmed.offset > 0
        and 0 <= log.end - confirmed.offset <= carried_bytes_max(log, limits, view.free_bytes)
    ):
        return StepAside(confirmed.offset)
    return LetGo("the application waits for it, and the service is away")


def _is_in_the_way(view: View) -> bool:
    """A lock on a log that is all copied reads the database file alone, and hinders nobody."""
    log, lock = view.log, view.lock
    free = lock is not None and lock.end == log.end and lock.backfilled == log.frames
    return view.waited_for and not free


def _is_idle_in_the_way(view: View) -> bool:
    """Whoever waits for an idle log tells nobody, as long as the lock keeps it from writing to the
    database file. So the lock moves to the end of the log once it is quiet, and off a copied one.
    """
    log, lock = view.log, view.lock
    if lock is None or (lock.salts, lock.end) != (log.salts, log.end):
        return view.quiet
    return lock.backfilled < log.backfilled == log.frames


def _is_checkpoint_due(view: View, limits: Limits) -> bool:
    """Not again while the log waits for the write that restarts it."""
    log, lock = view.log, view.lock
    done = lock is not None and lock.end == log.end and log.backfilled == log.frames
    return log.end >= limits.checkpoint_bytes and not done


def _mismatch(view: View, position: Position) -> str | None:
    if position.offset > view.log.end:
        return "the log is shorter than what the service has of it"
    if position.checksums is not None and position.checksums != view.found_checksums:
        return "the log differs from what the service has of it"
    return None


def _is_at(position: Position, lock: Log) -> bool:
    return (
        position.salts == lock.salts
        and position.offset == lock.end
        and position.checksums in {None, lock.checksums}
    )


def _why_not(position: Position) -> str:
    if position.last_lsn == 0:
        return "the service has nothing of it yet"
    return "the log was restarted unseen"
