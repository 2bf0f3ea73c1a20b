"""An image's body: checked, compared with what is stored, and cut into entries of what differs."""

from collections.abc import Sequence

import numpy as np

from app.core.base.errors import ImageInvalid, PageSizeMismatch, TransactionTooLarge
from app.core.formats.damage import Damage
from app.core.formats.frame_run import FrameFooter
from app.core.formats.sqlite_image import (
    IMAGE_HEADER_BYTES,
    image_page_count,
    parse_image_header,
)
from app.core.formats.sqlite_wal import Words, frame_bytes, lock_byte_page
from app.core.services.page_payloads import (
    Body,
    ImageFrames,
    ImageFramesPayload,
    entry_frames,
)
from app.core.services.wal_body import frames_max


def check_image_head(head: bytes | memoryview, *, page_size: int) -> None:
    """The first IMAGE_HEADER_BYTES of a body, or all of it. Raises ImageInvalid,
    PageSizeMismatch.
    """
    try:
        header = parse_image_header(head)
    except Damage as damage:
        raise ImageInvalid(f"{damage}.", offset=damage.offset) from damage
    if header.page_size != page_size:
        raise PageSizeMismatch(
            f"The image has pages of {header.page_size} bytes, the database of {page_size}.",
            stored=page_size,
            sent=header.page_size,
        )


def page_count_blocking(body: Body, *, page_size: int) -> int:
    """Raises ImageInvalid, PageSizeMismatch."""
    head = body.read_blocking(0, min(IMAGE_HEADER_BYTES, body.size_bytes))
    return image_pages(head, size_bytes=body.size_bytes, page_size=page_size)


def image_pages(head: bytes | memoryview, *, size_bytes: int, page_size: int) -> int:
    """How many an image of that size has. Raises ImageInvalid, PageSizeMismatch."""
    check_image_head(head, page_size=page_size)
    try:
        return image_page_count(parse_image_header(head), image_bytes=size_bytes)
    except Damage as damage:
        raise ImageInvalid(f"{damage}.", offset=damage.offset) from damage


def differing_blocking(
    body: Body, *, first: int, count: int, stored: bytes | memoryview, page_size: int
) -> Words:
    """Which of the pages `first …` differ from those `stored`."""
    sent = body.read_blocking((first - 1) * page_size, count * page_size)
    theirs = np.frombuffer(sent, dtype=np.uint64).reshape(count, -1)
    ours = np.frombuffer(stored, dtype=np.uint64).reshape(count, -1)
    differing = np.flatnonzero((theirs != ours).any(axis=1)) + first
    return differing.astype(np.uint32)


def changed_pages(
    found: Sequence[Words], *, page_count: int, compared: int, page_size: int
) -> Words:
    """Those found to differ among the first `compared`, and all above; at least one, and never the
    lock-byte page.
    """
    beyond = np.arange(compared + 1, page_count + 1, dtype=np.uint32)
    pages = np.concatenate((*found, beyond))
    pages = pages[pages != lock_byte_page(page_size)]
    return pages if len(pages) else np.ones(1, dtype=np.uint32)


def plan_image(
    body: Body, pages: Words, *, page_size: int, footer: FrameFooter, budget_bytes: int
) -> list[ImageFramesPayload]:
    """One transaction. Raises TransactionTooLarge."""
    if len(pages) > frames_max(budget_bytes, page_size):
        needed = len(pages) * frame_bytes(page_size)
        raise TransactionTooLarge(
            f"{len(pages)} changed pages, {needed} bytes, can never fit the WAL budget.",
            wal_budget_bytes=budget_bytes,
            transaction_bytes=needed,
        )
    frames = ImageFrames(body, pages, page_size=page_size, page_count=footer.page_count)
    per_entry, count = entry_frames(page_size), len(pages)
    return [
        ImageFramesPayload.of(
            frames,
            first,
            min(first + per_entry, count),
            footer=footer if first + per_entry >= count else None,
        )
        for first in range(0, count, per_entry)
    ]
