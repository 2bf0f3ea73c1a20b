"""The read transactions that are open, and their end.

Invariants: no read transaction outlives the age limit while there are writes, so that a parked
one cannot keep LMDB from reusing pages until the map is full (I11).
Concurrency: a view's transaction is used by one thread at a time, under its lock; the writer's
thread ends it by age. A scan under way sees the mark at its next row and ends it itself.
"""

import threading
from collections.abc import Callable
from types import TracebackType

import lmdb

from app.core.base.clock import Clock
from app.core.base.errors import BopError, InvariantViolation, ManifestBusy, StorageFailure
from app.core.base.events import Events
from app.core.stores.manifest.environment import ManifestEnvironment
from app.core.stores.manifest.errors import UNREADABLE, ViewExpired
from app.core.stores.manifest.rows import CommittedRows
from app.core.stores.manifest.view import ManifestView


class ReadAccess:
    """`with access as rows:` around every look at a view's transaction."""

    def __init__(
        self,
        rows: CommittedRows,
        *,
        opened_at: float,
        on_failure: Callable[[StorageFailure], None],
        events: Events,
    ) -> None:
        self.opened_at = opened_at
        self._ended = False
        self._rows = rows
        self._on_failure = on_failure
        self._events = events
        self._lock = threading.Lock()

    def __enter__(self) -> CommittedRows:
        self._lock.acquire()
        if self._rows.expired or self._ended:
            self._end()
            self._lock.release()
            if self._rows.expired:
                raise ViewExpired
            raise InvariantViolation("A manifest view was used after its end.")
        return self._rows

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if self._rows.expired:
                self._end()
        finally:
            self._lock.release()
        if isinstance(exc, UNREADABLE):
            tell_unreadable(self._events, exc)
        if isinstance(exc, lmdb.Error):
            failure = StorageFailure(f"Reading the manifest failed: {exc}")
            self._on_failure(failure)
            raise failure from exc

    def expire(self) -> bool:
        """Ends the transaction, or leaves that to whoever is reading. False: it had ended."""
        first = not self._rows.expired
        self._rows.expired = True
        if self._lock.acquire(blocking=False):
            try:
                self._end()
            finally:
                self._lock.release()
        return first

    def close(self) -> None:
        with self._lock:
            self._end()

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._rows.end()


class OpenViews:
    """Opens views, knows those that are open, ends those that are too old."""

    def __init__(
        self,
        environment: ManifestEnvironment,
        *,
        clock: Clock,
        events: Events,
        age_max_seconds: float,
        on_failure: Callable[[StorageFailure], None],
    ) -> None:
        self._environment = environment
        self._clock = clock
        self._events = events
        self._age_max_seconds = age_max_seconds
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._open: set[ReadAccess] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._open)

    def open(self) -> tuple[ReadAccess, ManifestView]:
        """Raises `ManifestBusy` if the reader table is full of readers that are not too old."""
        with self._lock:
            if self._closed:
                raise InvariantViolation("The manifest was read after its closing.")
        access = ReadAccess(
            CommittedRows(self._begin(), self._environment.handles),
            opened_at=self._clock.monotonic(),
            on_failure=self._on_failure,
            events=self._events,
        )
        with self._lock:
            self._open.add(access)
        return access, ManifestView(access)

    def close(self, access: ReadAccess) -> None:
        with self._lock:
            self._open.discard(access)
        access.close()

    def end_parked(self) -> None:
        """Ends every view beyond the age limit. Called ahead of each write transaction."""
        if not self._open:
            return
        oldest = self._clock.monotonic() - self._age_max_seconds
        with self._lock:
            parked = [access for access in self._open if access.opened_at < oldest]
        for access in parked:
            if access.expire():
                self._events.warning("manifest.view_expired", age_max_seconds=self._age_max_seconds)

    def end_all(self) -> None:
        with self._lock:
            self._closed = True
            left = list(self._open)
            self._open.clear()
        for access in left:
            access.close()

    def _begin(self) -> lmdb.Transaction:
        try:
            return self._begin_once()
        except lmdb.ReadersFullError:
            self.end_parked()
            self._environment.clear_stale_readers()
        try:
            return self._begin_once()
        except lmdb.ReadersFullError as error:
            self._events.warning("manifest.readers_full", open=len(self._open))
            raise ManifestBusy(
                "Every reader slot of the manifest is taken.", retry_after_seconds=1
            ) from error

    def _begin_once(self) -> lmdb.Transaction:
        try:
            return self._environment.begin()
        except lmdb.ReadersFullError:
            raise
        except lmdb.Error as error:
            failure = StorageFailure(f"The manifest cannot be read: {error}")
            self._on_failure(failure)
            raise failure from error


def tell_unreadable(events: Events, error: BopError) -> None:
    events.error("manifest.row_unreadable", detail=error.detail, **error.fields)
