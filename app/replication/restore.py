"""A database of the service as a file on this machine.

Invariants: the target's name shows a whole, checked file or nothing new: the download goes to a
file beside it, which is verified, made durable and then renamed.
Concurrency: see `download`; then one thread makes the file durable while another one checks it.
Cancellation: the unfinished file is removed; once the file is being put in its place, that ends.
Crash: before the rename an unfinished `.NAME.….part` is left beside the target; with `replace`, a
crash just before the rename may leave the old database without its WAL, which then stands beside it
as `.NAME.….part.old-wal`.
"""

import asyncio
import contextlib
import errno
import os
import sqlite3
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVarTuple

from app.client import BopClient
from app.client.images import Wanted
from app.replication.download import Progress, download
from app.replication.posix_locks import user_blocking
from app.replication.source import MAGIC, SIDE_FILES

Ts = TypeVarTuple("Ts")

_HEADER_BYTES = 100
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
"""What file systems without hard links say."""

Check = Literal["quick", "full"]


class TargetExists(Exception):
    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(f"{path} exists")


class DatabaseInUse(Exception):
    """Nothing was changed. Who has it open would go on writing to a file that has no name."""

    def __init__(self, path: Path, pid: int) -> None:
        self.path, self.pid = path, pid
        super().__init__(f"{path} is in use by process {pid}")


class RestoreFailed(Exception):
    """What came is not a sound database; nothing was changed."""

    def __init__(self, detail: str, *, code: str = "restore_failed") -> None:
        self.code = code
        super().__init__(detail)


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    path: str
    bytes: int
    page_size: int
    page_count: int
    generation: int | None
    lsn: int | None
    etag: str


async def restore(
    client: BopClient,
    wanted: Wanted,
    target: Path,
    *,
    check: Check = "quick",
    replace: bool = False,
    progress: Progress,
) -> Restored:
    """The file is durable under its name when this returns. With `replace` an existing database,
    the one that a link names, and its -wal, -shm and -journal go; nothing may have it open. Its
    mode and, where that is allowed, its owner stay. Raises TargetExists, DatabaseInUse,
    RestoreFailed, ClientError, OSError.
    """
    given = target
    target = await asyncio.to_thread(_named_blocking, given, replace)
    await asyncio.to_thread(_refuse_existing_blocking, target, replace)
    # at once: nothing can come between the file and its removal
    descriptor, name = tempfile.mkstemp(".part", f".{target.name}.", target.parent)
    part = Path(name)
    try:
        try:
            async with client.images.reading(wanted) as reader:
                state = await download(reader, descriptor, progress)
            _take_over_owner(descriptor, target)
            page_size, page_count = await _durable_and_verified(descriptor, part, check)
        finally:
            os.close(descriptor)
        await _to_its_end(_put_in_place_blocking, part, target, replace)
    finally:
        _remove_blocking(part)  # short, and also where the task was cancelled
    return Restored(
        path=str(given),
        bytes=state.content_bytes,
        page_size=page_size,
        page_count=page_count,
        generation=state.generation,
        lsn=state.lsn,
        etag=state.etag,
    )


async def _durable_and_verified(descriptor: int, part: Path, check: Check) -> tuple[int, int]:
    """Side by side: one waits for the disk, the other reads what is in memory still."""
    checks: list[sqlite3.Connection] = []
    try:
        durable, verified = await asyncio.gather(
            asyncio.to_thread(os.fsync, descriptor),
            asyncio.to_thread(_verify_blocking, part, check, checks.append),
            return_exceptions=True,
        )
    except asyncio.CancelledError:
        for connection in checks:
            connection.interrupt()  # else nothing would end before the check does
        raise
    if isinstance(durable, BaseException):
        raise durable
    if isinstance(verified, BaseException):
        raise verified
    return verified


async def _to_its_end(function: Callable[[*Ts], None], *args: *Ts) -> None:
    """In a thread; where it is cancelled meanwhile, the thread is waited for."""
    future = asyncio.get_running_loop().run_in_executor(None, function, *args)
    try:
        await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait({future})
        if not future.cancelled():
            future.exception()  # seen here: the cancellation is what the caller is told
        raise


def _named_blocking(target: Path, replace: bool) -> Path:
    return Path(os.path.realpath(target)) if replace else target


def existing(target: Path) -> list[Path]:
    """The database and what belongs to it, as far as there is any."""
    paths = [target, *(Path(f"{target}{suffix}") for suffix in SIDE_FILES)]
    return [path for path in paths if path.is_symlink() or path.exists()]


def _refuse_existing_blocking(target: Path, replace: bool) -> None:
    found = existing(target)
    if found and not replace:
        raise TargetExists(found[0])
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if (pid := user_blocking(target)) is not None:
        raise DatabaseInUse(target, pid)


def _take_over_owner(descriptor: int, target: Path) -> None:
    """Who could use the old file can use the new one."""
    try:
        old = target.stat()
    except FileNotFoundError:
        os.fchmod(descriptor, 0o666 & ~_umask())
        return
    with contextlib.suppress(PermissionError):
        os.fchown(descriptor, old.st_uid, old.st_gid)
    os.fchmod(descriptor, old.st_mode & 0o777)


def _verify_blocking(
    part: Path, check: Check, begins: Callable[[sqlite3.Connection], None]
) -> tuple[int, int]:
    """Page size and page count. Raises RestoreFailed."""
    content_bytes = part.stat().st_size
    with part.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    if content_bytes == 0:
        raise RestoreFailed("The database is empty: it has no page yet.", code="empty_database")
    if len(header) < _HEADER_BYTES or not header.startswith(MAGIC):
        raise RestoreFailed("What came is not a SQLite database.", code="corrupt_image")
    page_size = int.from_bytes(header[16:18], "big")
    page_size = 65536 if page_size == 1 else page_size
    if page_size < 512 or page_size & (page_size - 1) or content_bytes % page_size:
        raise RestoreFailed("The pages do not make up the file.", code="corrupt_image")
    # immutable: no -wal and -shm come up beside it
    uri = f"{part.resolve().as_uri()}?mode=ro&immutable=1"
    pragma = "integrity_check" if check == "full" else "quick_check"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
            begins(connection)
            connection.execute(f"PRAGMA mmap_size = {content_bytes}")  # twice as fast
            rows = connection.execute(f"PRAGMA {pragma}").fetchmany(3)
    except sqlite3.Error as error:
        raise RestoreFailed(f"SQLite cannot read it: {error}.", code="corrupt_image") from error
    if rows != [("ok",)]:
        said = "; ".join(str(row[0]) for row in rows)
        raise RestoreFailed(f"{pragma} says: {said}", code="corrupt_image")
    return page_size, content_bytes // page_size


def _put_in_place_blocking(part: Path, target: Path, replace: bool) -> None:
    _refuse_existing_blocking(target, replace)
    if replace:
        _replace_blocking(part, target)
    else:
        _link_blocking(part, target)
    _sync_directory(target.parent)


def _replace_blocking(part: Path, target: Path) -> None:
    """An old -wal would be replayed into the new file: it goes first, and durably; and comes back
    if the new file cannot take the old one's name.
    """
    aside: list[tuple[Path, Path]] = []
    try:
        for suffix in SIDE_FILES:
            old, moved = Path(f"{target}{suffix}"), Path(f"{part}.old{suffix}")
            with contextlib.suppress(FileNotFoundError):
                old.rename(moved)
                aside.append((old, moved))
        _sync_directory(target.parent)
        part.replace(target)
    except BaseException:
        for old, moved in reversed(aside):
            moved.rename(old)
        raise
    _sync_directory(target.parent)
    for _, moved in aside:
        moved.unlink(missing_ok=True)


def _link_blocking(part: Path, target: Path) -> None:
    """Unlike a rename, this does not replace what came meanwhile."""
    try:
        os.link(part, target)
    except FileExistsError as error:
        raise TargetExists(target) from error
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        part.rename(target)
    else:
        part.unlink()


def _remove_blocking(part: Path) -> None:
    for suffix in ("", *SIDE_FILES):
        with contextlib.suppress(OSError):
            Path(f"{part}{suffix}").unlink()


def _umask() -> int:
    """Linux tells it without setting it (proc(5), `status`)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o077


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
