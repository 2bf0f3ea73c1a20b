"""The write-ahead logs of all databases, under one directory and one bounded pool of writers.

Invariants: I1, I13, I14, I16: see log.py; a failure of the disk under one log ends them all.
Concurrency: made, used and closed on one event loop; flushes of different logs run side by side.
Cancellation: opening and dropping a log run to their end.
Crash: a dropped log may be left in part; dropping it again finishes it.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from app.core.base.clock import Clock
from app.core.base.errors import (
    BopError,
    DatabaseNotFound,
    InvariantViolation,
    StorageFailure,
)
from app.core.base.events import Events
from app.core.base.tasks import BlockingPool, uninterrupted
from app.core.formats.damage import Damage
from app.core.stores.wal.disk import Disk, SystemDisk
from app.core.stores.wal.failure import FailStop
from app.core.stores.wal.log import WalLog
from app.core.stores.wal.log_frames import LogFrames, last_request_blocking
from app.core.stores.wal.recovery import Recovered, recover_blocking
from app.core.stores.wal.room import EndlessRoom, WalRoom
from app.core.stores.wal.segments import CatalogSegment, LogConfig, SegmentCatalog
from app.core.stores.wal.writer import LogWriter


class WalStore:
    def __init__(
        self,
        root: Path,
        *,
        clock: Clock,
        events: Events,
        catalog: SegmentCatalog,
        on_fatal: Callable[[BaseException], None],
        threads: int = 4,
        disk: Disk | None = None,
    ) -> None:
        self._root = root
        self._clock = clock
        self._events = events
        self._catalog = catalog
        self._on_fatal = on_fatal
        self._disk = disk or SystemDisk()
        self._pool = BlockingPool("wal", threads=threads)
        self._fail_stop = FailStop(self._tripped)
        self._logs: dict[int, WalLog] = {}
        self._opening: set[int] = set()
        self._root_made = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def log(self, db_id: int) -> WalLog:
        """Raises DatabaseNotFound for one that is not open."""
        try:
            return self._logs[db_id]
        except KeyError:
            raise DatabaseNotFound(f"No log of database {db_id} is open.", db_id=db_id) from None

    def logs(self) -> Iterable[WalLog]:
        return tuple(self._logs.values())

    async def open_log(
        self, config: LogConfig, rows: Sequence[CatalogSegment], *, room: WalRoom | None = None
    ) -> WalLog:
        """Recovers it: torn tails are cut, all segments but the last sealed. Damage and loss are
        told by `health`. Files that are there already are not charged to `room`. Raises
        StorageFailure.
        """
        self._fail_stop.check()
        if config.db_id in self._logs or config.db_id in self._opening:
            raise InvariantViolation("A log is opened once.", db_id=config.db_id)
        self._loop = asyncio.get_running_loop()
        self._opening.add(config.db_id)
        try:
            return await uninterrupted(self._open(config, tuple(rows), room or EndlessRoom()))
        finally:
            self._opening.discard(config.db_id)

    async def drop_log(self, db_id: int) -> None:
        """Its directory is gone. What waits in it fails with DatabaseNotFound. Repeatable."""
        self._loop = asyncio.get_running_loop()
        log = self._logs.pop(db_id, None)
        gone = DatabaseNotFound("The database was deleted.", db_id=db_id)
        if log is not None:
            log.fail_waiting(gone)
        await uninterrupted(self._drop(db_id, log, gone))

    async def aclose(self) -> None:
        """Ends after what is queued is durable."""
        for log in self.logs():
            await log.aclose()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self._pool.close_blocking)
        for log in self.logs():
            log.close_files_blocking()
        self._logs.clear()

    # --- opening ------------------------------------------------------------------------------

    async def _open(
        self, config: LogConfig, rows: tuple[CatalogSegment, ...], room: WalRoom
    ) -> WalLog:
        directory = self._root / str(config.db_id)
        writer = LogWriter(
            self._disk,
            directory=directory,
            db_id=config.db_id,
            engine=config.engine,
            chunk_bytes=config.chunk_bytes,
            catalog=self._catalog,
        )
        started = self._clock.monotonic()
        try:
            recovered, seal_error = await self._pool.run(
                self._recover_blocking, directory, config, rows, writer
            )
        except StorageFailure as failure:
            self._fail_stop.trip(failure)
            raise
        seconds = self._clock.monotonic() - started
        self._tell(config.db_id, recovered, seal_error, seconds)
        frames = None
        if config.page_size:
            frames = LogFrames(
                page_size=config.page_size,
                segments=recovered.segments,
                last=recovered.last_request,
                disk=self._disk,
                pool=self._pool,
            )
        log = WalLog(
            config,
            recovered,
            frames=frames,
            writer=writer,
            room=room,
            pool=self._pool,
            fail_stop=self._fail_stop,
            clock=self._clock,
            events=self._events,
        )
        self._logs[config.db_id] = log
        return log

    def _recover_blocking(
        self,
        directory: Path,
        config: LogConfig,
        rows: tuple[CatalogSegment, ...],
        writer: LogWriter,
    ) -> tuple[Recovered, BopError | None]:
        self._make_root_blocking()
        recovered = recover_blocking(self._disk, directory=directory, config=config, rows=rows)
        if recovered.adopted:
            self._register_blocking(config, recovered)
        # From the end backwards: after a crash between, what is left is still a torn tail.
        for segment in reversed(recovered.to_cut):
            writer.truncate_blocking(segment)
        if recovered.unregistered_ids:
            writer.remove_blocking(recovered.unregistered_ids)
        seal_error = None
        try:
            for segment in recovered.unsealed[:]:
                is_tail = segment is recovered.unsealed[-1] and segment.file_sealed is None
                if not is_tail:
                    segment.info = writer.seal_blocking(segment)
        except BopError as error:
            seal_error = error  # the next flush tries again
        recovered.unsealed = [one for one in recovered.unsealed if one.info is None]
        try:
            for segment in {*recovered.segments, *recovered.unsealed}:
                segment.identity = self._disk.identify(segment.path)
        except OSError as error:
            raise StorageFailure(f"The WAL cannot be read: {error}") from error
        if config.page_size:
            self._find_last_request(recovered, page_size=config.page_size)
        return recovered, seal_error

    def _register_blocking(self, config: LogConfig, recovered: Recovered) -> None:
        """Without their rows the log does not go on; the next start tries again."""
        adopted = {new.segment_id: new for new in recovered.adopted}
        try:
            self._catalog.register_blocking(db_id=config.db_id, segments=recovered.adopted)
        except BopError as error:
            recovered.stop(min(adopted), f"its row cannot be written: {error}")
        for segment in recovered.segments:
            if (new := adopted.get(segment.segment_id)) is not None:
                segment.ceiling_lsn = new.ceiling_lsn

    def _find_last_request(self, recovered: Recovered, *, page_size: int) -> None:
        try:
            recovered.last_request = last_request_blocking(
                self._disk, recovered.segments, page_size=page_size
            )
        except Damage as damage:
            if recovered.health != "corrupt_wal":
                recovered.health, recovered.damage = "corrupt_wal", str(damage)
                recovered.damaged_segment_id = recovered.segments[-1].segment_id
        except OSError as error:
            raise StorageFailure(f"The WAL cannot be read: {error}") from error

    def _make_root_blocking(self) -> None:
        if self._root_made:
            return
        try:
            self._root.parent.mkdir(parents=True, exist_ok=True)
            self._disk.make_directory(self._root)
            self._disk.sync_directory(self._root.parent)
        except OSError as error:
            raise StorageFailure(f"The WAL's directory cannot be made: {error}") from error
        self._root_made = True

    def _tell(
        self, db_id: int, recovered: Recovered, seal_error: BopError | None, seconds: float
    ) -> None:
        if recovered.segments or recovered.unsealed or recovered.health != "ok":
            self._events.info(
                "wal.recovered", db_id=db_id, segments=len(recovered.segments),
                next_lsn=recovered.next_lsn, health=recovered.health, seconds=seconds,
            )  # fmt: skip
        for new in recovered.adopted:
            self._events.info(
                "wal.adopted", db_id=db_id, segment_id=new.segment_id, first_lsn=new.first_lsn
            )
        if (cut := recovered.cut) is not None:
            self._events.warning(
                "wal.tail_cut", db_id=db_id, segment_id=cut.segment_id, lsn=cut.lsn,
                offset=cut.offset, reason=cut.reason,
            )  # fmt: skip
        if recovered.damage is not None:
            self._events.error(
                "wal.corrupt", db_id=db_id, segment_id=recovered.damaged_segment_id,
                reason=recovered.damage,
            )  # fmt: skip
        if recovered.lost_segment_ids:
            self._events.error(
                "wal.lost", db_id=db_id, lost_from_lsn=recovered.lost_from_lsn,
                next_lsn=recovered.next_lsn, segments=len(recovered.lost_segment_ids),
            )  # fmt: skip
        if seal_error is not None:
            self._events.warning("wal.seal_postponed", db_id=db_id, detail=str(seal_error))

    # --- ends ---------------------------------------------------------------------------------

    async def _drop(self, db_id: int, log: WalLog | None, gone: DatabaseNotFound) -> None:
        if log is not None:
            await log.aclose(gone)
        await self._pool.run(self._drop_blocking, db_id, log)
        if log is not None:
            log.forget_room()

    def _drop_blocking(self, db_id: int, log: WalLog | None) -> None:
        if log is not None:
            log.close_files_blocking()
        directory = self._root / str(db_id)
        try:
            names = self._disk.list_names(directory)
            for name in names:
                self._disk.unlink(directory / name)
            self._disk.remove_directory(directory)
            if self._root_made:
                self._disk.sync_directory(self._root)
        except OSError as error:
            failure = StorageFailure(f"A log cannot be removed: {error}")
            failure.__cause__ = error
            self._fail_stop.trip(failure)
            raise failure from error

    def _tripped(self, cause: StorageFailure) -> None:
        """From any thread, once."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._end_all, cause)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def _end_all(self, cause: StorageFailure) -> None:
        for log in self.logs():
            log.fail_waiting(cause)
        self._on_fatal(cause)
