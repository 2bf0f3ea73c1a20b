"""A directory tree rebuilt from system calls, with the moment at which each change is durable."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers import syscalls
from tests.helpers.syscalls import Call

UNRECORDED = frozenset({"lock.mdb"})
"""LMDB writes it through a shared mapping; no data depends on it."""
NEVER = math.inf


class RecordingIncomplete(AssertionError):
    """The process changed the tree in a way that was not recorded."""


@dataclass(slots=True, kw_only=True)
class DataChange:
    """A write at `offset`, or (with `size`) a change of length."""

    began: int
    ended: int
    durable: float
    offset: int = 0
    data: bytes = b""
    size: int | None = None


@dataclass(slots=True, kw_only=True)
class NameChange:
    """Names of one directory that change together; a move between two is one of each."""

    began: int
    durable: float
    ended: int
    entries: dict[str, "Inode | None"]


@dataclass(slots=True, eq=False)
class Inode:
    is_directory: bool
    changes: list[DataChange] = field(default_factory=list)
    names: list[NameChange] = field(default_factory=list)
    live: dict[str, "Inode"] = field(default_factory=dict)
    size: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What the process told the world outside at that moment: `{"try": …}`, `{"ack": …}`."""

    line: int
    value: dict[str, Any]


@dataclass(slots=True, kw_only=True)
class OpenFile:
    inode: Inode
    flags: frozenset[str]
    position: int = 0

    @property
    def is_synchronous(self) -> bool:
        return bool(self.flags & {"O_DSYNC", "O_SYNC"})


class DiskReplay:
    """Applies calls to a tree of inodes, and notes when each change became durable."""

    def __init__(self, root: Path, notes: Path, *, cwd: Path) -> None:
        self._cwd = os.fspath(cwd)
        self.root = Inode(is_directory=True)
        self.notes: list[Note] = []
        self.lines: list[int] = []
        self._root_path = os.fspath(root)
        self._notes_path = os.fspath(notes)
        self._files: dict[int, OpenFile] = {}

    def apply(self, call: Call) -> None:
        if call.result < 0:
            return
        handler = getattr(self, f"_{call.name}", None)
        if handler is not None:
            handler(call)

    # --- names

    def _parts(self, path: str) -> list[str] | None:
        """Below the root; None where the path lies elsewhere."""
        if path == self._root_path:
            return []
        if not path.startswith(self._root_path + "/"):
            return None
        return path[len(self._root_path) + 1 :].split("/")

    def _find(self, path: str) -> Inode | None:
        parts = self._parts(path)
        if parts is None:
            return None
        node = self.root
        for part in parts:
            node = node.live[part]
        return node

    def _place(self, path: str) -> tuple[Inode, str] | None:
        parent = self._find(str(Path(path).parent))
        return None if parent is None else (parent, Path(path).name)

    def _path(self, argument: str) -> str:
        return os.path.normpath(Path(self._cwd) / syscalls.quoted(argument).decode())

    def _chdir(self, call: Call) -> None:
        self._cwd = self._path(call.arguments[0])

    def _fchdir(self, call: Call) -> None:
        self._cwd = syscalls.descriptor(call.arguments[0])[1]

    def _path_at(self, directory: str, name: str) -> str:
        relative = syscalls.quoted(name).decode()
        base = syscalls.text(directory.partition("<")[2].partition(">")[0])
        return os.path.normpath(Path(base) / relative)

    def _rename_entry(self, call: Call, changes: Sequence[tuple[Inode, str, Inode | None]]) -> None:
        by_directory: dict[int, tuple[Inode, dict[str, Inode | None]]] = {}
        for directory, name, inode in changes:
            by_directory.setdefault(id(directory), (directory, {}))[1][name] = inode
        for directory, entries in by_directory.values():
            directory.names.append(
                NameChange(began=call.began, ended=call.ended, durable=NEVER, entries=entries)
            )
            for name, inode in entries.items():
                if inode is None:
                    directory.live.pop(name, None)
                else:
                    directory.live[name] = inode
        self.lines += [call.began, call.ended]

    def _openat(self, call: Call) -> None:
        assert call.result_path is not None
        if call.result_path == self._notes_path:
            self._files.pop(call.result, None)
            return
        path = self._path_at(call.arguments[0], call.arguments[1])
        flags = frozenset(call.arguments[2].split("|"))
        place = self._place(path)
        self._files.pop(call.result, None)
        if place is None and self._parts(path) is None:
            return
        if place is not None and place[1] not in place[0].live and path != self._root_path:
            if "O_CREAT" not in flags:
                raise RecordingIncomplete(f"{path} was opened, but never made")
            self._rename_entry(call, [(*place, Inode(is_directory=False))])
        inode = self._find(path)
        assert inode is not None
        if "O_TRUNC" in flags:
            self._change(call, inode, DataChange(began=0, ended=0, durable=NEVER, size=0))
        self._files[call.result] = OpenFile(inode=inode, flags=flags)

    def _open(self, call: Call) -> None:
        if call.result_path is not None and self._parts(call.result_path) is not None:
            raise RecordingIncomplete(f"{call.name} is not modelled")

    _creat = _open

    def _close(self, call: Call) -> None:
        self._files.pop(syscalls.descriptor(call.arguments[0])[0], None)

    def _dup(self, call: Call) -> None:
        source = self._files.get(syscalls.descriptor(call.arguments[0])[0])
        self._files.pop(call.result, None)
        if source is not None:
            self._files[call.result] = source

    _dup2 = _dup3 = _dup

    def _mkdir_path(self, call: Call, path: str) -> None:
        place = self._place(path) if path != self._root_path else None
        if place is not None:
            self._rename_entry(call, [(*place, Inode(is_directory=True))])

    def _mkdir(self, call: Call) -> None:
        self._mkdir_path(call, self._path(call.arguments[0]))

    def _mkdirat(self, call: Call) -> None:
        self._mkdir_path(call, self._path_at(call.arguments[0], call.arguments[1]))

    def _remove_path(self, call: Call, path: str) -> None:
        place = self._place(path)
        if place is not None:
            self._rename_entry(call, [(*place, None)])

    def _unlink(self, call: Call) -> None:
        self._remove_path(call, self._path(call.arguments[0]))

    _rmdir = _unlink

    def _unlinkat(self, call: Call) -> None:
        self._remove_path(call, self._path_at(call.arguments[0], call.arguments[1]))

    def _move(self, call: Call, source: str, target: str) -> None:
        old, new = self._place(source), self._place(target)
        if old is None and new is None:
            return
        if old is None or new is None:
            raise RecordingIncomplete(f"{source} was moved across the root's border")
        inode = old[0].live[old[1]]
        if new[0].live.get(new[1]) is inode:
            return  # rename(2): two links to one file stay as they are
        self._rename_entry(call, [(*old, None), (*new, inode)])

    def _rename(self, call: Call) -> None:
        source, target = map(self._path, call.arguments)
        self._move(call, source, target)

    def _renameat(self, call: Call) -> None:
        first, second, third, fourth = call.arguments[:4]
        self._move(call, self._path_at(first, second), self._path_at(third, fourth))

    _renameat2 = _renameat

    def _link_paths(self, call: Call, source: str, target: str) -> None:
        place, inode = self._place(target), self._find(source)
        if place is not None:
            if inode is None:
                raise RecordingIncomplete(f"{source} was linked across the root's border")
            self._rename_entry(call, [(*place, inode)])

    def _link(self, call: Call) -> None:
        source, target = map(self._path, call.arguments)
        self._link_paths(call, source, target)

    def _linkat(self, call: Call) -> None:
        first, second, third, fourth = call.arguments[:4]
        self._link_paths(call, self._path_at(first, second), self._path_at(third, fourth))

    def _symlink(self, call: Call) -> None:
        raise RecordingIncomplete(f"{call.name} is not modelled")

    _symlinkat = _symlink

    # --- data

    def _change(self, call: Call, inode: Inode, change: DataChange) -> None:
        change.began, change.ended = call.began, call.ended
        inode.changes.append(change)
        if change.size is not None:
            inode.size = change.size
        else:
            inode.size = max(inode.size, change.offset + len(change.data))
        self.lines += [call.began, call.ended]

    def _write_at(self, call: Call, data: bytes, offset: int | None) -> None:
        number, path = syscalls.descriptor(call.arguments[0])
        if path == self._notes_path:
            for line in data.splitlines():
                self.notes.append(Note(line=call.began, value=json.loads(line)))
            self.lines.append(call.began)
            return
        file = self._files.get(number)
        if file is None:
            if self._parts(path):
                raise RecordingIncomplete(f"a write to {path} through an unknown descriptor")
            return
        data = data[: call.result]
        at = offset
        if at is None:
            at = file.inode.size if "O_APPEND" in file.flags else file.position
            file.position = at + len(data)
        durable = call.ended if file.is_synchronous else NEVER
        self._change(
            call, file.inode, DataChange(began=0, ended=0, durable=durable, offset=at, data=data)
        )

    def _write(self, call: Call) -> None:
        self._write_at(call, syscalls.quoted(call.arguments[1]), None)

    def _writev(self, call: Call) -> None:
        self._write_at(call, syscalls.vector(call.arguments[1]), None)

    def _pwrite64(self, call: Call) -> None:
        self._write_at(call, syscalls.quoted(call.arguments[1]), int(call.arguments[3]))

    def _pwritev(self, call: Call) -> None:
        self._write_at(call, syscalls.vector(call.arguments[1]), int(call.arguments[3]))

    def _pwritev2(self, call: Call) -> None:
        offset = int(call.arguments[3])
        self._write_at(call, syscalls.vector(call.arguments[1]), None if offset < 0 else offset)

    def _lseek(self, call: Call) -> None:
        file = self._files.get(syscalls.descriptor(call.arguments[0])[0])
        if file is not None:
            file.position = call.result

    def _ftruncate(self, call: Call) -> None:
        file = self._files.get(syscalls.descriptor(call.arguments[0])[0])
        if file is not None:
            size = int(call.arguments[1])
            durable = call.ended if file.is_synchronous else NEVER
            self._change(call, file.inode, DataChange(began=0, ended=0, durable=durable, size=size))

    def _truncate(self, call: Call) -> None:
        inode = self._find(self._path(call.arguments[0]))
        if inode is not None:
            size = int(call.arguments[1])
            self._change(call, inode, DataChange(began=0, ended=0, durable=NEVER, size=size))

    def _fallocate(self, call: Call) -> None:
        file = self._files.get(syscalls.descriptor(call.arguments[0])[0])
        if file is None:
            return
        if call.arguments[1] not in {"0", "FALLOC_FL_KEEP_SIZE"}:
            raise RecordingIncomplete(f"fallocate {call.arguments[1]} is not modelled")
        end = int(call.arguments[2]) + int(call.arguments[3])
        if call.arguments[1] == "0" and end > file.inode.size:
            self._change(call, file.inode, DataChange(began=0, ended=0, durable=NEVER, size=end))

    def _copy_file_range(self, call: Call) -> None:
        if self._files.get(syscalls.descriptor(call.arguments[2])[0]) is not None:
            raise RecordingIncomplete("copy_file_range is not modelled")

    def _sendfile(self, call: Call) -> None:
        if self._files.get(syscalls.descriptor(call.arguments[0])[0]) is not None:
            raise RecordingIncomplete("sendfile is not modelled")

    def _mmap(self, call: Call) -> None:
        if "MAP_SHARED" in call.arguments[3] and "PROT_WRITE" in call.arguments[2]:
            _, path = syscalls.descriptor(call.arguments[4])
            if self._parts(path) and Path(path).name not in UNRECORDED:
                raise RecordingIncomplete(f"{path} is written through a mapping")

    # --- durability

    def _fsync(self, call: Call) -> None:
        file = self._files.get(syscalls.descriptor(call.arguments[0])[0])
        if file is None:
            return
        changes = file.inode.names if file.inode.is_directory else file.inode.changes
        for change in changes:
            if change.ended < call.began:
                change.durable = min(change.durable, call.ended)
        self.lines += [call.began, call.ended]

    _fdatasync = _fsync

    def _sync(self, call: Call) -> None:
        raise RecordingIncomplete(f"{call.name} is not modelled")

    _syncfs = _sync
