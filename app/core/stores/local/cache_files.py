"""The hot cache's files: `ab/cd/abcd…` by SHA-256, and `incoming/` for what has no name yet.

All of it blocks and belongs in a pool. A file gets its name by rename, whole or not at all.
"""

import errno
import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from app.core.base import failpoints

_SHA256 = re.compile(r"[0-9a-f]{64}")
_INCOMING = "incoming"
_HASH_BYTES = 1024 * 1024
# Another file system, one without hard links, or an inode with too many of them.
_CANNOT_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP})


def is_sha256(text: str) -> bool:
    return _SHA256.fullmatch(text) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedFile:
    sha256: str
    bytes: int
    device: int
    inode: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Unlinked:
    gone: tuple[CachedFile, ...]
    failed: tuple[tuple[CachedFile, str], ...]
    freed_bytes: int
    """Only of files that were linked nowhere else."""


class CacheFiles:
    def __init__(self, root: Path) -> None:
        self._root = root
        self._incoming = root / _INCOMING
        self._numbers = itertools.count()

    def path(self, sha256: str) -> Path:
        return self._root / sha256[:2] / sha256[2:4] / sha256

    def open_blocking(self) -> list[CachedFile]:
        """Clears what arrived only in part, and lists the rest, longest unchanged first."""
        shutil.rmtree(self._incoming, ignore_errors=True)
        self._incoming.mkdir(parents=True, exist_ok=True)
        found: list[tuple[int, CachedFile]] = []
        for path in self._root.glob("[0-9a-f][0-9a-f]/[0-9a-f][0-9a-f]/*"):
            if is_sha256(path.name) and path == self.path(path.name) and not path.is_symlink():
                status = path.lstat()
                found.append((status.st_mtime_ns, _cached(path.name, status)))
        found.sort(key=lambda pair: (pair[0], pair[1].sha256))
        return [file for _, file in found]

    def open_file_blocking(self, sha256: str) -> int:
        return os.open(self.path(sha256), os.O_RDONLY)

    def hash_blocking(self, descriptor: int) -> str:
        """SHA-256 of all of an open file."""
        digest, offset = hashlib.sha256(), 0
        while piece := os.pread(descriptor, _HASH_BYTES, offset):
            digest.update(piece)
            offset += len(piece)
        return digest.hexdigest()

    def link_blocking(self, source: Path, sha256: str, size_bytes: int) -> CachedFile:
        """Links or copies `source` in; raises OSError, and leaves nothing, if that cannot be."""
        part = self.new_part_blocking()
        try:
            try:
                os.link(source, part)
            except OSError as error:
                if error.errno not in _CANNOT_LINK:
                    raise
                shutil.copyfile(source, part)
            return self.name_blocking(part, sha256, size_bytes)
        finally:
            # Renaming one link of a file over another does nothing: then the part is still here.
            part.unlink(missing_ok=True)

    def new_part_blocking(self) -> Path:
        self._incoming.mkdir(parents=True, exist_ok=True)
        return self._incoming / f"{next(self._numbers)}.part"

    def name_blocking(self, part: Path, sha256: str, size_bytes: int) -> CachedFile:
        status = part.stat()
        if status.st_size != size_bytes:
            raise OSError(errno.EINVAL, f"{status.st_size} bytes instead of {size_bytes}")
        target = self.path(sha256)
        target.parent.mkdir(parents=True, exist_ok=True)
        failpoints.fp("hot_cache.before_rename")
        part.replace(target)
        return _cached(sha256, status)

    def unshared_blocking(self, names: Iterable[str]) -> set[str]:
        """Those whose removal frees their bytes: linked nowhere else (or gone already)."""
        alone: set[str] = set()
        for name in names:
            try:
                if self.path(name).lstat().st_nlink == 1:
                    alone.add(name)
            except FileNotFoundError:
                alone.add(name)
        return alone

    def unlink_blocking(self, files: Sequence[CachedFile]) -> Unlinked:
        gone: list[CachedFile] = []
        failed: list[tuple[CachedFile, str]] = []
        freed_bytes = 0
        for file in files:
            path = self.path(file.sha256)
            try:
                with suppress(FileNotFoundError):
                    links = path.lstat().st_nlink
                    failpoints.fp("hot_cache.before_unlink")
                    path.unlink()
                    freed_bytes += file.bytes if links == 1 else 0
            except OSError as error:
                failed.append((file, str(error)))
            else:
                gone.append(file)
        return Unlinked(gone=tuple(gone), failed=tuple(failed), freed_bytes=freed_bytes)


def _cached(sha256: str, status: os.stat_result) -> CachedFile:
    return CachedFile(
        sha256=sha256, bytes=status.st_size, device=status.st_dev, inode=status.st_ino
    )
