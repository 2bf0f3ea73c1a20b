"""Power cuts: from the system calls of a real process, every state its disk could be left in.

The disk is assumed to promise no more than POSIX does:
- a write is durable once a later fsync or fdatasync of its file has returned, or at its own return
  on a descriptor opened O_DSYNC or O_SYNC; until then each of its 512-byte sectors may be there
  or not, and a file's new length may be there without its data (as zeros);
- a name made, moved or removed is durable once its directory has been fsynced, and not before:
  fsync of the file is not enough. Of what is not yet durable a directory keeps some first part.
Writes through a writable shared mapping are not seen by strace: such a mapping of any file but
LMDB's lock.mdb, which no data depends on, fails the recording; so does a tree that, in the end,
differs from what the recorded calls come to.
"""

import copy
import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from tests.helpers import syscalls
from tests.helpers.syscalls import Call

SECTOR_BYTES = 512
UNRECORDED = frozenset({"lock.mdb"})
NEVER = math.inf

Mode = Literal["dropped", "kept", "torn"]
R = TypeVar("R")


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


Tree = dict[str, bytes | None]
"""Path below the root to content; None is a directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What the process told the world outside at that moment: `{"try": …}`, `{"ack": …}`."""

    line: int
    value: dict[str, Any]


@dataclass(slots=True, kw_only=True)
class _Open:
    inode: Inode
    flags: frozenset[str]
    position: int = 0

    @property
    def is_synchronous(self) -> bool:
        return bool(self.flags & {"O_DSYNC", "O_SYNC"})


class _Replay:
    """Applies calls to a tree of inodes, and notes when each change became durable."""

    def __init__(self, root: Path, notes: Path, *, cwd: Path) -> None:
        self._cwd = os.fspath(cwd)
        self.root = Inode(is_directory=True)
        self.notes: list[Note] = []
        self.lines: list[int] = []
        self._root_path = os.fspath(root)
        self._notes_path = os.fspath(notes)
        self._files: dict[int, _Open] = {}

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
        self._files[call.result] = _Open(inode=inode, flags=flags)

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


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The power fails after this line of the trace."""

    line: int
    mode: Mode
    seed: int
    tree: Tree
    notes: tuple[dict[str, Any], ...]

    @cached_property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for path, content in sorted(self.tree.items()):
            kind = "d" if content is None else f"f{len(content)}"
            digest.update(f"{len(path)}:{path}{kind}".encode() + (content or b""))
        return digest.hexdigest()

    def __str__(self) -> str:
        return f"cut after line {self.line}, {self.mode}, seed {self.seed}"

    def materialise(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        for path, content in sorted(self.tree.items()):
            target = directory / path
            if content is None:
                target.mkdir()
            else:
                target.write_bytes(content)


class Recording:
    """What a process did to the tree below its root, ready to be cut anywhere."""

    def __init__(self, replay: _Replay) -> None:
        self._root = replay.root
        self._notes = replay.notes
        self.lines = sorted(set(replay.lines))

    @property
    def notes(self) -> list[dict[str, Any]]:
        return [note.value for note in self._notes]

    def until(self, last: Callable[[dict[str, Any]], bool]) -> Self:
        """Only the instants before the first such note."""
        end = next(note.line for note in self._notes if last(note.value))
        shortened = copy.copy(self)
        shortened.lines = [line for line in self.lines if line < end]
        return shortened

    def cut(self, line: int, mode: Mode, seed: int = 0) -> Cut:
        chooser = random.Random(f"{seed}/{line}")
        tree: Tree = {}
        self._collect(self._root, "", line, mode, chooser, tree, {})
        notes = tuple(note.value for note in self._notes if note.line <= line)
        return Cut(line=line, mode=mode, seed=seed, tree=tree, notes=notes)

    def cuts(self, *, seed: int, count: int) -> Iterator[Cut]:
        """Up to `count` different states: first those in which all that could be lost was lost,
        thinned evenly where there are too many, then torn ones, a few with everything kept.
        """
        seen: set[tuple[str, int]] = set()
        made = 0
        plan: list[tuple[Mode, int]] = [("dropped", count // 2), ("kept", count // 8)]
        for mode, share in plan:
            distinct = list(self._distinct(mode, seen))
            for cut in _thinned(distinct, share):
                made += 1
                yield cut
        chooser = random.Random(seed)
        for attempt in range(4 * count):
            if made >= count:
                return
            cut = self.cut(chooser.choice(self.lines), "torn", seed * 100_000 + attempt)
            if (key := (cut.digest, len(cut.notes))) not in seen:
                seen.add(key)
                made += 1
                yield cut

    def _distinct(self, mode: Mode, seen: set[tuple[str, int]]) -> Iterator[Cut]:
        for line in self.lines:
            cut = self.cut(line, mode)
            if (key := (cut.digest, len(cut.notes))) not in seen:
                seen.add(key)
                yield cut

    def _collect(
        self,
        directory: Inode,
        prefix: str,
        line: int,
        mode: Mode,
        chooser: random.Random,
        tree: Tree,
        contents: dict[int, bytes],
    ) -> None:
        for name, inode in sorted(_names_at(directory, line, mode, chooser).items()):
            path = f"{prefix}{name}"
            if inode.is_directory:
                tree[path] = None
                self._collect(inode, f"{path}/", line, mode, chooser, tree, contents)
            else:
                if id(inode) not in contents:  # a hard link has one content
                    contents[id(inode)] = _content_at(inode, line, mode, chooser)
                tree[path] = contents[id(inode)]


def _names_at(directory: Inode, line: int, mode: Mode, chooser: random.Random) -> dict[str, Inode]:
    issued = [change for change in directory.names if change.began <= line]
    pending = [change for change in issued if change.durable > line]
    kept = {"dropped": 0, "kept": len(pending)}.get(mode)
    if kept is None:
        kept = chooser.randint(0, len(pending))
    lost = {id(change) for change in pending[kept:]}
    entries: dict[str, Inode] = {}
    for change in issued:
        if id(change) in lost:
            continue
        for name, inode in change.entries.items():
            if inode is None:
                entries.pop(name, None)
            else:
                entries[name] = inode
    return entries


def _content_at(inode: Inode, line: int, mode: Mode, chooser: random.Random) -> bytes:
    content = bytearray()
    for change in inode.changes:
        if change.began > line:
            continue
        is_durable = change.durable <= line
        if not is_durable and mode == "dropped":
            continue
        if is_durable or mode == "kept":
            _put(content, change)
        else:
            _put_torn(content, change, chooser)
    return bytes(content)


def _put(content: bytearray, change: DataChange) -> None:
    if change.size is not None:
        _resize(content, change.size)
        return
    end = change.offset + len(change.data)
    if end > len(content):
        _resize(content, end)
    content[change.offset : end] = change.data


def _put_torn(content: bytearray, change: DataChange, chooser: random.Random) -> None:
    """All of it, none of it, its length alone, or any of its sectors."""
    fate = chooser.choice(("all", "none", "length", "sectors", "sectors"))
    if fate == "none":
        return
    if change.size is not None or fate == "all":
        _put(content, change)
        return
    end = change.offset + len(change.data)
    if fate == "length":
        _resize(content, max(end, len(content)))
        return
    start = change.offset
    while start < end:
        stop = min(end, (start // SECTOR_BYTES + 1) * SECTOR_BYTES)
        if chooser.random() < 0.5:
            if stop > len(content):
                _resize(content, stop)
            content[start:stop] = change.data[start - change.offset : stop - change.offset]
        start = stop


def _resize(content: bytearray, size: int) -> None:
    if size < len(content):
        del content[size:]
    else:
        content.extend(bytes(size - len(content)))


def _thinned(cuts: Sequence[Cut], count: int) -> list[Cut]:
    if len(cuts) <= count:
        return list(cuts)
    step = len(cuts) / count
    return [cuts[int(place * step)] for place in range(count - 1)] + [cuts[-1]]


def record(
    command: Sequence[str], *, environment: Mapping[str, str], cwd: Path, work: Path
) -> Recording:
    """Runs `command` to its end under strace. It finds its empty directory in `POWERCUT_ROOT` and
    tells the world by appending JSON lines to `POWERCUT_NOTES`.
    """
    root, notes = work / "root", work / "notes"
    root.mkdir(parents=True)
    notes.touch()
    calls = syscalls.trace(
        command,
        environment={
            **environment,
            "POWERCUT_ROOT": os.fspath(root),
            "POWERCUT_NOTES": os.fspath(notes),
        },
        cwd=cwd,
        into=work / "trace",
    )
    replay = _Replay(root, notes, cwd=cwd)
    for call in calls:
        replay.apply(call)
    recording = Recording(replay)
    _check_complete(recording, root)
    shutil.rmtree(root)
    (work / "trace").unlink()
    return recording


def _check_complete(recording: Recording, root: Path) -> None:
    modelled = recording.cut(recording.lines[-1], "kept").tree
    actual: Tree = {
        os.fspath(path.relative_to(root)): None if path.is_dir() else path.read_bytes()
        for path in root.rglob("*")
    }
    for path in sorted(modelled.keys() | actual.keys()):
        if Path(path).name in UNRECORDED:
            continue
        if path not in actual or path not in modelled or modelled[path] != actual[path]:
            raise RecordingIncomplete(
                f"{path}: recorded {_shape(modelled, path)}, on disk {_shape(actual, path)}"
            )


def _shape(tree: Tree, path: str) -> str:
    if path not in tree:
        return "absent"
    content = tree[path]
    return "a directory" if content is None else f"{len(content)} bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    states: int
    violations: list[str]


def survey(
    recording: Recording,
    *,
    recover: Callable[[Path], R],
    verify: Callable[[R, Sequence[dict[str, Any]]], None],
    scratch: Path,
    seed: int,
    count: int,
) -> Survey:
    """Starts on each sampled state with `recover` and judges what it gave by `verify`, which
    raises AssertionError. An error of `recover` (see `Isolated`) is a violation too: a power cut
    must not keep the service from starting.
    """
    violations: list[str] = []
    outcomes: dict[str, R | Exception] = {}
    for cut in recording.cuts(seed=seed, count=count):
        if cut.digest not in outcomes:
            directory = scratch / f"cut-{len(outcomes)}"
            cut.materialise(directory)
            try:
                outcomes[cut.digest] = recover(directory)
            except Exception as error:  # noqa: BLE001 - judged below, with its state
                outcomes[cut.digest] = error
            finally:
                shutil.rmtree(directory)
        try:
            match outcomes[cut.digest]:
                case Exception() as error:
                    raise error
                case recovered:
                    verify(recovered, cut.notes)
        except Exception as error:  # noqa: BLE001 - every failure counts
            violations.append(f"{cut}: {type(error).__name__}: {error}")
    return Survey(states=len(outcomes), violations=violations)
