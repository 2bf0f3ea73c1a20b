"""A cold scan as a file on this machine: a SQLite database, records, or the frames themselves.

Invariants: the target's name shows a whole scan or nothing new: frames go to a file beside it,
which is made durable and then renamed. Concurrency: one scan, its file used by one thread at a
time. Cancellation: the unfinished file is removed. Crash: an unfinished `.NAME.….part` may be left.
"""

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from app.client.cold_scans import ColdScans, ScanRequest
from app.client.failures import StreamBroken
from app.core.formats.cold_scan import Frame, FrameType, ScanEnd, ScanStart

Form = Literal["content", "frames"]
"""Pages at their places or records one after the other; or frames as they came."""
Progress = Callable[[ScanStart, int, int], None]
"""Takes the start, the bytes that came, and the chunks that were begun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scanned:
    path: str
    engine: str
    generation: int
    frames: int
    bytes: int
    chunks: int


async def scan_to_file(
    scans: ColdScans,
    asked: ScanRequest,
    target: Path,
    *,
    form: Form = "content",
    replace: bool = False,
    progress: Progress,
) -> Scanned:
    """The file is durable under its name when this returns. Raises FileExistsError unless
    `replace`, ClientError, OSError.
    """
    await asyncio.to_thread(_refuse_existing_blocking, target, replace)
    descriptor, name = await asyncio.to_thread(
        tempfile.mkstemp, ".part", f".{target.name}.", target.parent
    )
    part = Path(name)
    try:
        try:
            sink = _Sink(descriptor, form=form)
            start, end = await _copied(scans, asked, sink, progress)
            await asyncio.to_thread(os.fsync, descriptor)
        finally:
            os.close(descriptor)
        await asyncio.to_thread(_put_in_place_blocking, part, target, replace)
    finally:
        _remove_blocking(part)  # short, and also where the task was cancelled
    return Scanned(
        path=str(target),
        engine=start.engine,
        generation=start.generation,
        frames=end.frames,
        bytes=end.bytes,
        chunks=end.chunks,
    )


async def _copied(
    scans: ColdScans, asked: ScanRequest, sink: "_Sink", progress: Progress
) -> tuple[ScanStart, ScanEnd]:
    start: ScanStart | None = None
    chunks, chunk_id, done = 0, -1, 0
    async with aclosing(scans.frames(asked)) as frames:
        async for frame in frames:
            if frame.type is FrameType.START:
                start = frame.start()
            assert start is not None, "a scan begins with its start"
            await asyncio.to_thread(sink.write_blocking, start, frame)
            if frame.type is FrameType.END:
                return start, frame.end()
            if frame.is_data:
                chunks += frame.chunk_id != chunk_id
                chunk_id = frame.chunk_id
                done += len(frame.payload)
            progress(start, done, chunks)
    raise StreamBroken("The scan ended before its end.")


class _Sink:
    def __init__(self, descriptor: int, *, form: Form) -> None:
        self._descriptor = descriptor
        self._form = form
        self._end = 0

    def write_blocking(self, start: ScanStart, frame: Frame) -> None:
        if self._form == "frames":
            self._append_blocking(frame.header())
            self._append_blocking(frame.payload)
        elif frame.type is FrameType.PAGES:
            self._write_blocking(frame.payload, (frame.first - 1) * (start.page_size or 0))
        elif frame.type is FrameType.RECORDS:
            self._append_blocking(frame.payload)

    def _append_blocking(self, data: bytes | memoryview) -> None:
        self._write_blocking(data, self._end)
        self._end += len(data)

    def _write_blocking(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._descriptor, view, offset)
            view, offset = view[written:], offset + written


def _refuse_existing_blocking(target: Path, replace: bool) -> None:
    if not replace and (target.is_symlink() or target.exists()):
        raise FileExistsError(f"{target} exists")


def _remove_blocking(part: Path) -> None:
    with contextlib.suppress(OSError):
        part.unlink()


def _put_in_place_blocking(part: Path, target: Path, replace: bool) -> None:
    part.chmod(0o644)
    if replace:
        part.replace(target)
    else:
        os.link(part, target)  # unlike a rename, it does not replace what came meanwhile
    directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
