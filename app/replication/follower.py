"""Follows one database: sees, decides (`plan`), does: here (`source`) and there (`replica`).

Invariants: the service gets committed frames only, each once and in order, or an image of exactly
one commit. What it answered is what counts: after any failure it is asked where it stands.
Concurrency: one task; SQLite and files are used in the pool, one call at a time.
Cancellation: the call in the pool is waited for, then locks and descriptors are given back.
Crash: nothing is kept on disk; the next run asks the service and compares checksums.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import TypeVar, TypeVarTuple

from app.client import BopClient, ClientError, ProblemError, ServiceUnreachable
from app.replication.events import Status, Tell
from app.replication.plan import (
    Action,
    AskPosition,
    Carried,
    LetGo,
    Limits,
    SendCarried,
    SendImage,
    SendWal,
    SqliteCheckpoint,
    StepAside,
    TakeLock,
    View,
    Wait,
    carried_bytes_max,
    decide,
    unsent_bytes,
)
from app.replication.replica import Refused, Replica, Target
from app.replication.source import PIECE_BYTES, LogMoved, NotFollowable, Source, SourceProblem
from app.replication.wal_index import Log

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

SETTLE_SECONDS = (0.002, 0.01, 0.05, 0.25, 1.0)
"""When to look again after a change was seen: the index changes behind the log, unannounced."""
IDLE_SECONDS = 10.0
"""When to look without having been woken, where waking works."""
POLL_SECONDS = 0.25
"""And where it does not."""
MISSING_SECONDS = 1.0
BATCH_SECONDS = 0.01
"""Commits of this time go together."""


class Follower:
    def __init__(
        self,
        target: Target,
        client: BopClient,
        pool: Executor,
        *,
        tell: Tell,
        limits: Limits,
        set_wal: bool = False,
    ) -> None:
        self.target = target
        self.watched: Path | None = None
        """The file, without links, whose changes wake it."""
        self._replica = Replica(target, client, tell=tell, limits=limits)
        self._pool = pool
        self._limits = limits
        self._set_wal = set_wal
        self._changed = asyncio.Event()
        self._stopping = asyncio.Event()
        self._settling = 0
        self._source: Source | None = None
        self._carried: Carried | None = None
        self._seen: Log | None = None
        self._goal: Log | None = None
        self._waiting: tuple[int, Log] | None = None
        self._once = False
        self._checkpointed_at: Log | None = None
        self._problem = ""

    @property
    def status(self) -> Status:
        return self._replica.status

    @property
    def is_idle(self) -> bool:
        """All is sent, and it waits to be woken."""
        return self.status.caught_up and self._settling > len(SETTLE_SECONDS)

    def wake(self) -> None:
        """The file may have changed."""
        self._changed.set()
        self._settling = 0

    def stop(self) -> None:
        """Lets `run` end after what it does now."""
        self._stopping.set()
        self._changed.set()

    async def run(self, *, once: bool) -> None:
        """Follows until `stop`; with `once` until all is sent that was committed when it first
        looked. Raises Refused.
        """
        self._once = once
        try:
            while not self._stopping.is_set():
                if await self._step() and once:
                    return
        finally:
            await self._close()

    # --- see

    async def _step(self) -> bool:
        """One look, one decision, one deed. True once the goal of `once` is reached."""
        try:
            source = self._source or await self._open()
            look = await self._blocking(source.look_blocking)
        except SourceProblem as problem:
            await self._cannot_follow(problem)
            return False
        log = look.log
        if not look.is_in_place:
            await self._close()
            self._replica.forget("the file was replaced")
            return False
        if log is None:
            await self._rest(SETTLE_SECONDS[1])
            return False
        if log != self._seen:
            self._seen, self._settling = log, 0
        view = await self._view(source, log, look.waiting_pid)
        action = decide(view, self._limits)
        self._show(view)
        try:
            await self._do(source, action, view)
        except SourceProblem as problem:
            await self._cannot_follow(problem)
        except LogMoved:
            pass  # the next look sees what became of it
        except ServiceUnreachable as error:
            self._go_away(error.reason)
        except ProblemError as problem:
            is_image = isinstance(action, SendImage)
            self._replica.judge(problem, page_size=log.page_size, was_image=is_image)
            self._give_up_once(problem.detail or problem.title)
        except ClientError as error:
            self._go_away(str(error))
        return self._is_goal_reached(action)

    async def _open(self) -> Source:
        try:
            opened = await self._blocking(
                lambda: Source.open_blocking(self.target.path, set_wal=self._set_wal)
            )
        except NotFollowable as error:
            raise Refused(str(error), code="not_followable") from error
        self._source = opened
        self._problem = ""
        return opened

    async def _view(self, source: Source, log: Log, waiting_pid: int | None) -> View:
        position, found = self._replica.position, None
        if position is not None and position.salts == log.salts and position.checksums is not None:
            found = await self._blocking(source.checksums_at_blocking, log, position.offset)
        last = self._checkpointed_at
        return View(
            log=log,
            lock=source.lock,
            position=position,
            found_checksums=found,
            carried=self._carried,
            away=self._replica.is_away,
            may_checkpoint=last is None
            or last.salts != log.salts
            or log.end >= last.end + self._limits.checkpoint_bytes // 4,
            image_reason=self._replica.image_reason,
            confirmed=self._replica.confirmed,
            quiet=self._settling >= len(SETTLE_SECONDS),
            waited_for=self._is_waited_for(waiting_pid, log),
        )

    def _is_waited_for(self, pid: int | None, log: Log) -> bool:
        """Twice the same at the same state of the log: a writer and a passive sqlite_checkpoint of
        one process look alike, but not for long.
        """
        before, self._waiting = self._waiting, None if pid is None else (pid, log)
        if pid is None:
            return False
        if before is None:
            self._settling = 0
        return before is not None and before[0] == pid and before[1].end == log.end

    # --- do

    async def _do(self, source: Source, action: Action, view: View) -> None:
        match action:
            case AskPosition():
                await self._replica.ask_position(view.log)
            case TakeLock():
                await self._blocking(source.take_lock_blocking)
                self._replica.note("following", "Followed.", last_lsn=self.status.last_lsn)
            case LetGo(reason=reason):
                await self._let_go(source, reason, view)
            case SendWal(offset=offset, end=end, after_lsn=after_lsn):
                await self._send_wal(source, view.log, offset, end, after_lsn)
            case SendCarried(start=start):
                await self._send_carried(start)
            case SendImage(reason=reason):
                await self._send_image(source, reason)
            case SqliteCheckpoint(offset=offset):
                await self._sqlite_checkpoint(source, view.log, offset)
            case StepAside(offset=offset):
                await self._step_aside(source, view.log, offset)
            case Wait(caught_up=caught_up):
                await self._wait(source, view, caught_up=caught_up)

    async def _send_wal(
        self, source: Source, log: Log, offset: int, end: int, after_lsn: int | None
    ) -> None:
        end = self._replica.request_end(log, offset, end)

        async def pieces() -> AsyncIterator[bytes]:
            at = offset
            while at < end:
                to = min(end, at + PIECE_BYTES)
                yield await self._blocking(source.read_log_blocking, log.salts, at, to)
                at = to

        is_new = await self._replica.send_wal(
            pieces, offset=offset, end=end, log_end=log.end, after_lsn=after_lsn
        )
        if is_new:
            await self._pause(BATCH_SECONDS)

    async def _send_carried(self, start: int) -> None:
        carried = self._carried
        assert carried is not None, "the plan saw it"
        data = carried.data[start:]
        await self._replica.send_frames(
            data, content_bytes=len(data), offset=carried.offset + start
        )

    async def _send_image(self, source: Source, reason: str) -> None:
        image = await self._blocking(source.image_blocking)
        log, total = image.log, image.content_bytes
        self._carried = None
        self.status.image_total_bytes = total
        self._replica.note(
            "image_sending", f"An image is sent: {reason}.", bytes=total, reason=reason
        )

        async def pieces() -> AsyncIterator[bytes]:
            at = 0
            while at < total:
                piece = await self._blocking(source.read_image_blocking, image, at)
                at += len(piece)
                self.status.image_sent_bytes = at
                yield piece

        try:
            await self._replica.send_image(pieces, content_bytes=total, log=log)
        finally:
            self.status.image_sent_bytes = self.status.image_total_bytes = 0

    async def _sqlite_checkpoint(self, source: Source, log: Log, offset: int) -> None:
        carried = await self._blocking(
            lambda: source.sqlite_checkpoint_blocking(
                salts=log.salts,
                offset=offset,
                carried_bytes_max=carried_bytes_max(log, self._limits),
            )
        )
        if carried is None:
            return
        self._carried = carried if carried.data else None
        self._checkpointed_at = source.lock
        self.status.sqlite_checkpoints += 1
        self._replica.note(
            "sqlite_checkpoint", "The log was copied into the database file.", log_bytes=log.end
        )

    async def _step_aside(self, source: Source, log: Log, offset: int) -> None:
        carried = await self._blocking(
            lambda: source.step_aside_blocking(
                salts=log.salts,
                offset=offset,
                carried_bytes_max=carried_bytes_max(log, self._limits),
            )
        )
        if carried is not None:
            self._carried = carried if carried.data else None
        await self._rest(SETTLE_SECONDS[2])  # who waits sleeps too, between its tries

    async def _let_go(self, source: Source, reason: str, view: View) -> None:
        await self._blocking(source.let_go_blocking)
        self._carried = None
        unsent = unsent_bytes(view.log, view.position or view.confirmed, view.carried)
        self._replica.note(
            "let_go",
            f"The read lock was let go: {reason}. An image follows.",
            reason=reason,
            log_bytes=view.log.end,
            unsent_bytes=unsent,
        )
        self._replica.forget("the read lock was let go")

    async def _wait(self, source: Source, view: View, *, caught_up: bool) -> None:
        if caught_up:
            if not self.status.caught_up:
                self.status.caught_up = True
                self._replica.note("caught_up", "All is sent.", last_lsn=self.status.last_lsn)
            await self._rest(self._quiet_seconds())
            return
        if source.lock is None and view.log.end > self._limits.log_bytes:
            await self._blocking(source.backfill_blocking)
        await self._rest(min(self._replica.away_seconds, self._quiet_seconds()) or 0.001)

    # --- what cannot go on

    def _go_away(self, reason: str) -> None:
        self._replica.go_away(reason)
        self._give_up_once(reason)

    def _give_up_once(self, reason: str) -> None:
        if self._once and self._replica.is_given_up:
            raise Refused(f"The service does not take it: {reason}.", code="unreachable")

    async def _cannot_follow(self, problem: SourceProblem) -> None:
        if self._once and self._source is None:
            raise Refused(f"{problem}.", code="file_error") from problem
        if str(problem) != self._problem:
            self._problem = str(problem)
            self._replica.note("waiting", f"{problem}.")
        # a lock that goes tells nobody, unlike a file that comes
        await self._rest(POLL_SECONDS if self._source is not None else MISSING_SECONDS)

    def _is_goal_reached(self, action: Action) -> bool:
        source = self._source
        if source is None or source.lock is None or self._seen is None:
            return False
        if self._goal is None:
            self._goal = self._seen
        if action == Wait(caught_up=True) or self.status.images:
            return True
        position = self._replica.position
        if position is None or position is not self._replica.confirmed:
            return False
        return position.salts != self._goal.salts or position.offset >= self._goal.end

    # --- wait

    async def _rest(self, seconds: float) -> None:
        """Until the file changes, or the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        self._changed.clear()

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    def _quiet_seconds(self) -> float:
        self._settling += 1
        if self._settling <= len(SETTLE_SECONDS):
            return SETTLE_SECONDS[self._settling - 1]
        is_watched = self._source is not None and self._source.path == self.watched
        return IDLE_SECONDS if is_watched else POLL_SECONDS

    async def _blocking(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """A call in the pool; one that is cancelled is waited for, for it holds SQLite's locks."""
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._pool, function, *args)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait({future})
            if not future.cancelled():
                future.exception()  # seen here: the cancellation is what the caller is told
            raise

    async def _close(self) -> None:
        source, self._source = self._source, None
        self._replica.forget()
        self._carried = self._seen = self._checkpointed_at = self._waiting = None
        if source is not None:
            await self._blocking(source.close_blocking)

    # --- tell

    def _show(self, view: View) -> None:
        status = self.status
        status.log_bytes = view.log.end
        status.unsent_bytes = unsent_bytes(view.log, view.position or view.confirmed, view.carried)
        if status.unsent_bytes:
            status.caught_up = False
