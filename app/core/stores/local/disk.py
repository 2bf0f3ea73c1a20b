"""What an OSError of the data disk means to the rest of the house."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.core.base.errors import DiskFull, NotReady, StorageFailure

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
_NO_MEANS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


def free_bytes_blocking(path: Path) -> int:
    """Room for unprivileged processes on the file system of `path`."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def want_of_means(error: OSError) -> NotReady | None:
    """Where the process, not the disk, has nothing left to open a file with: that passes."""
    if error.errno not in _NO_MEANS:
        return None
    return NotReady(f"The process is out of means: {error}.", retry_after_seconds=1)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raises DiskFull for want of room, NotReady for want of descriptors, and StorageFailure
    (fail-stop, I16) for an EIO.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise DiskFull(free_bytes=free_bytes_blocking(path)) from error
        if error.errno == errno.EIO:
            raise StorageFailure(f"The data disk failed: {error}") from error
        if (means := want_of_means(error)) is not None:
            raise means from error
        raise


def sync_file_blocking(descriptor: int, *, directory: Path) -> None:
    """Makes a file's content durable. Raises DiskFull where room ran out only here (delayed
    allocation), StorageFailure for any other failure: what is on the disk is unknown (I16).
    """
    try:
        with disk_errors(directory):
            os.fdatasync(descriptor)
    except OSError as error:
        raise StorageFailure(f"A file cannot be synced: {error}") from error


def sync_directory_blocking(path: Path) -> None:
    """Makes names in `path` durable: those created, renamed and unlinked before the call."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with disk_errors(path):
            os.fsync(descriptor)
    except OSError as error:
        raise StorageFailure(f"A directory cannot be synced: {error}") from error
    finally:
        os.close(descriptor)
