"""Entries of frames that are taken from a body only when they are written.

A body may be a spooled file: what is held here is where in it each frame lies.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from app.core.formats.frame_run import FOOTER_BYTES, FrameFooter, pack_footer
from app.core.formats.sqlite_wal import FRAME_HEADER_BYTES, Indices, Words, frame_bytes

ENTRY_BYTES_TARGET = 64 * 1024
"""An entry is read and checked as a whole when a page of it is."""
WINDOW_BYTES = 1024 * 1024
"""Frames of an image that are made at once."""


class Body(Protocol):
    """A request's body, all of which has arrived."""

    @property
    def size_bytes(self) -> int: ...

    def read_blocking(self, offset: int, length: int) -> bytes | memoryview:
        """All of it: `offset + length` is within the body."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LogFramesPayload:
    """Frames of a log as they came. `starts` is where in the body each of them begins."""

    body: Body
    starts: Indices
    page_size: int
    page_nos: Words
    commit_sizes: Words
    footer: FrameFooter | None
    line_safe: bool = False

    @property
    def count(self) -> int:
        return len(self.page_nos)

    @property
    def payload_bytes(self) -> int:
        return payload_bytes(self.count, page_size=self.page_size, footer=self.footer)

    def load_blocking(self) -> bytes | memoryview:
        size = frame_bytes(self.page_size)
        pieces = [
            self.body.read_blocking(int(self.starts[first]), (stop - first) * size)
            for first, stop in _runs(self.starts, step=size)
        ]
        if self.footer is not None:
            pieces.append(pack_footer(self.footer))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class ImageFrames:
    """Frames made of an image's pages, which come from no log: salts and checksums are zero. They
    are made for many entries at once: numpy's calls cost more than what they do for one.
    """

    def __init__(self, body: Body, page_nos: Words, *, page_size: int, page_count: int) -> None:
        """`page_nos` ascends; the last frame commits, with that page count."""
        self.page_size = page_size
        self.page_nos = page_nos
        self.ready = len(page_nos)
        """The first ones, whose pages have arrived."""
        self.commit_sizes = np.zeros(len(page_nos), dtype=np.uint32)
        self.commit_sizes[-1] = page_count
        self._body = body
        self._window = memoryview(b"")
        self._window_first = 0

    def load_blocking(self, first: int, stop: int) -> memoryview:
        """Back to back; cheapest in order."""
        size, held_from = frame_bytes(self.page_size), self._window_first
        if first < held_from or stop > held_from + len(self._window) // size:
            entry = stop - first
            end = min(self.ready, first + entry * max(1, WINDOW_BYTES // (entry * size)))
            self._window, self._window_first = self._made(first, end), first
            held_from = first
        return self._window[(first - held_from) * size : (stop - held_from) * size]

    def _made(self, first: int, stop: int) -> memoryview:
        size, page_nos = self.page_size, self.page_nos[first:stop]
        words = np.empty((stop - first, frame_bytes(size) // 4), dtype=">u4")
        words[:, 0] = page_nos
        words[:, 1] = self.commit_sizes[first:stop]
        words[:, 2 : FRAME_HEADER_BYTES // 4] = 0
        frames = words.view(np.uint8)
        for start, end in _runs(page_nos, step=1):
            at = (int(page_nos[start]) - 1) * size
            pages = self._body.read_blocking(at, (end - start) * size)
            rows = np.frombuffer(pages, dtype=np.uint8).reshape(-1, size)
            frames[start:end, FRAME_HEADER_BYTES:] = rows
        return frames.reshape(-1).data


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFramesPayload:
    """Some of an image's frames."""

    frames: ImageFrames
    first: int
    stop: int
    footer: FrameFooter | None
    payload_bytes: int
    line_safe: bool = False

    @classmethod
    def of(
        cls, frames: ImageFrames, first: int, stop: int, *, footer: FrameFooter | None
    ) -> "ImageFramesPayload":
        size = payload_bytes(stop - first, page_size=frames.page_size, footer=footer)
        return cls(frames=frames, first=first, stop=stop, footer=footer, payload_bytes=size)

    @property
    def count(self) -> int:
        return self.stop - self.first

    @property
    def page_nos(self) -> Words:
        return self.frames.page_nos[self.first : self.stop]

    @property
    def commit_sizes(self) -> Words:
        return self.frames.commit_sizes[self.first : self.stop]

    def load_blocking(self) -> bytes | memoryview:
        frames = self.frames.load_blocking(self.first, self.stop)
        return frames if self.footer is None else b"".join((frames, pack_footer(self.footer)))


FramesPayload = LogFramesPayload | ImageFramesPayload


def payload_bytes(count: int, *, page_size: int, footer: FrameFooter | None) -> int:
    ending = FOOTER_BYTES if footer is not None else 0
    return count * frame_bytes(page_size) + ending


def entry_frames(page_size: int) -> int:
    """How many frames go into one entry."""
    return max(1, ENTRY_BYTES_TARGET // frame_bytes(page_size))


def _runs(starts: Indices | Words, *, step: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of items that follow each other at `step`; `starts` ascends."""
    if int(starts[-1]) - int(starts[0]) == (len(starts) - 1) * step:
        yield 0, len(starts)
        return
    breaks = np.flatnonzero(np.diff(starts.astype(np.int64)) != step) + 1
    edges = [0, *breaks.tolist(), len(starts)]
    yield from pairwise(edges)
