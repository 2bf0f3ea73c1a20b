"""Follows one database: sees, decides (`plan`), does.

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
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, TypeVarTuple

from app.client import BopClient, ClientError, ProblemError, ServiceUnreachable
from app.client.libsql import wal_position
from app.client.wire import WalPosition, WalStored
from app.replication.events import Event, Kind, Status, Tell
from app.replication.plan import (
    Action,
    AskPosition,
    Carried,
    LetGo,
    Limits,
    Position,
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
from app.replication.source import PIECE_BYTES, LogMoved, NotFollowable, Source, SourceProblem
from app.replication.wal_index import LOG_HEADER_BYTES, Log, Salts, log_header

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

NO_LOG: Salts = (0x626F7021, 0x3F3F3F3F)
"""Salts that ask: a log that the service cannot have gives its position in the refusal."""
SETTLE_SECONDS = (0.002, 0.01, 0.05, 0.25, 1.0)
"""When to look again after a change was seen: the index changes behind the log, unannounced."""
IDLE_SECONDS = 10.0
"""When to look without having been woken, where waking works."""
POLL_SECONDS = 0.25
"""And where it does not."""
BATCH_SECONDS = 0.01
"""Commits of this time go together."""
AWAY_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0)
GAPS_MAX = 3
"""Refusals in a row without a frame stored, until an image is sent."""

_LATER = frozenset({429, 500, 502, 503, 504, 507})
_NEEDS_IMAGE = {
    "wal_invalid": "the service could not read the log",
    "transaction_too_large": "a transaction is longer than the service takes as WAL",
    "body_too_large": "a transaction is longer than the service takes as WAL",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    path: Path
    tenant: str
    database: str

    @property
    def name(self) -> str:
        return f"{self.tenant}/{self.database}"


class Refused(Exception):
    """The database cannot be followed until someone changes something."""

    def __init__(self, detail: str, *, code: str) -> None:
        self.code = code
        super().__init__(detail)


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
        self.status = Status()
        self.is_watched = False
        self._client = client
        self._pool = pool
        self._tell = tell
        self._limits = limits
        self._set_wal = set_wal
        self._changed = asyncio.Event()
        self._stopping = asyncio.Event()
        self._settling = 0
        self._source: Source | None = None
        self._position: Position | None = None
        self._confirmed: Position | None = None
        self._carried: Carried | None = None
        self._image_reason: str | None = None
        self._page_size: int | None = None
        self._seen: Log | None = None
        self._goal: Log | None = None
        self._waiting: tuple[int, Log] | None = None
        self._once = False
        self._checkpointed_at: Log | None = None
        self._away_count = 0
        self._away_until = 0.0
        self._gap_count = 0
        self._request_bytes = limits.request_bytes
        self._problem = ""

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
            source = await self._opened()
            log = await self._blocking(source.log_blocking)
        except SourceProblem as problem:
            await self._cannot_follow(problem)
            return False
        if log is None or source is not self._source:
            await self._rest(SETTLE_SECONDS[1])
            return False
        if log != self._seen:
            self._seen, self._settling = log, 0
        view = await self._view(source, log)
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
            self._judge(problem, action)
        except ClientError as error:
            self._go_away(str(error))
        return self._is_goal_reached(action)

    async def _opened(self) -> Source:
        source = self._source
        if source is not None and await self._blocking(lambda: source.is_in_place):
            return source
        if source is not None:
            await self._close()
            self._image_reason = "the file was replaced"
        try:
            opened = await self._blocking(
                lambda: Source.open_blocking(self.target.path, set_wal=self._set_wal)
            )
        except NotFollowable as error:
            raise Refused(str(error), code="not_followable") from error
        self._source = opened
        self._problem = ""
        return opened

    async def _view(self, source: Source, log: Log) -> View:
        position, found = self._position, None
        if position is not None and position.salts == log.salts and position.checksums is not None:
            found = await self._blocking(source.checksums_at_blocking, log, position.offset)
        last = self._checkpointed_at
        return View(
            log=log,
            lock=source.lock,
            position=position,
            found_checksums=found,
            carried=self._carried,
            away=self._away_count > 0 and self._now() < self._away_until,
            may_checkpoint=last is None
            or last.salts != log.salts
            or log.end >= last.end + self._limits.checkpoint_bytes // 4,
            image_reason=self._image_reason,
            confirmed=self._confirmed,
            waited_for=source.lock is not None and await self._is_waited_for(source, log),
        )

    async def _is_waited_for(self, source: Source, log: Log) -> bool:
        """Twice the same at the same state of the log: a writer and a passive sqlite_checkpoint of
        one process look alike, but not for long.
        """
        pid = await self._blocking(source.waiting_pid_blocking)
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
                await self._ask_position(view.log)
            case TakeLock():
                await self._blocking(source.take_lock_blocking)
                self._note("following", "Followed.", last_lsn=self.status.last_lsn)
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

    async def _ask_position(self, log: Log) -> None:
        """Makes the database where it is missing, and asks how far it is."""
        tenant, name = self.target.tenant, self.target.database
        if self._page_size != log.page_size:
            await self._client.databases.create(
                tenant, name, engine="libsql", page_size=log.page_size
            )
            self._page_size = log.page_size
        found = await self._client.databases.get(tenant, name)
        position = WalPosition(last_lsn=found.next_lsn - 1)
        if found.next_lsn > 1:
            question = log_header(page_size=log.page_size, salts=NO_LOG)
            try:
                await self._client.libsql.push_wal(
                    tenant, name, question, content_bytes=len(question), offset=0
                )
            except ProblemError as problem:
                if problem.code != "wal_gap":
                    raise
                position = wal_position(problem)
        self._settle_position(position)
        self._come_back()

    def _settle_position(self, answer: WalPosition) -> None:
        """What the service says, joined with what is known here: the same LSN is the same state."""
        self.status.last_lsn = answer.last_lsn
        salts = checksums = None
        if answer.salt1 is not None and answer.salt2 is not None and answer.offset:
            salts = (answer.salt1, answer.salt2)
        if answer.checksum1 is not None and answer.checksum2 is not None:
            checksums = (answer.checksum1, answer.checksum2)
        known = self._confirmed
        if salts is None and known is not None and known.last_lsn == answer.last_lsn:
            self._position = known
            return
        self._position = Position(
            last_lsn=answer.last_lsn,
            salts=salts,
            offset=answer.offset or 0,
            checksums=checksums,
        )

    async def _send_wal(
        self, source: Source, log: Log, offset: int, end: int, after_lsn: int | None
    ) -> None:
        end = min(end, _frame_end(log, offset, self._request_bytes))

        async def pieces() -> AsyncIterator[bytes]:
            at = offset
            while at < end:
                to = min(end, at + PIECE_BYTES)
                yield await self._blocking(source.read_log_blocking, log.salts, at, to)
                at = to

        stored = await self._push(pieces, end - offset, offset, after_lsn)
        if stored.accepted_offset > max(offset, LOG_HEADER_BYTES):
            self._request_bytes = self._limits.request_bytes
        elif end < log.end and self._request_bytes < self._limits.request_bytes_max:
            self._request_bytes = min(2 * self._request_bytes, self._limits.request_bytes_max)
        else:
            self._gap("the service takes no frame of the log")

    async def _send_carried(self, start: int) -> None:
        carried = self._carried
        assert carried is not None, "the plan saw it"
        data = carried.data[start:]
        await self._push(data, len(data), carried.offset + start, None)

    async def _push(
        self,
        body: "bytes | Callable[[], AsyncIterator[bytes]]",
        content_bytes: int,
        offset: int,
        after_lsn: int | None,
    ) -> WalStored:
        before, self._position = self._position, None  # unknown until there is an answer
        stored = await self._client.libsql.push_wal(
            self.target.tenant,
            self.target.database,
            body,
            content_bytes=content_bytes,
            offset=offset,
            after_lsn=after_lsn,
        )
        if stored.last_lsn is None:
            # nothing new: no commit within the body, or, further on, frames it had already; then
            # it is asked where it stands, for the LSN
            if stored.accepted_offset <= max(offset, LOG_HEADER_BYTES):
                self._position = before
            return stored
        self._confirm(
            Position(
                last_lsn=stored.last_lsn,
                salts=(stored.salt1, stored.salt2),
                offset=stored.accepted_offset,
            )
        )
        self._gap_count = 0
        self.status.sent_bytes += stored.accepted_offset - offset
        self._note(
            "wal_sent",
            f"{stored.frames} frames, {stored.commits} commits sent.",
            frames=stored.frames,
            commits=stored.commits,
            last_lsn=stored.last_lsn,
        )
        await self._pause(BATCH_SECONDS)
        return stored

    async def _send_image(self, source: Source, reason: str) -> None:
        image = await self._blocking(source.image_blocking)
        log, total = image.log, image.content_bytes
        self._carried = None
        self.status.image_total_bytes = total
        self._note("image_sending", f"An image is sent: {reason}.", bytes=total, reason=reason)

        async def pieces() -> AsyncIterator[bytes]:
            at = 0
            while at < total:
                piece = await self._blocking(source.read_image_blocking, image, at)
                at += len(piece)
                self.status.image_sent_bytes = at
                yield piece

        self._position = None
        position = {
            "salt1": log.salts[0],
            "salt2": log.salts[1],
            "offset": log.end,
            "checksum1": log.checksums[0],
            "checksum2": log.checksums[1],
        }
        try:
            stored = await self._client.libsql.put_image(
                self.target.tenant,
                self.target.database,
                pieces,
                content_bytes=total,
                position=position if log.frames else None,
            )
        finally:
            self.status.image_sent_bytes = self.status.image_total_bytes = 0
        self._confirm(Position(last_lsn=stored.lsn, salts=log.salts, offset=log.end))
        self._image_reason = None
        self._gap_count = 0
        self.status.images += 1
        self._note(
            "image_sent",
            f"An image of {stored.page_count} pages was sent, {stored.changed_pages} of them new.",
            last_lsn=stored.lsn,
            page_count=stored.page_count,
            changed_pages=stored.changed_pages,
        )

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
        self._note(
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
        unsent = unsent_bytes(view.log, view.position or self._confirmed, view.carried)
        self._note(
            "let_go",
            f"The read lock was let go: {reason}. An image follows.",
            reason=reason,
            log_bytes=view.log.end,
            unsent_bytes=unsent,
        )
        self._position = self._confirmed = None
        self._image_reason = "the read lock was let go"

    async def _wait(self, source: Source, view: View, *, caught_up: bool) -> None:
        if caught_up:
            if not self.status.caught_up:
                self.status.caught_up = True
                self._note("caught_up", "All is sent.", last_lsn=self.status.last_lsn)
            await self._rest(self._quiet_seconds())
            return
        if source.lock is None and view.log.end > self._limits.log_bytes:
            await self._blocking(source.backfill_blocking)
        left = max(0.0, self._away_until - self._now())
        await self._rest(min(left, self._quiet_seconds()) or 0.001)

    # --- judge

    def _judge(self, problem: ProblemError, action: Action) -> None:
        """What a refusal means. Raises Refused for one that asking again does not change."""
        if problem.code == "wal_gap":
            self._settle_position(wal_position(problem))
            self._gap("the service refuses to go on where it says it is")
        elif problem.status in _LATER:
            self._go_away(problem.detail or problem.title, problem.retry_after_seconds or 0.0)
        elif problem.code in _NEEDS_IMAGE and not isinstance(action, SendImage):
            self._image_reason = _NEEDS_IMAGE[problem.code]
        elif problem.code in {"database_conflict", "page_size_mismatch"}:
            size = self._seen.page_size if self._seen is not None else 0
            raise Refused(
                f"{self.target.path} has pages of {size} bytes, which is not what "
                f"{self.target.name} was made for: {problem.detail or problem.title}",
                code=problem.code,
            ) from problem
        else:
            raise Refused(problem.detail or problem.title, code=problem.code) from problem

    def _gap(self, reason: str) -> None:
        self._gap_count += 1
        if self._gap_count >= GAPS_MAX:
            self._gap_count = 0
            self._image_reason = reason

    def _go_away(self, reason: str, at_least_seconds: float = 0.0) -> None:
        """The service is not asked for a while; what became of the last request is not known."""
        self._position = None
        seconds = AWAY_SECONDS[min(self._away_count, len(AWAY_SECONDS) - 1)]
        self._away_count += 1
        self._away_until = self._now() + max(seconds, at_least_seconds)
        self.status.away = True
        self.status.caught_up = False
        if self._away_count == 1:
            self._note("service_away", f"The service is away: {reason}.", reason=reason)
        if self._once and self._away_count > len(AWAY_SECONDS):
            raise Refused(f"The service does not take it: {reason}.", code="unreachable")

    def _come_back(self) -> None:
        if self._away_count:
            self._note("service_back", "The service is back.", last_lsn=self.status.last_lsn)
        self._away_count = 0
        self.status.away = False

    async def _cannot_follow(self, problem: SourceProblem) -> None:
        if self._once and self._source is None:
            raise Refused(f"{problem}.", code="file_error") from problem
        if str(problem) != self._problem:
            self._problem = str(problem)
            self._note("waiting", f"{problem}.")
        await self._rest(POLL_SECONDS)

    def _confirm(self, position: Position) -> None:
        self._position = self._confirmed = position
        self.status.last_lsn = position.last_lsn
        self._come_back()

    def _is_goal_reached(self, action: Action) -> bool:
        source = self._source
        if source is None or source.lock is None or self._seen is None:
            return False
        if self._goal is None:
            self._goal = self._seen
        if action == Wait(caught_up=True) or self.status.images:
            return True
        position = self._position
        if position is None or position is not self._confirmed:
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
        if self._settling < len(SETTLE_SECONDS):
            self._settling += 1
            return SETTLE_SECONDS[self._settling - 1]
        return IDLE_SECONDS if self.is_watched else POLL_SECONDS

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

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
        self._position = self._confirmed = self._carried = None
        self._seen = self._checkpointed_at = self._waiting = None
        if source is not None:
            await self._blocking(source.close_blocking)

    # --- tell

    def _show(self, view: View) -> None:
        status = self.status
        status.log_bytes = view.log.end
        status.unsent_bytes = unsent_bytes(view.log, view.position or self._confirmed, view.carried)
        if status.unsent_bytes:
            status.caught_up = False

    def _note(self, kind: Kind, detail: str, **members: int | str | None) -> None:
        self._tell(Event(event=kind, database=self.target.name, detail=detail, members=members))


def _frame_end(log: Log, offset: int, request_bytes: int) -> int:
    """The frame boundary that a request from `offset` goes to, behind one frame at least."""
    first = offset or LOG_HEADER_BYTES
    return first + max(1, request_bytes // log.frame_bytes) * log.frame_bytes
