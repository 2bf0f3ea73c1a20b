"""Images that are written as they arrive: in any pieces, read again at any place."""

import random
from collections.abc import Sequence

import numpy as np
import pytest

from app.core.base.errors import InvariantViolation, TransactionTooLarge
from app.core.formats.frame_run import FrameFooter
from app.core.formats.sqlite_wal import WalPosition
from app.core.services import image_draft
from app.core.services.image_body import plan_image
from app.core.services.image_draft import ImageDraft
from app.core.services.page_payloads import Body


class Files:
    """What the log keeps of a draft: the payloads that were written."""

    def __init__(self, entries: Sequence) -> None:
        self.entries = entries
        self.payloads: list[bytes] = []

    def write_blocking(self, count: int) -> None:
        for entry in self.entries[len(self.payloads) : count]:
            payload = bytes(entry.load_blocking())
            assert len(payload) == entry.payload_bytes
            self.payloads.append(payload)

    def sync_blocking(self) -> None:
        pass

    def close_blocking(self) -> None:
        pass

    def read_blocking(self, entry: int) -> bytes:
        return self.payloads[entry]


class Whole:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size_bytes = len(data)

    def read_blocking(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


def draft_of(image: bytes, page_size: int) -> tuple[ImageDraft, Files]:
    footer = FrameFooter(page_count=len(image) // page_size)
    draft = ImageDraft(len(image), page_size=page_size, footer=footer, budget_bytes=1 << 40)
    files = Files(draft.request.entries)
    draft.begin(files)  # type: ignore[arg-type]
    return draft, files


def payloads_of(body: Body, page_nos: Sequence[int], page_size: int) -> list[bytes]:
    footer = FrameFooter(page_count=body.size_bytes // page_size)
    pages = np.array(page_nos, dtype=np.uint32)
    planned = plan_image(body, pages, page_size=page_size, footer=footer, budget_bytes=1 << 40)
    return [bytes(entry.load_blocking()) for entry in planned]


@pytest.mark.parametrize(("page_size", "count"), [(512, 1), (512, 7001), (4096, 900), (65536, 50)])
def test_an_image_in_any_pieces_becomes_the_entries_of_the_whole(page_size, count):
    chance = random.Random(count)
    image = chance.randbytes(page_size * count)
    draft, files = draft_of(image, page_size)
    at = 0
    while at < len(image):
        piece = image[at : at + chance.choice([1, 100, 65536, 400_000, 3_000_000])]
        draft.append_blocking(piece)
        at += len(piece)
        if chance.random() < 0.2:  # what has arrived can be read, written or not
            first = chance.randrange(at)
            length = min(at - first, chance.choice([1, 100, 70_000, 2_000_000]))
            assert bytes(draft.read_blocking(first, length)) == image[first : first + length]
    assert files.payloads == payloads_of(Whole(image), range(1, count + 1), page_size)
    assert draft.size_bytes == len(image)
    for _ in range(50):
        first = chance.randrange(len(image))
        length = min(len(image) - first, chance.choice([1, page_size, 70_000]))
        assert bytes(draft.read_blocking(first, length)) == image[first : first + length]
    # the same entries again, now from what was written
    assert [bytes(entry.load_blocking()) for entry in draft.request.entries] == files.payloads


def test_memory_holds_a_window(monkeypatch):
    draft, _ = draft_of(bytes(40 << 20), 4096)
    for _ in range(160):
        draft.append_blocking(bytes(256 * 1024))
        assert len(draft._image.held) < image_draft.WINDOW_BYTES + 256 * 1024


def test_the_lock_byte_page_is_left_out(monkeypatch):
    monkeypatch.setattr("app.core.services.image_body.lock_byte_page", lambda size: 700)
    image = random.Random(1).randbytes(512 * 3000)
    draft, files = draft_of(image, 512)
    for at in range(0, len(image), 100_000):
        draft.append_blocking(image[at : at + 100_000])
    stored = [page for page in range(1, 3001) if page != 700]
    assert files.payloads == payloads_of(Whole(image), stored, 512)
    without = image[: 699 * 512] + bytes(512) + image[700 * 512 :]
    assert bytes(draft.read_blocking(0, len(image))) == without


def test_what_it_holds_is_what_was_said_before():
    position = WalPosition(
        offset=32, salt1=1, salt2=2, checksum1=3, checksum2=4, page_size=512
    )  # fmt: skip
    footer = FrameFooter(page_count=9, position=position)
    draft = ImageDraft(9 * 512, page_size=512, footer=footer, budget_bytes=1 << 20)
    every = np.arange(1, 10, dtype=np.uint32)
    assert draft.holds(every, footer)
    assert not draft.holds(every[1:], footer)
    assert not draft.holds(every, FrameFooter(page_count=9))


def test_one_too_large_is_refused_before_it_comes():
    with pytest.raises(TransactionTooLarge):
        ImageDraft(
            9000 * 512, page_size=512, footer=FrameFooter(page_count=9000), budget_bytes=1 << 20
        )


def test_after_it_was_closed_nothing_is_written_or_read_from_files():
    draft, _ = draft_of(bytes(3 << 20), 512)
    draft.append_blocking(bytes(2 << 20))
    draft.close_blocking()
    with pytest.raises(InvariantViolation):
        draft.read_blocking(0, 100)
    with pytest.raises(InvariantViolation):
        draft.append_blocking(bytes(1 << 20))
