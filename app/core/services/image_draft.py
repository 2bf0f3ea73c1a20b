"""An image for a database without content. Its frames go into the log's next files as its bytes
arrive, so that it is written once (docs/adr/0036).

Concurrency: one thread at a time appends, another may sync, any may close. Cancellation, crash:
what is written has no name, see stores/wal/draft.py.
"""

import numpy as np

from app.core.base.errors import InvariantViolation
from app.core.formats.frame_run import FrameFooter
from app.core.formats.segment import EntryType
from app.core.formats.sqlite_wal import FRAME_HEADER_BYTES, Words, frame_bytes
from app.core.services.image_body import changed_pages, plan_image
from app.core.services.page_payloads import entry_frames
from app.core.stores.wal.draft import Draft
from app.core.stores.wal.requests import AppendRequest

WINDOW_BYTES = 1024 * 1024
"""As much as has to be there before it is written."""


class ArrivingImage:
    """A body that can be read as far as it has arrived: from memory, or where it was written."""

    def __init__(self, size_bytes: int, page_nos: Words, *, page_size: int) -> None:
        """`page_nos` are those that are stored: all but the lock-byte page."""
        self.size_bytes = size_bytes
        self.held = bytearray()
        """What has arrived and is not written …"""
        self.held_from = 0
        """… and where it begins."""
        self.draft: Draft | None = None
        self._page_nos = page_nos
        self._page_size = page_size

    @property
    def arrived_bytes(self) -> int:
        return self.held_from + len(self.held)

    def read_blocking(self, offset: int, length: int) -> bytes | memoryview:
        if offset < self.held_from:
            return self._read_written(offset, length)
        start = offset - self.held_from
        return memoryview(self.held)[start : start + length]

    def _read_written(self, offset: int, length: int) -> memoryview:
        if (draft := self.draft) is None:
            raise InvariantViolation("An image's draft was read after it was closed.")
        size, stride = self._page_size, frame_bytes(self._page_size)
        first, stop = offset // size, -(-(offset + length) // size)
        found = np.zeros((stop - first, size), dtype=np.uint8)
        per_entry = entry_frames(size)
        low, high = np.searchsorted(self._page_nos, (first + 1, stop + 1)).tolist()
        for entry in range(low // per_entry, -(-high // per_entry)):
            page_nos = self._page_nos[entry * per_entry : (entry + 1) * per_entry]
            payload = np.frombuffer(draft.read_blocking(entry), dtype=np.uint8)
            frames = payload[: len(page_nos) * stride].reshape(-1, stride)
            wanted = (page_nos > first) & (page_nos <= stop)
            rows = page_nos[wanted].astype(np.intp) - 1 - first
            found[rows] = frames[wanted, FRAME_HEADER_BYTES:]
        start = offset - first * size
        return found.reshape(-1).data[start : start + length]


class ImageDraft:
    """A body of `size_bytes` that has yet to arrive, and the append that it will be."""

    def __init__(
        self, size_bytes: int, *, page_size: int, footer: FrameFooter, budget_bytes: int
    ) -> None:
        """`footer` is what the image's commit leaves. Raises TransactionTooLarge."""
        self._footer = footer
        self._page_size = page_size
        pages = changed_pages((), page_count=footer.page_count, compared=0, page_size=page_size)
        self._image = ArrivingImage(size_bytes, pages, page_size=page_size)
        entries = plan_image(
            self._image, pages, page_size=page_size, footer=footer, budget_bytes=budget_bytes
        )
        self.request = AppendRequest(entries=entries, entry_type=EntryType.FRAMES)
        self._frames = entries[0].frames
        self._frames.ready = 0

    @property
    def draft(self) -> Draft | None:
        return self._image.draft

    def begin(self, draft: Draft) -> None:
        """`draft` is of `request`."""
        self._image.draft = draft

    def holds(self, pages: Words, footer: FrameFooter) -> bool:
        """Whether it is what has to be stored."""
        return footer == self._footer and np.array_equal(pages, self._frames.page_nos)

    # --- the body -----------------------------------------------------------------------------

    @property
    def size_bytes(self) -> int:
        return self._image.size_bytes

    def read_blocking(self, offset: int, length: int) -> bytes | memoryview:
        return self._image.read_blocking(offset, length)

    def append_blocking(self, piece: bytes | bytearray) -> None:
        """Its next bytes. Raises DiskFull, NotReady, OSError."""
        image = self._image
        image.held += piece
        if len(image.held) >= WINDOW_BYTES or image.arrived_bytes == image.size_bytes:
            self._write()

    def sync_blocking(self) -> None:
        """What will not change any more. That it failed is told where the draft is used."""
        if (draft := self.draft) is not None:
            draft.sync_blocking()

    def close_blocking(self) -> None:
        """Files that are not the log's go. Nothing may be asked of it any more."""
        draft, self._image.draft = self.draft, None
        if draft is not None:
            draft.close_blocking()

    def _write(self) -> None:
        """All whole entries; the last one, which ends the request, only with the last byte."""
        image, frames, draft = self._image, self._frames, self.draft
        if draft is None:
            raise InvariantViolation("An image's draft was written to after it was closed.")
        pages, count = frames.page_nos, len(self.request.entries)
        per_entry = entry_frames(self._page_size)
        frames.ready = int(
            np.searchsorted(pages, image.arrived_bytes // self._page_size, side="right")
        )
        if image.arrived_bytes == image.size_bytes:
            entries, end = count, image.size_bytes
        else:
            entries = min(frames.ready // per_entry, count - 1)
            end = int(pages[entries * per_entry - 1]) * self._page_size if entries else 0
        draft.write_blocking(entries)
        if end > image.held_from:
            image.held = image.held[end - image.held_from :]
            image.held_from = end
