"""When a follower may run a sqlite_checkpoint, and who waits for the log. Pure."""

from app.replication.wal_index import Log

AGAIN_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Behind one that failed: meanwhile commits are sent."""


class CheckpointPace:
    def __init__(self, step_bytes: int) -> None:
        self._step_bytes = step_bytes
        self._last: Log | None = None
        self._failures = 0
        self._not_before = 0.0

    def is_due(self, log: Log, now: float) -> bool:
        """Not again before the log was restarted or has grown by a step, nor soon after one failed:
        a long transaction of the application's may be in its way for as long as it likes.
        """
        last = self._last
        if now < self._not_before:
            return False
        return last is None or last.salts != log.salts or log.end >= last.end + self._step_bytes

    def done(self, log: Log | None) -> None:
        self._last, self._failures = log, 0

    def failed(self, now: float) -> None:
        self._not_before = now + AGAIN_SECONDS[min(self._failures, len(AGAIN_SECONDS) - 1)]
        self._failures += 1

    def forget(self) -> None:
        self._last = None


class WhoWaits:
    def __init__(self) -> None:
        self._seen: tuple[int, Log] | None = None

    def look(self, pid: int | None, log: Log) -> tuple[bool, bool]:
        """Whether the log is waited for, and whether someone was seen for the first time. Twice the
        same at the same state of the log: a writer and a passive sqlite_checkpoint of one process
        look alike, but not for long.
        """
        before, self._seen = self._seen, None if pid is None else (pid, log)
        if pid is None:
            return False, False
        if before is None:
            return False, True
        return before[0] == pid and before[1].end == log.end, False

    def forget(self) -> None:
        self._seen = None
