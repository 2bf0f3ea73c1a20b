"""One database's write-ahead log.

Invariants: I1: an append is answered once it is durable. I4: what is pinned is not removed.
I13: a refused or failed append leaves nothing. I14: LSNs are decided in the flush, in the order
of the queue, so that a failed group takes none. I16: after a failure of the disk nothing more is
acknowledged, here or in any other log.
Concurrency: every method belongs to the event loop. One flush at a time runs on a writer thread;
what it has made durable is taken over by one call back into the loop.
Cancellation: who leaves takes nothing back; a queued append is written all the same.
Crash: see recovery.py.
"""

import asyncio
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from app.core.base.clock import Clock
from app.core.base.errors import (
    BopError,
    CorruptWal,
    DiskFull,
    InvariantViolation,
    LsnMismatch,
    NotReady,
    StorageFailure,
    WalLost,
)
from app.core.base.events import Events
from app.core.base.tasks import BlockingPool, uninterrupted
from app.core.stores.wal.draft import Draft
from app.core.stores.wal.failure import FailStop
from app.core.stores.wal.flush import Flushed, Flusher, Sealed
from app.core.stores.wal.group_commit import AppendQueue, Group, WaitingAppend, WaitingSeal, fail
from app.core.stores.wal.keyed import KeyedAppends
from app.core.stores.wal.log_frames import LogFrames
from app.core.stores.wal.pins import PinnedSegment, WalPin
from app.core.stores.wal.recovery import Health, Recovered
from app.core.stores.wal.remembered import RememberedAppend
from app.core.stores.wal.requests import (
    Appended,
    AppendRequest,
    EntryPayload,
    MemoryPayload,
    write_bytes_of,
)
from app.core.stores.wal.room import Hold, WalRoom
from app.core.stores.wal.segments import (
    CatalogSegment,
    LogConfig,
    NewSegment,
    Segment,
    SegmentCatalog,
    SegmentInfo,
)
from app.core.stores.wal.waiters import LsnWaiters
from app.core.stores.wal.writer import LogWriter

__all__ = [
    "AppendRequest",
    "Appended",
    "CatalogSegment",
    "EntryPayload",
    "Health",
    "LogConfig",
    "MemoryPayload",
    "NewSegment",
    "PinnedSegment",
    "RememberedAppend",
    "SegmentCatalog",
    "SegmentInfo",
    "WalLog",
    "WalPin",
]


class WalLog:
    def __init__(
        self,
        config: LogConfig,
        recovered: Recovered,
        *,
        frames: LogFrames | None = None,
        writer: LogWriter,
        room: WalRoom,
        pool: BlockingPool,
        fail_stop: FailStop,
        clock: Clock,
        events: Events,
    ) -> None:
        self._db_id = config.db_id
        self._frames = frames
        self._writer = writer
        self._room = room
        self._flusher = Flusher(
            writer, chunk_bytes=config.chunk_bytes, has_frames=frames is not None,
            fail_stop=fail_stop, clock=clock,
        )  # fmt: skip
        self._pool = pool
        self._fail_stop = fail_stop
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._segments = {segment.segment_id: segment for segment in recovered.segments}
        self._unsealed = recovered.unsealed
        self._next_lsn = self._floor_lsn = recovered.next_lsn
        self._health = recovered.health
        self._lost_from_lsn = recovered.lost_from_lsn
        self._lost_segment_ids = recovered.lost_segment_ids
        self._sealed_bytes = sum(
            segment.info.file_bytes for segment in recovered.segments if segment.info
        )
        self._published_bytes = sum(
            segment.info.file_bytes
            for segment in recovered.segments
            if segment.info and segment.info.state == "checkpointed"
        )
        self._keyed = KeyedAppends(clock, kept=config.remembered, recovered=recovered.remembered)
        self._queue = AppendQueue()
        self._waiters = LsnWaiters()
        self._flushing = False
        self._closing: Exception | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._removing = asyncio.Lock()
        self._tell_unpublished()

    # --- what is there ------------------------------------------------------------------------

    @property
    def db_id(self) -> int:
        return self._db_id

    @property
    def next_lsn(self) -> int:
        """What the next append will take: all below it is durable, or was never given out."""
        return max(self._next_lsn, self._floor_lsn)

    @property
    def durable_lsn(self) -> int:
        return self.next_lsn - 1

    @property
    def sealed_lsn(self) -> int:
        """All durable LSNs up to it are in sealed segments or no longer in the WAL."""
        filling = (one.first_lsn for one in self._unsealed if one.durable.entries)
        return next(filling, self.next_lsn) - 1

    @property
    def first_lsn(self) -> int | None:
        """The oldest LSN in the WAL."""
        return next((segment.first_lsn for segment in self._segments.values()), None)

    @property
    def frames(self) -> LogFrames:
        """Pages and the last request; of libsql databases only."""
        if self._frames is None:
            raise InvariantViolation("The log holds records, no frames.", db_id=self._db_id)
        return self._frames

    @property
    def health(self) -> Health:
        return self._health

    @property
    def lost_from_lsn(self) -> int | None:
        return self._lost_from_lsn

    @property
    def lost_segment_ids(self) -> tuple[int, ...]:
        """Rows without a file, to be removed when the loss is acknowledged: a restart would find
        the loss again.
        """
        return self._lost_segment_ids

    @property
    def wal_bytes(self) -> int:
        return self._sealed_bytes + self.unsealed_bytes

    @property
    def unpublished_bytes(self) -> int:
        """Of the WAL that no generation covers yet."""
        return self.wal_bytes - self._published_bytes

    @property
    def unsealed_bytes(self) -> int:
        return sum(
            segment.durable.entries_end for segment in self._unsealed if segment.durable.entries
        )

    def sealed_segments(self) -> tuple[SegmentInfo, ...]:
        """In LSN order."""
        return tuple(segment.info for segment in self._segments.values() if segment.info)

    def remembered_of(self, segment_id: int) -> tuple[RememberedAppend, ...]:
        """Keyed appends that begin in a segment: to be kept in the manifest before it goes."""
        return self._keyed.of_segment(segment_id)

    @property
    def is_pinned(self) -> bool:
        """Whether a reader holds any of its segments."""
        return any(segment.pins for segment in self._segments.values())

    def pin(self, first_lsn: int, last_lsn: int) -> WalPin:
        """Every segment with durable LSNs in the range, in LSN order."""
        return WalPin(
            [
                segment
                for segment in self._segments.values()
                if segment.first_lsn <= last_lsn and first_lsn < segment.durable.next_lsn
            ]
        )

    # --- appending ----------------------------------------------------------------------------

    async def draft(self, request: AppendRequest) -> Draft | None:
        """For an append whose bytes have yet to arrive, to be given to `append` with it. None where
        it would not begin a segment, or the disk cannot name files later.
        """
        self._check_open()
        if self._unsealed or self._flushing or request.key_hash is not None:
            return None
        draft = await self._pool.run(self._flusher.draft_blocking, request, self.next_lsn)
        return draft if await self._pool.run(draft.is_possible_blocking) else None

    async def append(self, request: AppendRequest, *, draft: Draft | None = None) -> Appended:
        """Returns once all of it is durable; `draft` is of this request. Raises LsnMismatch,
        IdempotencyKeyReused, Backpressure, QuotaExhausted, DiskFull, WalLost, CorruptWal, NotReady,
        StorageFailure.
        """
        payload_bytes = request.check()
        size_bytes = write_bytes_of(request, payload_bytes=payload_bytes)
        while True:
            self._check_open()
            if request.key_hash is not None:
                replayed = await self._keyed.replay(request)
                if replayed is not None:
                    return replayed
            hold = self._room.hold(size_bytes)
            if hold is not None:
                break
            await self._room.make_way(size_bytes)
        if request.key_hash is None:
            return await self._enqueue(request, payload_bytes, hold, draft)
        answer = self._enqueue(request, payload_bytes, hold)
        self._keyed.begin(request, answer)
        return await asyncio.shield(answer)  # replays wait for it too

    async def seal(self) -> None:
        """All that was appended before is in sealed segments. Raises DiskFull, CorruptWal,
        NotReady, StorageFailure, or what the catalogue refused with.
        """
        self._check_running()
        if self._health == "corrupt_wal":
            raise CorruptWal(db_id=self.db_id)
        if not self._flushing and not self._unsealed:
            return
        waiting = WaitingSeal(self._loop.create_future())
        self._queue.put_seal(waiting)
        self._wake()
        await waiting.done

    async def wait_for(self, lsn: int) -> None:
        """Until `lsn` is durable. Raises NotReady when the log is closed, StorageFailure."""
        self._check_running()
        if lsn > self.durable_lsn:
            await self._waiters.wait(lsn)

    def raise_floor(self, floor_lsn: int) -> None:
        """LSNs below it are not given out any more; those being written may yet be."""
        self._floor_lsn = max(self._floor_lsn, floor_lsn)
        self._waiters.wake(self.durable_lsn)

    # --- letting go ---------------------------------------------------------------------------

    def mark_checkpointed(self, segment_ids: Iterable[int]) -> None:
        """A published generation covers them."""
        for segment_id in segment_ids:
            segment = self._segments.get(segment_id)
            if segment is None or segment.info is None or segment.info.state == "checkpointed":
                continue
            segment.info = replace(segment.info, state="checkpointed")
            self._published_bytes += segment.info.file_bytes
        self._tell_unpublished()

    async def remove(self, segment_ids: Collection[int]) -> tuple[int, ...]:
        """Deletes the files of those that are sealed and not pinned; returns the ids whose files
        are gone, those that were gone before included. The others go by a later call.
        """
        self._check_running()
        async with self._removing:
            gone = tuple(segment_id for segment_id in segment_ids if self._may_go(segment_id))
            if not gone:
                return ()
            if self._frames is not None:
                self._frames.remove(gone)
            removed: list[Segment] = []
            for segment_id in gone:  # nobody can pin them from here on
                segment = self._segments.pop(segment_id, None)
                if segment is not None and segment.info is not None:
                    removed.append(segment)
                    self._sealed_bytes -= segment.info.file_bytes
                    if segment.info.state == "checkpointed":
                        self._published_bytes -= segment.info.file_bytes
            await uninterrupted(self._remove_files(gone, removed))
            return gone

    async def _remove_files(self, gone: Sequence[int], removed: Sequence[Segment]) -> None:
        try:
            await self._pool.run(self._writer.remove_blocking, gone)
        except StorageFailure as failure:
            self._fail_stop.trip(failure)
            raise
        except NotReady:  # gone, if not durably: a later call sees to that
            self._give_back_room(removed)
            raise
        self._give_back_room(removed)

    def _give_back_room(self, removed: Sequence[Segment]) -> None:
        for segment in removed:
            device, inode = segment.identity
            self._room.discharge(segment.path.name, device=device, inode=inode)
        self._tell_unpublished()

    def _may_go(self, segment_id: int) -> bool:
        segment = self._segments.get(segment_id)
        if segment is not None:
            return segment.info is not None and segment.pins == 0
        return all(open_one.segment_id != segment_id for open_one in self._unsealed)

    async def acknowledge_loss(self) -> None:
        """Appends are taken again, above every LSN that may have been given out."""
        if self._health == "wal_lost":
            self._health = "ok"
            self._lost_from_lsn = None
            self._lost_segment_ids = ()

    async def aclose(self, reason: Exception | None = None) -> None:
        """Ends after what is queued is durable; nothing new is taken, and long polls end."""
        self._closing = self._closing or reason or NotReady("The log is closed.")
        self._waiters.fail(self._closing)
        await self._idle.wait()

    def forget_room(self) -> None:
        """Its files are gone."""
        self._room.forget()

    def close_files_blocking(self) -> None:
        self._writer.close_blocking(self._unsealed)

    def fail_waiting(self, error: Exception) -> None:
        """Everything that is queued, and every long poll."""
        for waiting in self._queue.take_all():
            if isinstance(waiting, WaitingSeal):
                fail(waiting.done, error)
            else:
                self._keyed.end(waiting.request)
                waiting.hold.release()
                fail(waiting.answer, error)
        self._waiters.fail(error)

    # --- flushing -----------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._health == "wal_lost":
            raise WalLost(lost_from_lsn=self._lost_from_lsn)
        if self._health == "corrupt_wal":
            raise CorruptWal(db_id=self.db_id)
        self._check_running()

    def _check_running(self) -> None:
        self._fail_stop.check()
        if self._closing is not None:
            raise self._closing.with_traceback(None)

    def _enqueue(
        self, request: AppendRequest, payload_bytes: int, hold: Hold, draft: Draft | None = None
    ) -> asyncio.Future[Appended]:
        try:
            answer = self._loop.create_future()
            waiting = WaitingAppend(request, payload_bytes, answer, hold, draft)
            self._queue.put(waiting)
        except BaseException:
            hold.release()
            raise
        self._wake()
        return waiting.answer

    def _wake(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._idle.clear()
            # Not at once: whoever is ready in this turn of the loop joins the group.
            self._loop.call_soon(self._start_flush)

    def _start_flush(self) -> None:
        if not self._queue:
            self._flushing = False
            self._idle.set()
            return
        self._pool.submit(
            self._flusher.flush_blocking,
            self._queue.take(), self.next_lsn, self._unsealed, self._tell_loop,
        )  # fmt: skip

    def _tell_loop(self, done: Flushed | Sealed) -> None:
        """From the writer thread."""
        try:
            self._loop.call_soon_threadsafe(self._take, done)
        except RuntimeError:
            if not self._loop.is_closed():  # else nobody is left to be told
                raise

    def _take(self, done: Flushed | Sealed) -> None:
        error = done.error
        try:
            match done:
                case Flushed():
                    self._take_flushed(done)
                case Sealed():
                    self._take_sealed(done)
        except Exception as bug:  # noqa: BLE001 - it must leave nobody without an answer
            error = StorageFailure(f"What was flushed cannot be taken over: {bug!r}")
            error.__cause__ = bug
            self._fail_stop.trip(error)
            for waiting in done.group.appends:
                self._keyed.end(waiting.request)
                fail(waiting.answer, error)
        if isinstance(done, Sealed) or not done.sealing:
            self._end_group(done.group, error)

    def _take_flushed(self, flushed: Flushed) -> None:
        appends = flushed.group.appends
        error = flushed.error or self._fail_stop.cause
        if error is not None:
            for waiting in appends:
                self._keyed.end(waiting.request)
                waiting.hold.release()
                fail(waiting.answer, error)
            return
        plan = flushed.plan
        self._unsealed = flushed.unsealed
        for segment, marks in flushed.written:
            segment.durable = marks
            self._segments.setdefault(segment.segment_id, segment)
            self._charge(segment)
        self._next_lsn = plan.next_lsn
        if self._frames is not None:
            self._frames.take(flushed.written, flushed.frames)
        for waiting, outcome in zip(appends, plan.outcomes, strict=True):
            self._keyed.end(waiting.request)
            if isinstance(outcome, LsnMismatch):
                waiting.hold.release()
                fail(waiting.answer, outcome)
                continue
            waiting.hold.spend()
            appended = outcome.appended
            self._keyed.remember(waiting.request, appended, segment_id=outcome.segment_id)
            if not waiting.answer.done():
                waiting.answer.set_result(appended)
        if flushed.written:
            self._tell_unpublished()
            self._waiters.wake(self.durable_lsn)
            self._events.debug(
                "wal.flushed", db_id=self._db_id, requests=len(appends),
                bytes=plan.write_bytes, seconds=flushed.seconds,
            )  # fmt: skip

    def _take_sealed(self, done: Sealed) -> None:
        for segment, info in done.sealed:
            segment.info = info
            self._sealed_bytes += info.file_bytes
            self._charge(segment)
            self._events.info(
                "wal.sealed", db_id=self._db_id, segment_id=info.segment_id,
                first_lsn=info.first_lsn, last_lsn=info.last_lsn, bytes=info.file_bytes,
            )  # fmt: skip
        self._unsealed = [segment for segment in self._unsealed if segment.info is None]
        self._tell_unpublished()

    def _charge(self, segment: Segment) -> None:
        device, inode = segment.identity
        self._room.charge(
            segment.path.name, device=device, inode=inode, size_bytes=segment.file_bytes
        )

    def _tell_unpublished(self) -> None:
        self._room.unpublished(self.unpublished_bytes)

    def _end_group(self, group: Group, error: Exception | None) -> None:
        if isinstance(error, BopError):
            name = "wal.disk_full" if isinstance(error, DiskFull) else "wal.refused"
            self._events.warning(name, db_id=self._db_id, detail=str(error))
        failure = self._fail_stop.cause
        if group.seal is not None:
            if error is not None or failure is not None:
                fail(group.seal.done, error or failure)
            elif not group.seal.done.done():
                group.seal.done.set_result(None)
        if failure is not None:
            self.fail_waiting(failure)
        self._start_flush()
