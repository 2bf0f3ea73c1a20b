"""What an entry of frames holds, byte by byte, against readings that are slow and plain."""

import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.formats.damage import Damage
from app.core.formats.frame_run import (
    FOOTER_BYTES,
    FrameFooter,
    frame_count,
    frames_of,
    kept_frames,
    pack_footer,
    pack_frame_header,
    parse_footer,
)
from app.core.formats.sqlite_wal import PAGE_SIZES, WalPosition, lock_byte_page

WORD = st.integers(0, 2**32 - 1)
POSITIONS = st.builds(
    WalPosition,
    offset=st.integers(32, 2**63),
    salt1=WORD,
    salt2=WORD,
    checksum1=WORD,
    checksum2=WORD,
    page_size=st.just(512),
    order=st.sampled_from([None, "little", "big"]),
)


def position(**fields: int) -> WalPosition:
    return WalPosition(
        **{"offset": 1104, "salt1": 7, "salt2": 8, "checksum1": 9, "checksum2": 10, **fields},
        page_size=512,
        order="little",
    )


def payload(*frames: tuple[int, int, bytes], footer: FrameFooter | None = None) -> bytes:
    data = b"".join(
        pack_frame_header(page_no, commit_size=size) + page for page_no, size, page in frames
    )
    return data + (pack_footer(footer) if footer is not None else b"")


@given(st.integers(0, 2**32 - 1), st.none() | POSITIONS, st.none() | POSITIONS)
def test_a_footer_comes_back(page_count, at, before):
    footer = FrameFooter(page_count=page_count, position=at, replaced=before)
    parsed = parse_footer(b"before it" + pack_footer(footer), page_size=512)
    assert (parsed.page_count, parsed.position) == (page_count, at)
    if before is None:
        assert parsed.replaced is None
    else:  # where it was left is all that is known of it
        assert parsed.replaced == replace(before, checksum1=0, checksum2=0, order=None)


def test_a_footer_has_a_fixed_layout():
    footer = FrameFooter(
        page_count=5, position=position(), replaced=position(offset=32, salt1=1, salt2=2)
    )
    assert pack_footer(footer) == (
        struct.pack("<Q4I", 1104, 7, 8, 9, 10)
        + bytes((1, 3, 0, 0))
        + struct.pack("<IQII", 5, 32, 1, 2)
        + b"BOPFEND\x01"
        + bytes(8)
    )


@pytest.mark.parametrize("at", range(48, 56))
def test_what_has_another_magic_is_no_footer(at):
    packed = bytearray(pack_footer(FrameFooter(page_count=5, position=position())))
    packed[at] ^= 1
    with pytest.raises(Damage):
        parse_footer(packed, page_size=512)


def test_a_footer_of_unknown_flags_or_order_is_damage():
    packed = pack_footer(FrameFooter(page_count=5, position=position()))
    for at, value in ((24, 3), (25, 4)):
        changed = bytearray(packed)
        changed[at] = value
        with pytest.raises(Damage):
            parse_footer(changed, page_size=512)
    with pytest.raises(Damage):
        parse_footer(packed[1:], page_size=512)


@pytest.mark.parametrize("page_size", sorted(PAGE_SIZES))
@pytest.mark.parametrize("ended", [True, False])
def test_frames_of_a_payload(page_size, ended):
    footer = FrameFooter(page_count=9, position=None) if ended else None
    pages = [bytes([number]) * page_size for number in range(3)]
    data = payload((7, 0, pages[0]), (2**31, 0, pages[1]), (7, 9, pages[2]), footer=footer)
    frames = frames_of(data, page_size=page_size)
    assert len(frames) == frame_count(len(data), page_size=page_size) == 3
    assert frames.page_nos.tolist() == [7, 2**31, 7]
    assert frames.commit_sizes.tolist() == [0, 0, 9]
    assert [bytes(frames.page(index)) for index in range(3)] == pages
    assert bytes(frames.data) == data[: 3 * (24 + page_size)]
    assert frames.footer == footer


def test_a_payload_of_another_length_is_damage():
    frame = payload((1, 1, bytes(512)))
    for data in (
        b"", frame[:-1], frame + b"x", frame + bytes(FOOTER_BYTES + 1), bytes(FOOTER_BYTES),
    ):  # fmt: skip
        with pytest.raises(Damage):
            frames_of(data, page_size=512)
    with pytest.raises(Damage):  # as long as a footer, and none
        frames_of(frame + bytes(FOOTER_BYTES), page_size=512)


@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 20), max_size=6), st.integers(1, 20), st.integers(1, 20)),
        min_size=1,
        max_size=8,
    )
)
def test_frames_beyond_their_own_commits_size_are_not_kept(transactions):
    page_nos, commit_sizes, kept = [], [], []
    for pages, last, size in transactions:
        for page_no in pages:
            if page_no <= size:
                kept.append(len(page_nos))
            page_nos.append(page_no)
            commit_sizes.append(0)
        kept.append(len(page_nos))
        page_nos.append(last)
        commit_sizes.append(size)
    found = kept_frames(
        np.array(page_nos, dtype=np.uint32), np.array(commit_sizes, dtype=np.uint32), page_size=512
    )
    assert found.tolist() == kept


def test_the_lock_byte_page_is_not_kept():
    locked = lock_byte_page(4096)
    page_nos = np.array([locked, locked - 1, locked + 1, 1], dtype=np.uint32)
    sizes = np.array([0, 0, 0, locked + 5], dtype=np.uint32)
    assert kept_frames(page_nos, sizes, page_size=4096).tolist() == [1, 2, 3]
