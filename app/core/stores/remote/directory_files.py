"""File steps of the directory store. All of them block and run in its pool."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from app.core.base.errors import CorruptBlob
from app.core.formats.crc64 import crc64
from app.core.stores.remote.protocol import Body, BytesBody

COPY_BYTES = 1024 * 1024


@contextlib.contextmanager
def opened_body(body: Body) -> Iterator[bytes | int]:
    """A small body's bytes, or a descriptor of the file. What is wrong with the file itself is
    not the remote directory's failure, and raised as it is.
    """
    if isinstance(body, BytesBody):
        yield body.data
        return
    fd = os.open(body.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if (found := os.fstat(fd).st_size) != body.bytes:
            raise CorruptBlob(
                "The file to upload has not the recorded length.", bytes=found, expected=body.bytes
            )
        yield fd
    finally:
        os.close(fd)


def fill_blocking(fd: int, source: bytes | int, on_moved: Callable[[], object]) -> int:
    """Writes the body and returns the CRC of what was written. `on_moved` is told of each piece."""
    if isinstance(source, bytes):
        _write_all(fd, memoryview(source))
        return crc64(source)
    buffer = memoryview(bytearray(COPY_BYTES))
    checksum = 0
    while count := os.readv(source, [buffer]):
        checksum = crc64(buffer[:count], checksum)
        _write_all(fd, buffer[:count])
        on_moved()
    return checksum


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def link_new(source: Path, target: Path) -> None:
    """Fails with FileExistsError where the name is taken: `link` never replaces."""
    target.hardlink_to(source)


def make_directories(root: Path, wanted: Path) -> list[Path]:
    """Makes what is missing, and returns the directories whose entries that changed."""
    if wanted == root or wanted.is_dir():
        return []
    changed = make_directories(root, wanted.parent)
    with contextlib.suppress(FileExistsError):
        wanted.mkdir()
    return [*changed, wanted.parent]


def sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_if_dead(path: Path) -> None:
    """A temporary file is locked by who writes it, and the lock goes with the process."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except BlockingIOError:
        return
    finally:
        os.close(fd)


def entries(directory: Path) -> list[tuple[str, os.stat_result]]:
    """Names with what they are, but for reserved ones. A directory or file that a deletion just
    removed holds nothing; any other failure is raised, for a listing must be complete.
    """
    found: list[tuple[str, os.stat_result]] = []
    try:
        with os.scandir(directory) as scan:
            for entry in scan:
                if entry.name.startswith("."):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    found.append((entry.name, entry.stat(follow_symlinks=False)))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return found
