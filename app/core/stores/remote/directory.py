"""Blobs in a local directory, with the semantics of an object store: the embedded default.

Invariants: an object appears whole or not at all, and is on the disk (file and directory synced)
when a put returns or a head finds it; the CRC-64/NVME is computed over the very bytes that are
written and must be the body's (I2); `head_blob` computes it anew from the disk, so bit rot shows
(I10); a failed put leaves nothing behind (I13). Keys are validated, and never leave the root.
Concurrency: every change happens under one flock on the root, so conditional writes have one
winner among threads and processes alike; reads take no lock and see the object they opened.
Cancellation: the step that runs in the pool ends on its own; the change is whole or absent.
Crash: leaves at most a temporary file; the next `open` removes those that no living process holds.
"""

import asyncio
import contextlib
import errno
import fcntl
import itertools
import os
import stat
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from app.core.base import failpoints
from app.core.base.errors import BopError, CorruptBlob, DiskFull, OutcomeUnknown, RemoteUnavailable
from app.core.base.tasks import BlockingPool, acquired
from app.core.formats.crc64 import crc64
from app.core.stores.remote.directory_files import (
    COPY_BYTES,
    entries,
    fill_blocking,
    link_new,
    make_directories,
    opened_body,
    remove_if_dead,
    sync_directory,
)
from app.core.stores.remote.keys import check_key, check_prefix
from app.core.stores.remote.protocol import (
    BlobInfo,
    BlobMissing,
    Body,
    BytesBody,
    RemoteMisconfigured,
    UploadCorrupted,
)

READ_BYTES = 256 * 1024
LIST_BATCH_COUNT = 1000
DURABLE_COUNT_MAX = 10_000

# Keys have no segment that begins with a dot, so these names are never an object's.
_LOCK_NAME = ".lock"
_TEMPORARY_NAME = ".tmp"


class DirectoryRemoteStore:
    def __init__(self, root: Path, *, pool: BlockingPool) -> None:
        self._root = root
        self._pool = pool
        self._numbers = itertools.count()
        self._durable: set[Path] = set()
        """Directories that are on the disk with all their names. Under the lock."""

    @classmethod
    async def open(cls, root: Path, *, pool: BlockingPool) -> Self:
        """Makes the directory if it is not there. Raises RemoteUnavailable."""
        store = cls(root, pool=pool)
        await pool.run(store._open_blocking)
        return store

    def __repr__(self) -> str:
        return f"<DirectoryRemoteStore {self._root}>"

    async def aclose(self) -> None:
        """Nothing is held open."""

    # --- the protocol -------------------------------------------------------------------------

    async def put_blob(self, key: str, body: Body) -> BlobInfo:
        target = self._path(key)
        return await self._pool.run(
            self._put_blocking, key, target, body, os.replace, _told_from_thread(body)
        )

    async def put_if_absent(self, key: str, body: BytesBody) -> BlobInfo | None:
        target = self._path(key)
        try:
            return await self._pool.run(self._put_blocking, key, target, body, link_new)
        except FileExistsError:
            return None

    async def put_if_match(self, key: str, body: BytesBody, *, etag: str) -> BlobInfo | None:
        target = self._path(key)

        def replace_if_same(source: Path, target: Path) -> None:
            try:
                same = _etag(target.stat()) == etag
            except (FileNotFoundError, NotADirectoryError):
                same = False
            if not same:
                raise FileExistsError(errno.EEXIST, "changed or gone", str(target))
            source.replace(target)

        try:
            return await self._pool.run(self._put_blocking, key, target, body, replace_if_same)
        except FileExistsError:
            return None

    async def head_blob(self, key: str) -> BlobInfo | None:
        return await self._pool.run(self._head_blocking, key, self._path(key))

    async def get_blob(self, key: str, *, first: int = 0, length: int | None = None) -> bytes:
        return await self._pool.run(self._get_blocking, key, first, length)

    async def iter_blob(
        self, key: str, *, first: int = 0, length: int | None = None
    ) -> AsyncIterator[bytes]:
        fd, end = await acquired(
            self._pool.run(self._open_range_blocking, key, first, length),
            give_back=lambda opened: os.close(opened[0]),
        )
        try:
            offset = first
            while offset < end:
                piece = await self._pool.run(
                    self._read_blocking, key, fd, min(READ_BYTES, end - offset), offset
                )
                offset += len(piece)
                yield piece
        finally:
            os.close(fd)

    async def delete_blobs(self, keys: Sequence[str]) -> Sequence[str]:
        paths = [(key, self._path(key)) for key in keys]
        return await self._pool.run(self._delete_blocking, paths)

    async def list_blobs(self, prefix: str) -> AsyncIterator[BlobInfo]:
        found = self._walk_blocking(check_prefix(prefix))
        while batch := await self._pool.run(_take_blocking, found):
            for info in batch:
                yield info

    # --- writing ------------------------------------------------------------------------------

    def _open_blocking(self) -> None:
        with self._errors("open", ""):
            try:
                self._root.mkdir(parents=True, exist_ok=True)
            except FileExistsError as error:
                raise NotADirectoryError(errno.ENOTDIR, "no directory", self._root) from error
            with contextlib.suppress(PermissionError):  # one that we may not read, we have not made
                sync_directory(self._root.parent)
            temporary = self._root / _TEMPORARY_NAME
            with self._lock():
                temporary.mkdir(exist_ok=True)
                for left in temporary.iterdir():
                    remove_if_dead(left)

    def _put_blocking(
        self,
        key: str,
        target: Path,
        body: Body,
        place: Callable[[Path, Path], None],
        on_moved: Callable[[], object] = lambda: None,
    ) -> BlobInfo:
        """`place` moves the finished file to its name, under the lock; FileExistsError passes."""
        with (
            opened_body(body) as source,
            self._errors("put", key),
            self._temporary() as (temporary, fd),
        ):
            checksum = fill_blocking(fd, source, on_moved)
            if checksum != body.crc64:
                raise UploadCorrupted("The body does not match its checksum.", key=key)
            os.fsync(fd)
            failpoints.fp("directory.before_place")
            with self._lock():
                self._durable -= {target.parent, *make_directories(self._root, target.parent)}
                place(temporary, target)
                with _unknown_from_here(key):
                    failpoints.fp("directory.mid_place")
                    self._make_durable(target.parent)
                    found = target.stat()
        return _info(key, found, crc=checksum)

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[tuple[Path, int]]:
        """A new file that nobody else has; gone at the end unless it was moved."""
        path = self._root / _TEMPORARY_NAME / f"{os.getpid()}-{id(self):x}-{next(self._numbers)}"
        with self._lock():  # held, so that no opener finds it before it is locked itself
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            yield path, fd
        finally:
            path.unlink(missing_ok=True)
            os.close(fd)

    def _delete_blocking(self, paths: Sequence[tuple[str, Path]]) -> Sequence[str]:
        failed: list[str] = []
        with self._errors("delete", ""), self._lock():
            changed: set[Path] = set()
            for key, path in paths:
                try:
                    path.unlink()
                    changed.add(path.parent)
                except (FileNotFoundError, NotADirectoryError):
                    continue
                except OSError:
                    failed.append(key)
            for directory in sorted(changed):
                sync_directory(directory)
            for directory in changed:
                self._prune(directory)
        return tuple(failed)

    def _prune(self, directory: Path) -> None:
        """Empty directories go, as prefixes do on an object store."""
        while directory != self._root:
            try:
                directory.rmdir()
            except OSError:
                return  # not empty, or gone with another
            self._durable.discard(directory)
            directory = directory.parent

    # --- reading ------------------------------------------------------------------------------

    def _head_blocking(self, key: str, path: Path) -> BlobInfo | None:
        with self._errors("head", key):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError):
                return None
            try:
                found = os.fstat(fd)
                if not stat.S_ISREG(found.st_mode):
                    return None
                checksum = 0
                while data := os.read(fd, COPY_BYTES):
                    checksum = crc64(data, checksum)
            finally:
                os.close(fd)
            with self._lock():  # what is found may lie where a put broke off, in whatever process
                if not path.exists():
                    return None
                self._make_durable(path.parent)
        return _info(key, found, crc=checksum)

    def _get_blocking(self, key: str, first: int, length: int | None) -> bytes:
        fd, end = self._open_range_blocking(key, first, length)
        try:
            pieces, offset = [], first
            while offset < end:
                pieces.append(self._read_blocking(key, fd, end - offset, offset))
                offset += len(pieces[-1])
        finally:
            os.close(fd)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _open_range_blocking(self, key: str, first: int, length: int | None) -> tuple[int, int]:
        """A file descriptor and the end of the range."""
        path = self._path(key)
        with self._errors("get", key):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise BlobMissing(key=key) from error
            try:
                found = os.fstat(fd)
                if not stat.S_ISREG(found.st_mode):
                    raise BlobMissing(key=key)
                end = found.st_size if length is None else first + length
                if first > found.st_size or end > found.st_size:
                    raise CorruptBlob("The object ends before the range does.", key=key)
            except BaseException:
                os.close(fd)
                raise
        return fd, end

    def _read_blocking(self, key: str, fd: int, size: int, offset: int) -> bytes:
        with self._errors("get", key):
            data = os.pread(fd, size, offset)
        if not data:
            raise CorruptBlob("The object became shorter while it was read.", key=key)
        return data

    def _walk_blocking(self, prefix: str) -> Iterator[BlobInfo]:
        start, _, _ = prefix.rpartition("/")
        waiting = [start]
        while waiting:
            where = waiting.pop()
            with self._errors("list", prefix):
                within = entries(self._root / where if where else self._root)
            for name, found in within:
                key = f"{where}/{name}" if where else name
                if stat.S_ISDIR(found.st_mode):
                    if f"{key}/".startswith(prefix) or prefix.startswith(f"{key}/"):
                        waiting.append(key)
                elif key.startswith(prefix):
                    yield _info(key, found, crc=None)

    def _make_durable(self, directory: Path) -> None:
        """Syncs what is not known to be on the disk, from the directory up to the root."""
        if len(self._durable) > DURABLE_COUNT_MAX:
            self._durable.clear()
        for each in (directory, *directory.parents):
            if each not in self._durable:
                sync_directory(each)
                self._durable.add(each)
            if each == self._root:
                return

    # --- helpers ------------------------------------------------------------------------------

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Between processes and, for each opens the file anew, between threads."""
        fd = os.open(self._root / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _errors(self, op: str, key: str) -> Iterator[None]:
        try:
            yield
        except (FileExistsError, BopError):
            raise
        except OSError as error:
            fields: dict[str, Any] = {
                "op": op,
                "key": key,
                "error": errno.errorcode.get(error.errno or 0, ""),
            }
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise DiskFull("The disk of the remote directory is full.", **fields) from error
            text = f"The remote directory fails: {error.strerror}."
            if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}:
                raise RemoteMisconfigured(text, **fields) from error
            raise RemoteUnavailable(text, **fields) from error


@contextlib.contextmanager
def _unknown_from_here(key: str) -> Iterator[None]:
    """The object has its name; what fails now leaves open whether a power cut keeps it (I15)."""
    try:
        yield
    except OSError as error:
        raise OutcomeUnknown("The directory cannot be synced.", key=key) from error


def _told_from_thread(body: Body) -> Callable[[], object]:
    """The body's `on_moved`, for the thread that copies it."""
    if isinstance(body, BytesBody):
        return lambda: None
    loop, on_moved = asyncio.get_running_loop(), body.on_moved
    return lambda: loop.call_soon_threadsafe(on_moved)


def _take_blocking(found: Iterator[BlobInfo]) -> list[BlobInfo]:
    return list(itertools.islice(found, LIST_BATCH_COUNT))


def _info(key: str, found: os.stat_result, *, crc: int | None) -> BlobInfo:
    return BlobInfo(
        key=key,
        bytes=found.st_size,
        crc64=crc,
        etag=_etag(found),
        modified_at_us=found.st_mtime_ns // 1000,
    )


def _etag(found: os.stat_result) -> str:
    """Each put makes a new file: no two of one name share inode, length and time of writing."""
    return f"{found.st_ino:x}-{found.st_size:x}-{found.st_mtime_ns:x}"
