"""What the WAL does to the disk: a seam, so that tests can record it, shorten it and let it lie.

Every call may raise OSError; what that means is for the caller to say (`failure.py`).
"""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

Buffer = bytes | memoryview


class Disk(Protocol):
    def make_directory(self, path: Path) -> None:
        """It may be there. Its name is durable once the parent was synced."""
        ...

    def remove_directory(self, path: Path) -> None: ...

    def list_names(self, path: Path) -> list[str]:
        """Empty where there is no such directory."""
        ...

    def create(self, path: Path) -> int:
        """A descriptor of a new file. Its name is durable once the directory was synced."""
        ...

    def create_unnamed(self, directory: Path) -> int:
        """A descriptor of a new file on the directory's file system. It goes with its last
        descriptor unless it was linked.
        """
        ...

    def link(self, fd: int, path: Path) -> None:
        """Names a file that `create_unnamed` made. The name is durable once the directory was
        synced.
        """
        ...

    def open(self, path: Path, *, writable: bool) -> int: ...

    def close(self, fd: int) -> None: ...

    def size(self, fd: int) -> int: ...

    def identify(self, path: Path) -> tuple[int, int]:
        """Device and inode."""
        ...

    def read(self, fd: int, length: int, offset: int) -> bytes:
        """Fewer bytes than `length` only at the end of the file."""
        ...

    def write(self, fd: int, pieces: Sequence[Buffer], offset: int) -> int:
        """Bytes written, which may be fewer than given. At most 1,024 pieces."""
        ...

    def truncate(self, fd: int, size: int) -> None: ...

    def sync_data(self, fd: int) -> None: ...

    def sync_directory(self, path: Path) -> None: ...

    def unlink(self, path: Path) -> None:
        """A file that is not there is fine."""
        ...

    def free_bytes(self, path: Path) -> int: ...


class SystemDisk:
    def make_directory(self, path: Path) -> None:
        path.mkdir(exist_ok=True)

    def remove_directory(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            path.rmdir()

    def list_names(self, path: Path) -> list[str]:
        try:
            return sorted(os.listdir(path))  # noqa: PTH208 - names, not paths
        except FileNotFoundError:
            return []

    def create(self, path: Path) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def create_unnamed(self, directory: Path) -> int:
        return os.open(directory, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)

    def link(self, fd: int, path: Path) -> None:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:  # with a directory's descriptor it is linkat(2), which follows the link in /proc
            os.link(f"/proc/self/fd/{fd}", path.name, dst_dir_fd=directory, follow_symlinks=True)
        finally:
            os.close(directory)

    def open(self, path: Path, *, writable: bool) -> int:
        return os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)

    def close(self, fd: int) -> None:
        os.close(fd)

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def identify(self, path: Path) -> tuple[int, int]:
        status = path.stat()
        return status.st_dev, status.st_ino

    def read(self, fd: int, length: int, offset: int) -> bytes:
        data = os.pread(fd, length, offset)
        if len(data) == length or not data:
            return data
        pieces = [data]
        got = len(data)
        while got < length and (data := os.pread(fd, length - got, offset + got)):
            pieces.append(data)
            got += len(data)
        return b"".join(pieces)

    def write(self, fd: int, pieces: Sequence[Buffer], offset: int) -> int:
        return os.pwritev(fd, pieces, offset)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def sync_data(self, fd: int) -> None:
        os.fdatasync(fd)

    def sync_directory(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def free_bytes(self, path: Path) -> int:
        status = os.statvfs(path)
        return status.f_bavail * status.f_frsize
