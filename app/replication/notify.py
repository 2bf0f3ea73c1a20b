"""Who wakes a follower: inotify (Linux, inotify(7)), on the directories of the files followed.

Concurrency: on the event loop. Idle databases cost nothing: no thread, no timer. SQLite writes a
commit to `-wal` first, which is seen here, and then to the mapped `-shm`, which no one is told of:
a follower looks again for a while after it was woken. Where there is no inotify, or not enough of
it, `watch` says False and followers look now and then.
"""

import asyncio
import ctypes
import os
import struct
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType
from typing import Self

_IN_MODIFY, _IN_MOVED_FROM, _IN_MOVED_TO = 0x2, 0x40, 0x80
_IN_CREATE, _IN_DELETE, _IN_MOVE_SELF, _IN_ONLYDIR = 0x100, 0x200, 0x800, 0x01000000
_MASK = (
    _IN_MODIFY
    | _IN_MOVED_FROM
    | _IN_MOVED_TO
    | _IN_CREATE
    | _IN_DELETE
    | _IN_MOVE_SELF
    | _IN_ONLYDIR
)
_IN_Q_OVERFLOW, _IN_IGNORED = 0x4000, 0x8000
_EVENT = struct.Struct("=iIII")
_READ_BYTES = 64 * 1024
PAUSE_SECONDS = 0.005
"""Between two reads: a busy writer makes thousands of events, and one of them is enough."""

Changed = Callable[[str, bool], None]
"""Takes the name within the directory, and whether names came or went; an empty name: anything."""
ANY_NAME = ""


class Notifier:
    def __init__(self) -> None:
        self._fd = -1
        self._libc: ctypes.CDLL | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listeners: dict[int, dict[str, list[Changed]]] = {}
        """By watch and name: a directory of many databases wakes those that changed."""
        self._pause: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            fd = int(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        except (OSError, AttributeError):
            return self
        if fd >= 0:
            self._fd, self._libc = fd, libc
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(fd, self._read)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._pause is not None:
            self._pause.cancel()
        if self._fd >= 0 and self._loop is not None:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
        self._fd = -1

    def watch(
        self, directory: Path, changed: Changed, names: Collection[str] = (ANY_NAME,)
    ) -> bool:
        """Calls `changed` from now on when one of `names` does, or the directory itself goes; False
        if it cannot. Again is harmless, and needed where the directory may be another one.
        """
        if self._libc is None or self._fd < 0:
            return False
        watch = int(self._libc.inotify_add_watch(self._fd, os.fsencode(directory), _MASK))
        if watch < 0:
            return False
        by_name = self._listeners.setdefault(watch, {})
        for name in names:
            listeners = by_name.setdefault(name, [])
            if changed not in listeners:
                listeners.append(changed)
        return True

    def forget(self, changed: Changed) -> None:
        """The watch of the directory stays: it costs nothing."""
        for by_name in self._listeners.values():
            for name in [name for name, listeners in by_name.items() if changed in listeners]:
                by_name[name].remove(changed)
                if not by_name[name]:
                    del by_name[name]

    def _read(self) -> None:
        assert self._loop is not None, "it reads only where it was entered"
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return
        self._loop.remove_reader(self._fd)
        self._pause = self._loop.call_later(PAUSE_SECONDS, self._resume)
        seen: set[tuple[int, str, bool]] = set()
        gone: set[int] = set()
        at = 0
        while at < len(data):
            watch, mask, _, length = _EVENT.unpack_from(data, at)
            at += _EVENT.size
            name = os.fsdecode(data[at : at + length].rstrip(b"\0"))
            at += length
            if mask & _IN_Q_OVERFLOW:
                seen |= {(each, "", True) for each in self._listeners}
            else:
                seen.add((watch, name, not mask & _IN_MODIFY))
            if mask & _IN_IGNORED:
                gone.add(watch)
        for watch, name, names_changed in seen:
            for changed in self._concerned(watch, name):
                changed(name, names_changed)
        for watch in gone:
            self._listeners.pop(watch, None)

    def _concerned(self, watch: int, name: str) -> Collection[Changed]:
        by_name = self._listeners.get(watch, {})
        if not name:
            return {changed for listeners in by_name.values() for changed in listeners}
        return (*by_name.get(name, ()), *by_name.get(ANY_NAME, ()))

    def _resume(self) -> None:
        if self._fd >= 0 and self._loop is not None:
            self._loop.add_reader(self._fd, self._read)
