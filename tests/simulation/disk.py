"""A disk that fails under the WAL, scratch and hot cache, and under the manifest's commits.

Full for a while, it takes no bytes that are new; now and then a write is cut short, refused, or
fails; a sync that fails may have lost what was written since the one before. What must come of it
(I16): want of room refuses and goes on, a cache does without, and any other failure ends the
process in order.
"""

import errno
import io
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

Area = Literal["wal", "scratch", "cache", "manifest"]
_AREAS: dict[str, Area] = {"wal": "wal", "checkpoint_scratch": "scratch", "hot_cache": "cache"}


@dataclass(frozen=True, kw_only=True)
class DiskRates:
    """Of all writes or syncs, and of time."""

    no_room: float = 0.001
    short: float = 0.01
    failed: float = 0.0006
    failed_sync: float = 0.001
    frail_lives: float = 0.25
    """In which writes and syncs fail."""
    full_every_seconds: float = 600.0
    full_seconds: float = 60.0


class _File(io.FileIO):
    """A file that a store of ours writes through Python's own layer."""

    def __init__(self, disk: "Disk", area: Area, path: Path, mode: str) -> None:
        super().__init__(path, mode)
        self._disk, self._area = disk, area

    def write(self, data: Any) -> int:
        view = memoryview(data)
        length = self._disk.before_write(self._area, len(view))
        return super().write(view[:length])

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._disk.date(Path(os.fsdecode(self.name)))


@dataclass
class Disk:
    """One life's."""

    root: Path
    source: random.Random
    now: Callable[[], float]
    faults: "Counter[str]"
    rates: DiskRates = field(default_factory=DiskRates)
    healthy: bool = False
    failed: Area | None = None
    """Under what it first failed in a way that must end the process."""
    failed_at: float = 0.0
    refusals: int = 0
    """For want of room."""
    writes: int = 0
    _full: tuple[float, float] = (0.0, 0.0)
    _durable: dict[tuple[int, int], int] = field(default_factory=dict)
    _lost: list[tuple[Path, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._is_frail = self.source.random() < self.rates.frail_lives

    # --- what the stores call

    def patch(self, patch: pytest.MonkeyPatch) -> None:  # noqa: C901 - one function a call
        """Until it is undone, what this process does to files below `root` passes here."""
        pwritev, fdatasync, fsync, link = os.pwritev, os.fdatasync, os.fsync, os.link
        opened, statvfs = Path.open, os.statvfs

        def faulty_statvfs(path: Any) -> os.statvfs_result:
            if isinstance(path, int) or self._area_of_path(Path(path)) is None:
                return statvfs(path)
            room = 0 if self._is_full() else 1 << 20
            return os.statvfs_result((4096, 4096, 1 << 20, room, room, 0, 0, 0, 0, 255))

        def faulty_pwritev(fd: int, pieces: Sequence[Any], offset: int) -> int:
            if (area := self._area_of(fd)) is None:
                return pwritev(fd, pieces, offset)
            length = sum(len(piece) for piece in pieces)
            allowed = self.before_write(area, length)
            if allowed < length:
                return pwritev(fd, [b"".join(pieces)[:allowed]], offset)
            return pwritev(fd, pieces, offset)

        def faulty_sync(real: Callable[[int], None]) -> Callable[[int], None]:
            def sync(fd: int) -> None:
                if (area := self._area_of(fd)) is not None:
                    self._before_sync(area, fd)
                real(fd)

            return sync

        def faulty_link(source: Any, target: Any, **options: Any) -> None:
            area = self._area_of_path(Path(target))
            if area is not None:
                self._room(area)
            link(source, target, **options)
            if area is not None:
                self.date(Path(target))

        def faulty_open(path: Path, mode: str = "r", buffering: int = -1, **options: Any) -> Any:
            if mode not in {"wb", "xb"} or (area := self._area_of_path(path)) is None:
                return opened(path, mode, buffering, **options)
            self._room(area)
            raw = _File(self, area, path, mode.replace("b", ""))
            return raw if buffering == 0 else io.BufferedWriter(raw)

        patch.setattr(os, "pwritev", faulty_pwritev)
        patch.setattr(os, "fdatasync", faulty_sync(fdatasync))
        patch.setattr(os, "fsync", faulty_sync(fsync))
        patch.setattr(os, "link", faulty_link)
        patch.setattr(os, "statvfs", faulty_statvfs)
        patch.setattr(Path, "open", faulty_open)

    def before_commit(self) -> None:
        """Of the manifest: nothing of it is written."""
        self._room("manifest")
        if self._draw("failed"):
            self._fail("manifest", "failed")

    def after_commit(self) -> None:
        """It is written, and its writer is told otherwise."""
        if self._draw("failed_sync"):
            self._fail("manifest", "failed_sync")

    def before_write(self, area: Area, length: int) -> int:
        """How many bytes are taken, at least one. Raises OSError."""
        self.writes += 1
        self._room(area)
        if self._draw("failed"):
            self._fail(area, "failed")
        if length > 1 and self._draw("short"):
            self.faults[f"{area}: short write"] += 1
            return self.source.randrange(1, length)
        return length

    def date(self, path: Path) -> None:
        """By the clock of the simulation: the cache orders what it finds at its start by age."""
        with suppress(FileNotFoundError):
            moment = int(self.now() * 1e9)
            os.utime(path, ns=(moment, moment))

    # --- what comes of it

    def lose(self, root: Path) -> None:
        """What was not durable when a sync failed is gone when the next process looks."""
        for path, size in self._lost:
            with suppress(FileNotFoundError):
                there = root / path
                if there.stat().st_size > size:
                    os.truncate(there, size)

    # --- inside

    def _room(self, area: Area) -> None:
        if self._is_full() or self._draw("no_room"):
            self.faults[f"{area}: no room"] += 1
            self.refusals += 1
            raise OSError(errno.ENOSPC, "simulated: no room")

    def _is_full(self) -> bool:
        if self.healthy:
            return False
        begin, end = self._full
        if self.now() >= end:
            begin = self.now() + self.source.expovariate(1 / self.rates.full_every_seconds)
            end = begin + self.source.expovariate(1 / self.rates.full_seconds)
            self._full = begin, end
        return self.now() >= begin

    def _before_sync(self, area: Area, fd: int) -> None:
        status = os.fstat(fd)
        inode = status.st_dev, status.st_ino
        if self._draw("failed_sync"):
            path = Path(f"/proc/self/fd/{fd}").readlink()
            if path.is_file() and self.source.random() < 0.5:
                size = self._durable.get(inode, 0)
                self._lost.append((path.relative_to(self.root), size))
            self._fail(area, "failed_sync")
        self._durable[inode] = status.st_size

    def _draw(self, kind: str) -> bool:
        is_possible = not self.healthy and (self._is_frail or not kind.startswith("failed"))
        return is_possible and self.source.random() < getattr(self.rates, kind)

    def _fail(self, area: Area, kind: str) -> None:
        self.faults[f"{area}: {kind.replace('_', ' ')}"] += 1
        if self.failed is None and area != "cache":
            self.failed, self.failed_at = area, self.now()
        raise OSError(errno.EIO, f"simulated: {kind}")

    def _area_of(self, fd: int) -> Area | None:
        return self._area_of_path(Path(f"/proc/self/fd/{fd}").readlink())

    def _area_of_path(self, path: Path) -> Area | None:
        text, root = str(path), f"{self.root}/"
        if not text.startswith(root):
            return None
        return _AREAS.get(text[len(root) :].split("/", 1)[0])
