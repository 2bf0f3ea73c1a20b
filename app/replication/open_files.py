"""Which database files this process follows, by device and inode. Everything here blocks.

Invariants: a file is followed once at most, and opened by nobody else in this process meanwhile,
under whatever name: closing any descriptor of a file drops all POSIX locks that the process has on
it, and SQLite's are such (https://sqlite.org/howtocorrupt.html, 2.2). A follower would go on
without its read lock and not know that it misses frames.
Concurrency: any thread.
"""

import os
import threading
from pathlib import Path

FileId = tuple[int, int]

_lock = threading.Lock()
_followed: set[FileId] = set()


def file_id(path: Path) -> FileId | None:
    """None where there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def claim_blocking(path: Path) -> FileId | None:
    """Whoever has claimed a file may open it, until `disclaim`. None if somebody else has. Raises
    OSError.
    """
    with _lock:
        status = path.stat()
        found = (status.st_dev, status.st_ino)
        if found in _followed:
            return None
        _followed.add(found)
        return found


def disclaim(file: FileId) -> None:
    """Behind the last descriptor of it."""
    with _lock:
        _followed.discard(file)


def begins_with_blocking(path: Path, data: bytes) -> bool:
    """Looks into a file that is not followed; one that is, is taken for what it was."""
    with _lock:
        if file_id(path) in _followed:
            return True
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return False
        status = os.fstat(descriptor)
        if (status.st_dev, status.st_ino) in _followed:
            return True  # it was renamed just now; the descriptor stays, for closing it would harm
        try:
            return os.pread(descriptor, len(data), 0) == data
        except OSError:
            return False
        finally:
            os.close(descriptor)
