"""Disks that misbehave under a real file system."""

import os
from collections.abc import Sequence
from pathlib import Path

from app.core.stores.wal.disk import Buffer, SystemDisk


class FaultyDisk(SystemDisk):
    """Fails the calls that are armed, counts them all, and writes no more than `write_max`."""

    def __init__(self) -> None:
        self.write_max: int | None = None
        self.free: int | None = None
        self.calls: list[str] = []
        self._armed: dict[str, list[int | None]] = {}

    def fail(self, call: str, *outcomes: int | None) -> None:
        """Errnos of the next calls; None lets one pass."""
        self._armed.setdefault(call, []).extend(outcomes)

    def clear(self) -> None:
        """Nothing fails any more."""
        self._armed.clear()

    def _pass(self, call: str) -> None:
        self.calls.append(call)
        armed = self._armed.get(call)
        if armed and (code := armed.pop(0)) is not None:
            raise OSError(code, os.strerror(code))

    def make_directory(self, path: Path) -> None:
        self._pass("make_directory")
        super().make_directory(path)

    def create(self, path: Path) -> int:
        self._pass("create")
        return super().create(path)

    def create_unnamed(self, directory: Path) -> int:
        self._pass("create_unnamed")
        return super().create_unnamed(directory)

    def link(self, fd: int, path: Path) -> None:
        self._pass("link")
        super().link(fd, path)

    def identify(self, path: Path) -> tuple[int, int]:
        self._pass("identify")
        return super().identify(path)

    def open(self, path: Path, *, writable: bool) -> int:
        self._pass("open")
        return super().open(path, writable=writable)

    def read(self, fd: int, length: int, offset: int) -> bytes:
        self._pass("read")
        return super().read(fd, length, offset)

    def write(self, fd: int, pieces: Sequence[Buffer], offset: int) -> int:
        self._pass("write")
        if self.write_max is not None:
            pieces = [b"".join(pieces)[: self.write_max]]
        return super().write(fd, pieces, offset)

    def truncate(self, fd: int, size: int) -> None:
        self._pass("truncate")
        super().truncate(fd, size)

    def sync_data(self, fd: int) -> None:
        self._pass("sync_data")
        super().sync_data(fd)

    def sync_directory(self, path: Path) -> None:
        self._pass("sync_directory")
        super().sync_directory(path)

    def unlink(self, path: Path) -> None:
        self._pass("unlink")
        super().unlink(path)

    def free_bytes(self, path: Path) -> int:
        return super().free_bytes(path) if self.free is None else self.free
