"""What an OSError under the WAL means, and the switch that ends all acknowledgements (I16)."""

import errno
import threading
from collections.abc import Callable
from pathlib import Path

from app.core.base.errors import BopError, DiskFull, NotReady, StorageFailure
from app.core.stores.wal.disk import Disk

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
_NO_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE})
_NO_MEANS = _NO_DESCRIPTORS | {errno.ENOMEM}


def judge_write(
    error: OSError, *, disk: Disk, directory: Path, needed_bytes: int
) -> BopError | StorageFailure:
    """For opening, creating and writing: want of room is no failure of the disk, be it told as
    such or proven by statvfs; nor is want of descriptors. Anything else is fail-stop.
    """
    if error.errno in _NO_MEANS:
        return NotReady(f"The process is out of means: {error}.", retry_after_seconds=1)
    try:
        free_bytes = disk.free_bytes(directory)
    except OSError:
        free_bytes = None
    if error.errno in _NO_ROOM or (
        error.errno == errno.EIO and free_bytes is not None and free_bytes < needed_bytes
    ):
        return DiskFull(free_bytes=free_bytes, needed_bytes=needed_bytes)
    return StorageFailure(f"A write to the WAL failed: {error}")


def judge_directory_sync(error: OSError) -> BopError | StorageFailure:
    """A directory is opened for its sync: without a descriptor nothing was synced, and nothing has
    failed that could not be tried again. An fsync never says so.
    """
    if error.errno in _NO_DESCRIPTORS:
        return NotReady(f"The process is out of means: {error}.", retry_after_seconds=1)
    return StorageFailure(f"A directory of the WAL cannot be synced: {error}")


class FailStop:
    """Trips once, from any thread; from then on nothing is acknowledged by any log."""

    def __init__(self, on_trip: Callable[[StorageFailure], None]) -> None:
        self._on_trip = on_trip
        self._lock = threading.Lock()
        self._cause: StorageFailure | None = None

    @property
    def cause(self) -> StorageFailure | None:
        return self._cause

    def trip(self, cause: StorageFailure) -> None:
        with self._lock:
            if self._cause is not None:
                return
            self._cause = cause
        self._on_trip(cause)

    def check(self) -> None:
        """Raises StorageFailure once tripped."""
        if self._cause is not None:
            raise StorageFailure(
                "The WAL has stopped after a failure of the disk."
            ) from self._cause
