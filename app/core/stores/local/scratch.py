"""Scratch directories of jobs: `checkpoint_scratch/{job}/`.

Invariants: I13: what fails leaves nothing behind: a file that could not be written whole is not
there, and a directory is removed whole or not at all, as its job sees it. I16: EIO and failed
fsyncs end the process. Names are ULIDs that were checked, never text from outside.
Concurrency: all work is done in the pool; one job uses its directory at a time, and `remove` may
meet itself (a job and the janitor).
Cancellation: a call in the pool goes on to its end, and `create` waits for it; every one may be
repeated.
Crash: directories stay and are found by `list`. A removal begins with a rename, so an interrupted
one is never mistaken for a job's files.
"""

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from app.core.base import failpoints
from app.core.base.clock import Clock
from app.core.base.errors import DiskFull, InvariantViolation
from app.core.base.ids import is_ulid
from app.core.base.tasks import BlockingPool, uninterrupted
from app.core.stores.local.disk import (
    disk_errors,
    free_bytes_blocking,
    sync_directory_blocking,
    sync_file_blocking,
)

_REMOVING = ".removing"
_PART = ".part"


def job_of(directory_name: str) -> str:
    """Whose directory it is, half removed or whole."""
    return directory_name.removesuffix(_REMOVING)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScratchEntry:
    """A directory as `list` found it."""

    job_id: str
    age_seconds: float
    """Since it or a file in it last changed, by the wall clock; never negative."""
    bytes: int
    removing: bool
    """Its removal was interrupted: nothing in it is of use."""


class ScratchDir:
    """One job's directory. Methods that end in `_blocking` belong in a pool."""

    def __init__(self, path: Path, *, pool: BlockingPool) -> None:
        self.path = path
        self._pool = pool

    def __repr__(self) -> str:
        return f"<ScratchDir {self.path.name}>"

    def file(self, name: str) -> Path:
        """Where the file `name` lies, whether it exists or not."""
        if name in {"", ".", ".."} or "/" in name or "\0" in name or name.endswith(_PART):
            raise InvariantViolation("Not the name of a scratch file.", name=name)
        return self.path / name

    async def sync(self, *names: str) -> None:
        """On return the named files and all names in the directory are durable."""
        await self._pool.run(self.sync_blocking, *names)

    def sync_blocking(self, *names: str) -> None:
        for name in names:
            descriptor = os.open(self.file(name), os.O_RDONLY)
            try:
                sync_file_blocking(descriptor, directory=self.path)
            finally:
                os.close(descriptor)
        sync_directory_blocking(self.path)

    def write_blocking(self, name: str, pieces: Iterable[bytes | memoryview]) -> int:
        """Writes the file whole, durably, in place of any of that name; returns its bytes.

        Raises DiskFull for want of room; then, as after any error, no part of it is left.
        """
        target = self.file(name)
        part = target.with_name(name + _PART)
        written = 0
        try:
            with disk_errors(self.path), part.open("wb", buffering=0) as file:
                for piece in pieces:
                    view = memoryview(piece)
                    while view:
                        count = file.write(view)
                        written += count
                        view = view[count:]
                failpoints.fp("stage.mid_write")
                sync_file_blocking(file.fileno(), directory=self.path)
            part.replace(target)
            sync_directory_blocking(self.path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return written


class ScratchStore:
    def __init__(self, root: Path, *, pool: BlockingPool, clock: Clock) -> None:
        self._root = root
        self._pool = pool
        self._clock = clock

    async def takes_links_of(self, directory: Path) -> bool:
        """Whether files in `directory` can be hard-linked into scratch."""
        return await self._pool.run(self._takes_links_blocking, directory)

    async def create(self, job_id: str, *, room_bytes: int = 0) -> ScratchDir:
        """Makes the directory, or takes up that of a job that goes on, with its files.

        Raises DiskFull before anything is made if the disk has less than `room_bytes`.
        """
        path = self._path(job_id)
        # A caller that leaves meanwhile would remove what is made behind its back.
        await uninterrupted(self._pool.run(self._create_blocking, path, room_bytes))
        return ScratchDir(path, pool=self._pool)

    async def remove(self, job_id: str) -> int:
        """On return nothing of it is left; returns the bytes that went. Absent is fine."""
        path = self._path(job_id)
        return await self._pool.run(_remove_blocking, path)

    async def finish_removal(self, job_id: str) -> int:
        """Deletes what an interrupted `remove` left; a directory made anew since stays."""
        path = self._path(job_id)
        return await self._pool.run(_finish_removal_blocking, path)

    async def list(self) -> list[ScratchEntry]:
        """All jobs' directories, oldest first. What is not ours is not listed."""
        now_ns = self._clock.wall_ns()
        return await self._pool.run(_list_blocking, self._root, now_ns)

    def _path(self, job_id: str) -> Path:
        if not is_ulid(job_id):
            raise InvariantViolation("A scratch directory is named for a job.", job_id=job_id)
        return self._root / job_id

    def _takes_links_blocking(self, directory: Path) -> bool:
        probe = directory / ".link-probe"
        target = self._root / ".link-probe"
        with disk_errors(self._root.parent):
            directory.mkdir(parents=True, exist_ok=True)
            self._root.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            probe.touch()
        try:
            target.hardlink_to(probe)
        except OSError:
            return False
        finally:
            probe.unlink(missing_ok=True)
            target.unlink(missing_ok=True)
        return True

    def _create_blocking(self, path: Path, room_bytes: int) -> None:
        failpoints.fp("stage.before_create_scratch")
        with disk_errors(self._root.parent):
            self._root.mkdir(parents=True, exist_ok=True)
            if room_bytes and (free_bytes := free_bytes_blocking(self._root)) < room_bytes:
                raise DiskFull(free_bytes=free_bytes, requested_bytes=room_bytes)
            path.mkdir(exist_ok=True)
        failpoints.fp("stage.after_create_scratch")


def _remove_blocking(path: Path) -> int:
    """Renames, then deletes. Finishes an earlier, interrupted removal too."""
    removed = _finish_removal_blocking(path)
    doomed = path.with_name(path.name + _REMOVING)
    with disk_errors(path.parent.parent):
        failpoints.fp("stage.before_remove_scratch")
        with suppress(FileNotFoundError):
            path.rename(doomed)
            failpoints.fp("stage.mid_remove_scratch")
        return removed + _delete_tree_blocking(doomed)


def _finish_removal_blocking(path: Path) -> int:
    with disk_errors(path.parent.parent):
        return _delete_tree_blocking(path.with_name(path.name + _REMOVING))


def _delete_tree_blocking(path: Path) -> int:
    try:
        size_bytes, _ = _size_and_change_blocking(path)
    except FileNotFoundError:
        return 0
    shutil.rmtree(path, onerror=_ignore_absent)
    return size_bytes


def _ignore_absent(
    _function: object, _path: str, failure: tuple[object, BaseException, object]
) -> None:
    """A job and the janitor may remove the same directory at once."""
    if not isinstance(failure[1], FileNotFoundError):
        raise failure[1]


def _list_blocking(root: Path, now_ns: int) -> list[ScratchEntry]:
    found: list[tuple[int, ScratchEntry]] = []
    if not root.is_dir():
        return []
    for path in root.iterdir():
        job_id = job_of(path.name)
        if not is_ulid(job_id) or path.is_symlink() or not path.is_dir():
            continue
        try:
            size_bytes, changed_ns = _size_and_change_blocking(path)
        except FileNotFoundError:
            continue
        entry = ScratchEntry(
            job_id=job_id,
            age_seconds=max(now_ns - changed_ns, 0) / 1e9,
            bytes=size_bytes,
            removing=path.name != job_id,
        )
        found.append((changed_ns, entry))
    return [entry for _, entry in sorted(found, key=lambda pair: pair[0])]


def _size_and_change_blocking(path: Path) -> tuple[int, int]:
    """Bytes of the files below `path`, and when the newest of them or `path` itself changed."""
    size_bytes, changed_ns = 0, path.stat().st_mtime_ns
    for directory, _, names in os.walk(path):
        for name in names:
            with suppress(FileNotFoundError):
                status = os.lstat(os.path.join(directory, name))  # noqa: PTH118 - no object each
                size_bytes += status.st_size
                changed_ns = max(changed_ns, status.st_mtime_ns)
    return size_bytes, changed_ns
