"""The manifest: LMDB behind one writer, short reads, and a durable change log.

Invariants: I3, I6, I8, I14 inside the writer's transaction; I16 and I17 at its edges.
Concurrency: made, used and closed on one event loop; `commit_blocking` and `read_in_thread` serve
worker threads. `read` is for one step of the loop: no `await` inside it.
Cancellation: a cancelled `commit` may still take effect; whoever cancels reads back (I15).
Crash: what a receipt was given for is there; what waited is wholly there or wholly absent.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import lmdb

from app.core.base.clock import Clock, Randomness, SystemRandomness
from app.core.base.errors import FatalError, StartRefused, StorageFailure
from app.core.base.events import Events
from app.core.base.tasks import BlockingPool
from app.core.stores.manifest.environment import (
    Backup,
    ManifestEnvironment,
    open_environment_blocking,
)
from app.core.stores.manifest.ledger import MigrationStep, migrate_blocking
from app.core.stores.manifest.ops import ManifestBatch, Receipt
from app.core.stores.manifest.view import ManifestView
from app.core.stores.manifest.views import OpenViews
from app.core.stores.manifest.writer import WAITING_BATCHES_MAX, ManifestWriter

T = TypeVar("T")

READ_AGE_MAX_SECONDS = 10.0
_READ_THREADS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestStats:
    map_bytes: int
    used_bytes: int
    """What the tables hold."""
    page_bytes: int
    high_water_bytes: int
    """What the file has ever grown to; freed pages below it are used again."""
    last_transaction_id: int
    readers: int
    readers_max: int
    last_sequence: int
    waiting_batches: int
    entries: dict[str, int]


class ManifestStore:
    """Use `open`. `node_id` was made with the manifest and stays with it."""

    def __init__(
        self,
        environment: ManifestEnvironment,
        *,
        clock: Clock,
        events: Events,
        process_id: str,
        on_fatal: Callable[[FatalError], None],
        read_age_max_seconds: float,
        waiting_batches_max: int,
        gc_grace_seconds: float,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._environment = environment
        self._on_fatal = on_fatal
        self._failed = False
        self._pool = BlockingPool("manifest-read", threads=_READ_THREADS)
        self._views = OpenViews(
            environment,
            clock=clock,
            events=events,
            age_max_seconds=read_age_max_seconds,
            on_failure=self._fail,
        )
        self._writer = ManifestWriter(
            environment,
            clock=clock,
            events=events,
            process_id=process_id,
            before_group=self._views.end_parked,
            on_failure=self._fail,
            on_changed=self._tell_changed,
            waiting_batches_max=waiting_batches_max,
            gc_grace_seconds=gc_grace_seconds,
        )
        self._closed = False
        self._waiting_for_change: set[asyncio.Future[None]] = set()

    @classmethod
    async def open(
        cls,
        path: Path,
        *,
        clock: Clock,
        events: Events,
        process_id: str,
        map_bytes: int,
        max_readers: int,
        on_fatal: Callable[[FatalError], None],
        migrations: Sequence[MigrationStep],
        randomness: Randomness | None = None,
        read_age_max_seconds: float = READ_AGE_MAX_SECONDS,
        waiting_batches_max: int = WAITING_BATCHES_MAX,
        gc_grace_seconds: float = 0.0,
    ) -> Self:
        """Opens or makes the manifest in the directory `path` and brings its schema up to date.

        `on_fatal` is called once, on this loop, when the process must end (I16). Raises
        `StartRefused` or `FormatFromFuture` where it must not start.
        """

        def open_blocking() -> ManifestEnvironment:
            environment = open_environment_blocking(
                path,
                map_bytes=map_bytes,
                max_readers=max_readers,
                clock=clock,
                randomness=randomness or SystemRandomness(),
            )
            try:
                migrate_blocking(environment, migrations, clock=clock, events=events)
            except lmdb.Error as error:
                environment.close_blocking()
                raise StartRefused(f"The manifest's schema cannot be read: {error}") from error
            except BaseException:
                environment.close_blocking()
                raise
            return environment

        environment = await asyncio.to_thread(open_blocking)
        store = cls(
            environment,
            clock=clock,
            events=events,
            process_id=process_id,
            on_fatal=on_fatal,
            read_age_max_seconds=read_age_max_seconds,
            waiting_batches_max=waiting_batches_max,
            gc_grace_seconds=gc_grace_seconds,
        )
        store._writer.start()
        return store

    @property
    def node_id(self) -> str:
        with self.read() as view:
            return (view.meta("node_id") or b"").decode()

    @property
    def process_id(self) -> str:
        return self._writer.process_id

    @property
    def epoch(self) -> int:
        return self._writer.epoch

    def set_epoch(self, epoch: int) -> None:
        """The process has claimed the remote prefix: `ExpectEpoch` is judged by this."""
        self._writer.epoch = epoch

    async def commit(self, batch: ManifestBatch) -> Receipt:
        """The batch is durable on return; an error says that nothing of it was written, but for
        `StorageFailure` and cancellation, after which the outcome is unknown.
        """
        reply: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        self._writer.submit(batch, reply)
        return await reply

    def commit_blocking(self, batch: ManifestBatch) -> Receipt:
        """As `commit`, for worker threads."""
        reply: Future[Receipt] = Future()
        self._writer.submit(batch, reply)
        return reply.result()

    @contextmanager
    def read(self) -> Iterator[ManifestView]:
        """One moment of the manifest. Never held across an `await`."""
        access, view = self._views.open()
        try:
            yield view
        finally:
            self._views.close(access)

    @property
    def version(self) -> int:
        """Of a view that would be opened now, or of the one that a commit under way brings in a
        moment: rows of a view with this version are the newest.
        """
        return self._environment.last_transaction_id()

    def read_blocking(self, function: Callable[[ManifestView], T]) -> T:
        with self.read() as view:
            return function(view)

    async def read_in_thread(self, function: Callable[[ManifestView], T]) -> T:
        """For reads that walk over many rows."""
        return await self._pool.run(self.read_blocking, function)

    def next_change(self) -> asyncio.Future[None]:
        """Resolved when the change log has grown. Take it before reading, and cancel it if it is
        no longer waited for.
        """
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._waiting_for_change.add(waiter)
        waiter.add_done_callback(self._waiting_for_change.discard)
        return waiter

    async def stats(self) -> ManifestStats:
        return await self._pool.run(self._stats_blocking)

    async def backup(self, target: Path) -> Backup:
        """A compacted copy in the new directory `target`, durable on return."""
        return await self._pool.run(self._environment.backup_blocking, target)

    async def aclose(self) -> None:
        """Takes nothing new, commits what waits, ends reads, closes. Harmless when repeated."""
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._close_blocking)

    def _close_blocking(self) -> None:
        self._writer.close_blocking()
        self._pool.close_blocking()
        self._views.end_all()
        self._environment.close_blocking()

    def _stats_blocking(self) -> ManifestStats:
        with self.read() as view:
            entries, sequence, pages = view.counts(), view.last_sequence(), view.pages()
        use = self._environment.map_use()
        return ManifestStats(
            **use,
            used_bytes=pages * use["page_bytes"],
            last_sequence=sequence,
            waiting_batches=self._writer.waiting(),
            entries=entries,
        )

    def _tell_changed(self) -> None:
        """On the writer's thread. Nobody waits: nothing is woken."""
        if not self._waiting_for_change:
            return
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._wake_for_change)

    def _wake_for_change(self) -> None:
        for waiter in list(self._waiting_for_change):
            if not waiter.done():
                waiter.set_result(None)

    def _fail(self, failure: StorageFailure) -> None:
        """On any thread."""
        try:
            self._loop.call_soon_threadsafe(self._tell_once, failure)
        except RuntimeError:  # the loop is closed: the process is ending already
            return

    def _tell_once(self, failure: StorageFailure) -> None:
        if not self._failed:
            self._failed = True
            self._on_fatal(failure)
