"""Entries of frames that are taken from a body only when they are written.

A body may be a spooled file: what is held here is where in it each frame lies.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from app.core.formats.frame_run import FrameFooter, pack_footer
from app.core.formats.sqlite_wal import FRAME_HEADER_BYTES, Indices, Words, frame_bytes

ENTRY_BYTES_TARGET = 64 * 1024
"""An entry is read and checked as a whole when a page of it is."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFramesPayload:
    """Frames made of an image's pages, which come from no log: salts and checksums are zero."""

    body: Body
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
        count, size = self.count, self.page_size
        payload = bytearray(self.payload_bytes)
        end = count * frame_bytes(size)
        frames = np.frombuffer(payload, dtype=np.uint8, count=end).reshape(count, -1)
        heads = np.stack((self.page_nos, self.commit_sizes), axis=1).astype(">u4")
        frames[:, :8] = heads.view(np.uint8)
        for first, stop in _runs(self.page_nos, step=1):
            at = (int(self.page_nos[first]) - 1) * size
            pages = self.body.read_blocking(at, (stop - first) * size)
            rows = np.frombuffer(pages, dtype=np.uint8).reshape(-1, size)
            frames[first:stop, FRAME_HEADER_BYTES:] = rows
        if self.footer is not None:
            payload[end:] = pack_footer(self.footer)
        return memoryview(payload)


FramesPayload = LogFramesPayload | ImageFramesPayload


def payload_bytes(count: int, *, page_size: int, footer: FrameFooter | None) -> int:
    ending = len(pack_footer(footer)) if footer is not None else 0
    return count * frame_bytes(page_size) + ending


def entry_frames(page_size: int) -> int:
    """How many frames go into one entry."""
    return max(1, ENTRY_BYTES_TARGET // frame_bytes(page_size))


def _runs(starts: Indices | Words, *, step: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of items that follow each other at `step`."""
    breaks = np.flatnonzero(np.diff(starts.astype(np.int64)) != step) + 1
    edges = [0, *breaks.tolist(), len(starts)]
    yield from pairwise(edges)
