"""A disk that writes down what is done to it, and what a power cut may leave of that.

A cut keeps whatever was synced. Of the rest any subset may be there: each 512-byte sector of a
write, each truncation, each new length, each name in a directory, independently of the others.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from app.core.stores.wal.disk import Buffer, SystemDisk

SECTOR_BYTES = 512
Keep = Literal["synced", "all", "some"]


@dataclass(frozen=True)
class Write:
    inode: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Truncate:
    inode: int
    size: int


@dataclass(frozen=True)
class SyncData:
    inode: int


@dataclass(frozen=True)
class Link:
    directory: Path
    name: str
    inode: int | None  # None: a directory


@dataclass(frozen=True)
class Unlink:
    directory: Path
    name: str


@dataclass(frozen=True)
class SyncDirectory:
    directory: Path


@dataclass(frozen=True)
class Note:
    """Something outside the disk that a cut before it has not seen."""

    value: object


Step = Write | Truncate | SyncData | Link | Unlink | SyncDirectory | Note


class RecordingDisk(SystemDisk):
    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._inodes: dict[int, int] = {}
        self._by_path: dict[Path, int] = {}
        self._count = 0

    def note(self, value: object) -> None:
        self.steps.append(Note(value))

    def make_directory(self, path: Path) -> None:
        new = not path.exists()
        super().make_directory(path)
        if new:
            self.steps.append(Link(path.parent, path.name, None))

    def create(self, path: Path) -> int:
        fd = super().create(path)
        self._count += 1
        self._inodes[fd] = self._by_path[path] = self._count
        self.steps.append(Link(path.parent, path.name, self._count))
        return fd

    def create_unnamed(self, directory: Path) -> int:
        fd = super().create_unnamed(directory)
        self._count += 1
        self._inodes[fd] = self._count
        return fd

    def link(self, fd: int, path: Path) -> None:
        super().link(fd, path)
        self._by_path[path] = self._inodes[fd]
        self.steps.append(Link(path.parent, path.name, self._inodes[fd]))

    def open(self, path: Path, *, writable: bool) -> int:
        fd = super().open(path, writable=writable)
        self._inodes[fd] = self._by_path[path]
        return fd

    def close(self, fd: int) -> None:
        del self._inodes[fd]
        super().close(fd)

    def write(self, fd: int, pieces: Sequence[Buffer], offset: int) -> int:
        data = b"".join(pieces)
        count = super().write(fd, [data], offset)
        self.steps.append(Write(self._inodes[fd], offset, data[:count]))
        return count

    def truncate(self, fd: int, size: int) -> None:
        super().truncate(fd, size)
        self.steps.append(Truncate(self._inodes[fd], size))

    def sync_data(self, fd: int) -> None:
        super().sync_data(fd)
        self.steps.append(SyncData(self._inodes[fd]))

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        self.steps.append(SyncDirectory(path))

    def unlink(self, path: Path) -> None:
        if path in self._by_path:
            self.steps.append(Unlink(path.parent, path.name))
            del self._by_path[path]
        super().unlink(path)


@dataclass
class _File:
    synced: bytearray = field(default_factory=bytearray)
    later: list[Write | Truncate] = field(default_factory=list)

    def sync(self) -> None:
        for change in self.later:
            _apply(self.synced, change)
        self.later.clear()


@dataclass
class _Names:
    synced: dict[str, int | None] = field(default_factory=dict)
    later: list[Link | Unlink] = field(default_factory=list)

    def sync(self) -> None:
        for step in self.later:
            _rename(self.synced, step)
        self.later.clear()


def after_cut(
    steps: Sequence[Step], keep: Keep, chooser: random.Random
) -> dict[Path, dict[str, bytes | None]]:
    """The directories with their names; None is a directory."""
    files: dict[int, _File] = defaultdict(_File)
    names: dict[Path, _Names] = defaultdict(_Names)
    for step in steps:
        match step:
            case Write() | Truncate():
                files[step.inode].later.append(step)
            case SyncData():
                files[step.inode].sync()
            case Link() | Unlink():
                names[step.directory].later.append(step)
            case SyncDirectory():
                names[step.directory].sync()
    contents = {inode: _content(file, keep, chooser) for inode, file in files.items()}
    left: dict[Path, dict[str, bytes | None]] = {}
    for directory, known in names.items():
        kept = dict(known.synced)
        for name in known.later:
            if keep == "all" or (keep == "some" and chooser.random() < 0.5):
                _rename(kept, name)
        left[directory] = {
            name: None if inode is None else contents.get(inode, b"")
            for name, inode in kept.items()
        }
    return left


def materialise(left: dict[Path, dict[str, bytes | None]], *, root: Path, at: Path) -> None:
    """Builds under `at` what is reachable from `root`."""
    for name, content in left.get(root, {}).items():
        if content is None:
            (at / name).mkdir()
            materialise(left, root=root / name, at=at / name)
        else:
            (at / name).write_bytes(content)


def _rename(names: dict[str, int | None], step: Link | Unlink) -> None:
    match step:
        case Link():
            names[step.name] = step.inode
        case Unlink():
            names.pop(step.name, None)


def _apply(content: bytearray, change: Write | Truncate) -> None:
    match change:
        case Write(offset=offset, data=data):
            _resize(content, max(len(content), offset + len(data)))
            content[offset : offset + len(data)] = data
        case Truncate(size=size):
            _resize(content, size)


def _content(file: _File, keep: Keep, chooser: random.Random) -> bytes:
    content = bytearray(file.synced)
    sizes = [len(content)]
    for change in file.later:
        if keep == "all":
            _apply(content, change)
        elif keep == "some":
            match change:
                case Write():
                    size = max(len(content), change.offset + len(change.data))
                    _resize(content, size)
                    _apply_torn(content, change, chooser)
                case Truncate() if chooser.random() < 0.5:
                    _apply(content, change)
        sizes.append(len(content))
    if keep == "some":
        _resize(content, chooser.choice(sizes))
    return bytes(content)


def _apply_torn(content: bytearray, change: Write, chooser: random.Random) -> None:
    start, end = change.offset, change.offset + len(change.data)
    while start < end:
        stop = min((start // SECTOR_BYTES + 1) * SECTOR_BYTES, end)
        if chooser.random() < 0.5:
            content[start:stop] = change.data[start - change.offset : stop - change.offset]
        start = stop


def _resize(content: bytearray, size: int) -> None:
    del content[size:]
    content.extend(bytes(size - len(content)))
