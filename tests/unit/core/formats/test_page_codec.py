"""Patches: made against a base's page, applied to it, and refused where they do not fit."""

import random

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from app.core.formats.damage import Damage
from app.core.formats.page_codec import apply_patch, make_patch
from app.core.formats.sqlite_wal import PAGE_SIZES


def page(seed: int, size: int) -> bytes:
    source = random.Random(seed)
    return (source.randbytes(size // 4) + b"a text that comes again; " * size)[:size]


def edited(base: bytes, edits: list[tuple[int, bytes]]) -> bytes:
    changed = bytearray(base)
    for at, what in edits:
        start = at % len(base)
        changed[start : start + len(what)] = what[: len(base) - start]
    return bytes(changed)


def by_the_library(patch: bytes, base: bytes) -> bytes | None:
    """None: it refuses."""
    prefix = zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    reader = zstandard.ZstdDecompressor(dict_data=prefix, format=zstandard.FORMAT_ZSTD1_MAGICLESS)
    try:
        found = reader.decompress(patch, max_output_size=len(base), allow_extra_data=False)
    except (zstandard.ZstdError, MemoryError):
        return None
    return found if len(found) == len(base) else None


edits = st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(max_size=300)), max_size=8)


@given(st.sampled_from(sorted(PAGE_SIZES)), st.integers(0, 99), edits)
def test_a_patch_makes_the_page(size: int, seed: int, changes: list[tuple[int, bytes]]):
    base = page(seed, size)
    wanted = edited(base, changes)
    patch = make_patch(wanted, base)
    assert apply_patch(patch, memoryview(base)) == wanted
    assert by_the_library(patch, base) == wanted


@given(st.integers(0, 99), edits, st.data())
def test_hostile_patches_are_damage_or_what_the_library_makes_of_them(seed, changes, data):
    base = page(seed, 1024)
    patch = bytearray(make_patch(edited(base, changes), base))
    for at in data.draw(st.lists(st.integers(0, len(patch) - 1), max_size=3)):
        patch[at] ^= data.draw(st.integers(1, 255))
    patch = bytes(patch[: data.draw(st.integers(0, len(patch)))])
    try:
        found = apply_patch(patch, base)
    except Damage:
        return
    # the window in a plain header is of no matter: base and page are at hand as a whole
    with_a_window = b"\0\x70" + patch[2:] if patch[:1] == b"\0" else patch
    assert found == by_the_library(with_a_window, base)


def test_frames_of_any_header_are_patches():
    """Whoever wrote them may have said the size, or added a checksum."""
    base = page(1, 4096)
    wanted = edited(base, [(100, b"new"), (3000, b"words")])
    prefix = zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    for says_size in (True, False):
        for checksum in (True, False):
            parameters = zstandard.ZstdCompressionParameters(
                compression_level=3, write_content_size=says_size, write_checksum=checksum,
                write_dict_id=False, format=zstandard.FORMAT_ZSTD1_MAGICLESS,
            )  # fmt: skip
            writer = zstandard.ZstdCompressor(dict_data=prefix, compression_params=parameters)
            assert apply_patch(writer.compress(wanted), base) == wanted


def test_patches_of_another_size_are_damage():
    base = page(1, 4096)
    for other in (page(2, 2048), page(2, 8192)):
        with pytest.raises(Damage):
            apply_patch(make_patch(other, other), base)
    with pytest.raises(Damage):
        apply_patch(b"", base)


def test_a_patch_that_tells_an_impossible_size_allocates_nothing():
    """2^62 bytes in one segment, in a header of its own kind."""
    header = b"\xe0" + (1 << 62).to_bytes(8, "little")
    with pytest.raises(Damage):
        apply_patch(header + make_patch(page(1, 4096), page(1, 4096))[2:], page(1, 4096))
