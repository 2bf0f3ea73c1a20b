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
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from tests.helpers import syscalls
from tests.helpers.disk_replay import (
    UNRECORDED,
    DataChange,
    DiskReplay,
    Inode,
    RecordingIncomplete,
)

SECTOR_BYTES = 512

Mode = Literal["dropped", "kept", "torn"]
R = TypeVar("R")

Tree = dict[str, bytes | None]
"""Path below the root to content; None is a directory."""


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

    def __init__(self, replay: DiskReplay) -> None:
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
    replay = DiskReplay(root, notes, cwd=cwd)
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
    recover: Callable[[Path, Sequence[dict[str, Any]]], R],
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
    states = 0
    for cut in recording.cuts(seed=seed, count=count):
        states += 1
        directory = scratch / f"cut-{states}"
        cut.materialise(directory)
        try:
            verify(recover(directory, cut.notes), cut.notes)
        except Exception as error:  # noqa: BLE001 - every failure counts
            violations.append(f"{cut}: {type(error).__name__}: {error}")
        finally:
            shutil.rmtree(directory)
    return Survey(states=states, violations=violations)
