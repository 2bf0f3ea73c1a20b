"""Who holds a POSIX lock on a file, as SQLite's are (fcntl(2), https://sqlite.org/lockingv3.html)."""

import fcntl
import os
import struct
import sys
from pathlib import Path

# struct flock of Linux: l_type, l_whence, l_start, l_len, l_pid
_flock = struct.Struct("hhqqi0q")
_FIRST_LOCK_BYTE, _LOCK_BYTES = 0x40000000, 512
"""PENDING, RESERVED, SHARED: who has a database in WAL mode open holds SHARED all the time."""


def holder(descriptor: int, first: int, count: int = 1, *, kind: int = fcntl.F_RDLCK) -> int | None:
    """The other process whose lock is in the way of one of `kind`; None where that cannot be told.
    0 for a process of another namespace.
    """
    if sys.platform != "linux":
        return None
    asked = _flock.pack(kind, os.SEEK_SET, first, count, 0)
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, asked)
    except OSError:
        return None
    found, _, _, _, pid = _flock.unpack(answer)
    return None if found == fcntl.F_UNLCK else pid


def user_blocking(database: Path) -> int | None:
    """A process that has it open. None for none, or where that cannot be told. Not for a file that
    this process has open: closing it drops the locks.
    """
    try:
        descriptor = os.open(database, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return holder(descriptor, _FIRST_LOCK_BYTE, _LOCK_BYTES, kind=fcntl.F_WRLCK)
    finally:
        os.close(descriptor)
