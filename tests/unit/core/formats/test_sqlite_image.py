"""The header of files that SQLite wrote, and of files that it did not."""

import sqlite3
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.formats.damage import Damage
from app.core.formats.sqlite_image import (
    IMAGE_HEADER_BYTES,
    image_page_count,
    parse_image_header,
)


def written(path, *, page_size=4096, journal="DELETE") -> bytes:
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute(f"PRAGMA page_size = {page_size}")
        connection.execute(f"PRAGMA journal_mode = {journal}")
        connection.execute("CREATE TABLE t (x)")
        connection.execute("INSERT INTO t VALUES (zeroblob(200000))")
    finally:
        connection.close()
    return path.read_bytes()


def page_count(image) -> int:
    return image_page_count(parse_image_header(image), image_bytes=len(image))


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> bytes:
    return written(tmp_path_factory.mktemp("image") / "db", page_size=1024)


def changed(image, at, *values, fmt=">I") -> bytes:
    patched = bytearray(image)
    struct.pack_into(fmt, patched, at, *values)
    return bytes(patched)


@pytest.mark.parametrize("journal", ["DELETE", "WAL"])
@pytest.mark.parametrize("page_size", [1 << shift for shift in range(9, 17)])
def test_files_that_sqlite_wrote(tmp_path, page_size, journal):
    image = written(tmp_path / "db", page_size=page_size, journal=journal)
    header = parse_image_header(image)
    assert header.page_size == page_size
    assert header.page_count == page_count(image) == len(image) // page_size


def test_a_file_of_another_size_than_its_header_counts_is_damage(image):
    for size in (len(image) - 1024, len(image) + 1024):
        with pytest.raises(Damage, match=f"counts {len(image) // 1024} pages, the file has"):
            image_page_count(parse_image_header(image), image_bytes=size)
    for size in (len(image) - 1, len(image) + 1, 100):
        with pytest.raises(Damage, match="whole number"):
            image_page_count(parse_image_header(image), image_bytes=size)
    with pytest.raises(Damage):
        image_page_count(parse_image_header(image), image_bytes=0)


def test_a_page_count_that_does_not_hold_is_not_believed(image):
    """As SQLite: a writer that knew no page count changed the file since."""
    stale = changed(changed(image, 28, 3), 92, 7_777)
    assert parse_image_header(stale).page_count is None
    assert page_count(stale) == len(image) // 1024
    assert parse_image_header(changed(image, 28, 0)).page_count is None
    empty = parse_image_header(stale)
    with pytest.raises(Damage, match="cannot have 0 pages"):
        image_page_count(empty, image_bytes=0)


@pytest.mark.parametrize(
    ("at", "value", "says"),
    [(0, b"sqlite", "not a SQLite"), (15, b"\1", "not a SQLite"), (16, b"\0\0", "page size 0"),
     (16, b"\x03\xe8", "page size 1000"), (16, b"\1\0", "page size 256"), (18, b"\3", "versions 3"),
     (18, b"\0", "versions 0"), (19, b"\3", "and 3"), (21, b"\x41", "fractions"),
     (22, b"\x21", "fractions"), (23, b"\x21", "fractions")],
)  # fmt: skip
def test_a_header_that_sqlite_would_not_open(image, at, value, says):
    with pytest.raises(Damage, match=says):
        parse_image_header(image[:at] + value + image[at + len(value) :])


def test_reserved_bytes_leave_room_for_a_page(tmp_path):
    image = written(tmp_path / "db", page_size=512)
    assert parse_image_header(changed(image, 20, 32, fmt="B")).page_size == 512
    with pytest.raises(Damage, match="33 reserved bytes"):
        parse_image_header(changed(image, 20, 33, fmt="B"))


def test_a_header_cut_off_is_damage(image):
    for length in range(IMAGE_HEADER_BYTES):
        with pytest.raises(Damage, match="at least 100 bytes"):
            parse_image_header(image[:length])


@given(st.binary(max_size=200))
def test_hostile_bytes_are_damage(data):
    with pytest.raises(Damage):
        parse_image_header(data)
