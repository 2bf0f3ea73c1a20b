"""Follows one database: sees, decides (`plan`), does: here (`source`) and there (`replica`).

Invariants: the service gets committed frames only, each once and in order, or an image of exactly
one commit. What it answered is what counts: after any failure it is asked where it stands.
Concurrency: one task; SQLite and files are used in the pool, one call at a time.
Cancellation: the call in the pool is waited for, then locks and descriptors are given back.
Crash: nothing is kept on disk; the next run asks the service and compares checksums.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import TypeVar, TypeVarTuple

from app.client import BopClient, ClientError, ProblemError, ServiceUnreachable
from app.replication.bell import (
    BATCH_SECONDS,
    IDLE_SECONDS,
    MISSING_SECONDS,
    POLL_SECONDS,
    SETTLE_SECONDS,
    Bell,
)
from app.replication.events import Status, Tell
from app.replication.image import PIECE_BYTES
from app.replication.pace import CheckpointPace, WhoWaits
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
    behind_bytes_max,
    carried_bytes_max,
    decide,
    unsent_bytes,
)
from app.replication.replica import PATIENCE_SECONDS, Refused, Replica, Target, told
from app.replication.shares import Shares
from app.replication.source import LogMoved, NotFollowable, Source, SourceBusy, SourceProblem
from app.replication.wal_index import Log

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

TORN_LOOKS = 20
"""After so many the index was not left half written for a moment only."""
Watch = Callable[["Follower"], None]


class Outgrown(Exception):
    """While an image was sent, the log grew too long: it would fill the application's disk."""


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
        watch: Watch = lambda _follower: None,
        shares: Shares | None = None,
    ) -> None:
        """`watch` is called whenever it has opened the file: its directory may be another one."""
        self.target = target
        self.watched: Path | None = None
        """The file, without links, whose changes wake it."""
        self.is_done = False
        """With `once`: all is sent."""
        self.refused: Refused | None = None
        """The last refusal."""
        self._shares = shares or Shares(limits.carried_bytes_all)
        self._replica = Replica(target, client, tell=tell, limits=limits, shares=self._shares)
        self._pool = pool
        self._limits = limits
        self._set_wal = set_wal
        self._watch = watch
        self._bell = Bell()
        self._source: Source | None = None
        self._carried: Carried | None = None
        self._seen: Log | None = None
        self._goal: Log | None = None
        self._once = False
        self._pace = CheckpointPace(limits.checkpoint_bytes // 4)
        self._who_waits = WhoWaits()
        self._torn_looks = 0
        self._problem = ""
        self._problem_since: float | None = None

    @property
    def status(self) -> Status:
        return self._replica.status

    @property
    def is_idle(self) -> bool:
        """All is sent, and it waits to be woken."""
        return self.status.caught_up and self._bell.is_idle

    @property
    def away_seconds(self) -> float:
        """Until the service is asked again."""
        return self._replica.away_seconds

    def wake(self) -> None:
        """The file may have changed."""
        self._bell.ring()

    @property
    def is_stopped(self) -> bool:
        return self._bell.is_stopped

    def stop(self) -> None:
        """Lets `run` end after what it does now."""
        self._bell.stop()

    async def pause(self, seconds: float) -> None:
        """Unless it is stopped."""
        await self._bell.pause(seconds)

    async def run(self, *, once: bool) -> None:
        """Follows until `stop`; with `once` until all is sent that was committed when it first
        looked. Raises Refused.
        """
        self._once = once
        try:
            while not self.is_stopped:
                if await self._step() and once:
                    self.is_done = True
                    return
        finally:
            await self._close()

    # --- see

    async def _step(self) -> bool:
        """One look, one decision, one deed. True once the goal of `once` is reached."""
        try:
            source = self._source or await self._open()
            look = await self._blocking(source.look_blocking)
            if not look.is_in_place:
                await self._close()
                self._replica.forget("the file was replaced")
                return False
            if look.log is None:
                await self._mend(source)
                return False
            self._torn_looks = 0
            if look.log != self._seen:
                self._seen = look.log
                self._bell.stir()
            view = await self._view(source, look.log, look.waiting_pid)
        except SourceProblem as problem:
            await self._cannot_follow(problem)
            return False
        except OSError as error:
            await self._cannot_follow(self._disk_problem(error))
            return False
        action = decide(view, self._limits)
        self._show(view)
        await self._done(source, action, view)
        return self._is_goal_reached(action)

    async def _done(self, source: Source, action: Action, view: View) -> None:
        """Whatever came in its way: then the next look sees how things stand."""
        try:
            await self._do(source, action, view)
        except SourceProblem as problem:
            await self._cannot_follow(problem)
        except OSError as error:
            await self._cannot_follow(self._disk_problem(error))
        except LogMoved:
            pass
        except Outgrown:
            await self._let_go(source, "the log outgrew the image that was being sent", view)
        except ServiceUnreachable as error:
            self._go_away(error.reason)
        except ProblemError as problem:
            is_image = isinstance(action, SendImage)
            self._replica.judge(problem, page_size=view.log.page_size, was_image=is_image)
            self._give_up_once(told(problem))
        except ClientError as error:
            self._go_away(str(error))
        else:
            if isinstance(action, SendWal | SendCarried | SendImage | Wait):
                self._problem, self._problem_since = "", None

    async def _mend(self, source: Source) -> None:
        """An index that is half written is so for a moment, unless its writer was killed in it."""
        self._torn_looks += 1
        if self._torn_looks < TORN_LOOKS:
            await self._bell.rest(SETTLE_SECONDS[1])
            return
        await self._blocking(source.mend_index_blocking)
        if await self._blocking(source.log_blocking) is None:
            raise SourceProblem(f"{source.path}-shm is half written, or of another SQLite")

    def _disk_problem(self, error: OSError) -> SourceProblem:
        return SourceProblem(f"{self.target.path} cannot be read: {error.strerror or error}")

    async def _open(self) -> Source:
        try:
            opened = await self._blocking(
                lambda: Source.open_blocking(self.target.path, set_wal=self._set_wal)
            )
        except NotFollowable as error:
            raise Refused(str(error), code="not_followable") from error
        self._source = opened
        self._watch(self)
        return opened

    async def _view(self, source: Source, log: Log, waiting_pid: int | None) -> View:
        position, found = self._replica.position, None
        if position is not None and position.salts == log.salts and position.checksums is not None:
            found = await self._blocking(source.checksums_at_blocking, log, position.offset)
        is_waited_for, is_new = self._who_waits.look(waiting_pid, log)
        if is_new:
            self._bell.stir()
        return View(
            log=log,
            lock=source.lock,
            position=position,
            found_checksums=found,
            carried=self._carried,
            free_bytes=self._shares.free_for(self),
            away=self._replica.is_away,
            may_checkpoint=self._pace.is_due(log, self._now()),
            image_reason=self._replica.image_reason,
            confirmed=self._replica.confirmed,
            quiet=self._bell.is_quiet,
            waited_for=is_waited_for,
        )

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
                await self._send_carried(view.log, start)
            case SendImage(reason=reason):
                await self._send_image(source, reason, view.log)
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
            await self._bell.pause(BATCH_SECONDS)

    async def _send_carried(self, log: Log, start: int) -> None:
        carried = self._carried
        assert carried is not None, "the plan saw it"
        offset = carried.offset + start
        end = self._replica.request_end(log, offset, carried.end)
        await self._replica.send_wal(
            carried.data[start : end - carried.offset],
            offset=offset,
            end=end,
            log_end=carried.end,
            after_lsn=None,
        )

    async def _send_image(self, source: Source, reason: str, log: Log) -> None:
        images = self._shares.images
        if images.locked():
            # it waits for its turn without the lock, which the image takes anew
            await self._blocking(source.let_go_blocking)
            self._keep(None)
            if log.end > self._limits.log_bytes:
                await self._blocking(source.backfill_blocking)
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                await images.acquire()
        except TimeoutError:
            return
        try:
            if not self.is_stopped:
                await self._send_image_now(source, reason)
        finally:
            images.release()

    async def _send_image_now(self, source: Source, reason: str) -> None:
        image = await self._blocking(source.image_blocking)
        log, total = image.log, image.content_bytes
        growth_bytes_max = 2 * behind_bytes_max(log, self._limits)
        self._keep(None)
        self.status.image_total_bytes = total
        self._replica.note(
            "image_sending", f"An image is sent: {reason}.", bytes=total, reason=reason
        )

        def look_blocking(at: int) -> tuple[bytes, Log | None]:
            return source.read_image_blocking(image, at), source.log_blocking()

        async def pieces() -> AsyncIterator[bytes]:
            at = 0
            while at < total:
                piece, now = await self._blocking(look_blocking, at)
                if now is not None and now.grown_since(log) > growth_bytes_max:
                    raise Outgrown
                at += len(piece)
                self.status.image_sent_bytes = at
                yield piece

        try:
            await self._replica.send_image(pieces, content_bytes=total, log=log)
        finally:
            self.status.image_sent_bytes = self.status.image_total_bytes = 0

    async def _sqlite_checkpoint(self, source: Source, log: Log, offset: int) -> None:
        most = self._carried_bytes_max(log)
        try:
            carried = await self._carrying(
                most,
                lambda: source.sqlite_checkpoint_blocking(
                    salts=log.salts, offset=offset, carried_bytes_max=most
                ),
            )
        except SourceProblem as problem:
            self._pace.failed(self._now())
            if isinstance(problem, SourceBusy) and source.lock is not None:
                return  # a long transaction: nothing is amiss
            raise
        if carried is None:
            return
        self._pace.done(source.lock)
        self.status.sqlite_checkpoints += 1
        self._replica.note(
            "sqlite_checkpoint", "The log was copied into the database file.", log_bytes=log.end
        )

    async def _step_aside(self, source: Source, log: Log, offset: int) -> None:
        most = self._carried_bytes_max(log)
        await self._carrying(
            most,
            lambda: source.step_aside_blocking(
                salts=log.salts, offset=offset, carried_bytes_max=most
            ),
        )
        await self._bell.rest(SETTLE_SECONDS[2])  # who waits sleeps too, between its tries

    def _carried_bytes_max(self, log: Log) -> int:
        return carried_bytes_max(log, self._limits, self._shares.free_for(self))

    async def _carrying(self, most: int, read: Callable[[], Carried | None]) -> Carried | None:
        """Memory for it is taken before it is read. None leaves what is carried as it was."""
        before = 0 if self._carried is None else len(self._carried.data)
        self._shares.take(self, max(most, before))
        carried: Carried | None = None
        try:
            carried = await self._blocking(read)
        finally:
            if carried is None:
                self._shares.take(self, before)
            else:
                self._keep(carried if carried.data else None)
        return carried

    def _keep(self, carried: Carried | None) -> None:
        self._carried = carried
        self._shares.take(self, 0 if carried is None else len(carried.data))

    async def _let_go(self, source: Source, reason: str, view: View) -> None:
        await self._blocking(source.let_go_blocking)
        unsent = unsent_bytes(view.log, view.position or view.confirmed, view.carried)
        self._replica.note(
            "let_go",
            f"The read lock was let go: {reason}. An image follows.",
            reason=reason,
            log_bytes=view.log.end,
            unsent_bytes=unsent,
        )
        self._keep(None)
        self._replica.forget("the read lock was let go")

    async def _wait(self, source: Source, view: View, *, caught_up: bool) -> None:
        quiet_seconds = self._bell.quiet_seconds(is_watched=source.path == self.watched)
        if caught_up:
            self._replica.come_back()
            if not self.status.caught_up:
                self.status.caught_up = True
                self.status.refusal_code = None  # the next one is news again
                self._replica.note("caught_up", "All is sent.", last_lsn=self.status.last_lsn)
            await self._bell.rest(quiet_seconds)
            return
        if source.lock is None and view.log.end > self._limits.log_bytes:
            await self._blocking(source.backfill_blocking)
        await self._bell.rest(min(self._replica.away_seconds, quiet_seconds) or 0.001)

    # --- what cannot go on

    def _go_away(self, reason: str) -> None:
        self._replica.go_away(reason)
        self._give_up_once(reason)

    def _give_up_once(self, reason: str) -> None:
        if self._once and self._replica.is_given_up:
            said = reason.rstrip(".")
            raise Refused(f"The service does not take it: {said}.", code="unreachable")

    async def _cannot_follow(self, problem: SourceProblem) -> None:
        now = self._now()
        since = self._problem_since = now if self._problem_since is None else self._problem_since
        is_patient = self._source is not None or isinstance(problem, SourceBusy)
        if self._once and (not is_patient or now - since > PATIENCE_SECONDS):
            raise Refused(f"{problem}.", code="file_error") from problem
        if str(problem) != self._problem:
            self._problem = str(problem)
            self._replica.note("waiting", f"{problem}.")
        # a lock that goes tells nobody, unlike a file that comes
        await self._bell.rest(POLL_SECONDS if is_patient else MISSING_SECONDS)

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

    # --- in the pool

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
        self._keep(None)
        self._seen = None
        self._pace.forget()
        self._who_waits.forget()
        if source is not None:
            await self._blocking(source.close_blocking)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    # --- tell

    def _show(self, view: View) -> None:
        status = self.status
        status.log_bytes = view.log.end
        status.unsent_bytes = unsent_bytes(view.log, view.position or view.confirmed, view.carried)
        if status.unsent_bytes:
            status.caught_up = False
