"""Page blobs: what is written comes back, damage never does, and a page is cheap to get at."""

import hashlib
import os
import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap

from app.core.base.errors import InvariantViolation
from app.core.formats.container import (
    BLOCK_ROW_BYTES,
    CONTAINER_HEADER_BYTES,
    ContainerKind,
    LogIdentity,
)
from app.core.formats.crc64 import crc64
from app.core.formats.damage import Damage
from app.core.formats.page_blob import PageBlobDirectory, page_blob_bytes_max
from app.core.formats.page_blob_writer import (
    PageBatch,
    PageBlobSpec,
    PageBlobSummary,
)
from app.core.formats.page_codec import PAGE_BLOCK_BYTES, page_digest
from tests.helpers.page_blob_file import PageBlobFile, write_pages_blocking

GOLDEN = Path(__file__).parents[3] / "golden"
WHO = LogIdentity(db_id=7, chunk_id=3, generation=9)
CODECS = ("none", "zstd", "lz4")


def batches(pages: Mapping[int, bytes], *, size: int = 7) -> list[PageBatch]:
    numbers = sorted(pages)
    return [
        PageBatch(
            page_nos=np.array(numbers[at : at + size], dtype=np.uint32),
            data=memoryview(b"".join(pages[number] for number in numbers[at : at + size])),
        )
        for at in range(0, len(numbers), size)
    ]


def write(
    target: Path,
    pages: Mapping[int, bytes],
    *,
    codec: str = "zstd",
    base: PageBlobFile | None = None,
    delta_id: int = 0,
    batch: int = 7,
    threads: int = 1,
) -> PageBlobSummary:
    page_size = len(next(iter(pages.values())))
    spec = PageBlobSpec(
        kind=ContainerKind.DELTA if delta_id else ContainerKind.PAGES,
        codec=codec, identity=WHO, page_size=page_size, delta_id=delta_id,
    )  # fmt: skip
    return write_pages_blocking(
        target, spec, batches(pages, size=batch), base=base, threads=threads
    )


def read_all(path: Path, *, base: PageBlobFile | None = None) -> dict[int, bytes]:
    with PageBlobFile.open_blocking(path, sha256=bytes(32)) as blob:
        size = blob.directory.page_size
        return {
            number: bytes(run.data[at * size : (at + 1) * size])
            for run in blob.iter_blocking(base=base)
            for at, number in enumerate(run.page_nos.tolist())
        }


def text_page(shapes: random.Random, size: int) -> bytes:
    words = [b"alpha", b"beta", b"gamma", b"delta", b"epsilon", b"zeta"]
    return b" ".join(shapes.choices(words, k=size // 4))[:size]


def changed(page: bytes, at: int, what: bytes) -> bytes:
    return page[:at] + what + page[at + len(what) :]


# --- round trips ------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("page_size", [512, 4096, 65536])
def test_pages_come_back(tmp_path: Path, codec: str, page_size: int):
    shapes = random.Random(1)
    pages = {number: text_page(shapes, page_size) for number in range(5, 60)}
    pages[9] = shapes.randbytes(page_size)
    written = write(tmp_path / "base", pages, codec=codec)
    assert read_all(tmp_path / "base") == pages
    data = (tmp_path / "base").read_bytes()
    assert written.bytes == len(data)
    assert written.bytes <= page_blob_bytes_max(len(pages), page_size=page_size)
    assert written.sha256 == hashlib.sha256(data).digest()
    assert written.crc64 == crc64(data)
    assert written.pages == BitMap(pages)
    assert written.raw_bytes == len(pages) * page_size
    end = written.directory_offset + written.directory_bytes
    assert end == len(data)
    digests = data[written.digests_offset : written.digests_offset + written.digests_bytes]
    assert digests == b"".join(page_digest(pages[number]) for number in sorted(pages))


def test_equal_and_zero_pages_are_stored_once(tmp_path: Path):
    noise = random.Random(1).randbytes(4096)
    pages = {1: noise, 2: bytes(4096), 3: noise, 5: noise, 900: bytes(4096)}
    written = write(tmp_path / "base", pages, codec="none")
    assert written.digests_offset == CONTAINER_HEADER_BYTES + 4096
    assert read_all(tmp_path / "base") == pages


def test_a_blob_of_zeros_alone(tmp_path: Path):
    pages = {number: bytes(512) for number in range(1, 9)}
    write(tmp_path / "base", pages)
    assert read_all(tmp_path / "base") == pages


def test_how_pages_come_in_does_not_change_the_bytes(tmp_path: Path):
    shapes = random.Random(2)
    pages = {number: text_page(shapes, 65536) for number in range(1, 271)}  # with a dictionary
    pages |= {150: bytes(65536), 200: pages[199]}
    first = write(tmp_path / "a", pages, batch=7, threads=1)
    assert first == write(tmp_path / "b", pages, batch=16, threads=3)
    assert first == write(tmp_path / "c", pages, batch=64, threads=2)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()
    assert read_all(tmp_path / "c") == pages
    with PageBlobFile.open_blocking(tmp_path / "a", sha256=first.sha256) as blob:
        found = blob.read_blocking(np.array([3, 77, 80, 1000], dtype=np.uint32))
    assert found == {number: pages[number] for number in (3, 77, 80)}


def test_one_page_costs_one_block(tmp_path: Path):
    shapes = random.Random(3)
    pages = {number: text_page(shapes, 4096) for number in range(101, 401)}
    written = write(tmp_path / "base", pages)
    data = (tmp_path / "base").read_bytes()
    directory = PageBlobDirectory.parse(data[written.directory_offset :])
    assert (directory.page_nos == np.arange(101, 401)).all()
    assert directory.identity == WHO
    for number, page in pages.items():
        place = directory.locate(number)
        assert place is not None
        stored = data[place.stored_offset : place.stored_offset + place.stored_bytes]
        assert len(stored) <= PAGE_BLOCK_BYTES
        assert directory.unpack_page(stored, place) == page
    assert directory.locate(100) is None
    assert directory.locate(401) is None
    blocks = directory.container.blocks
    assert (blocks["raw_bytes"][:-1] <= PAGE_BLOCK_BYTES).all()
    assert blocks["first_key"].tolist()[:-1] == list(range(101, 401, 16))


def test_bulk_reads_agree_with_single_ones(tmp_path: Path):
    shapes = random.Random(4)
    pages = {number: text_page(shapes, 1024) for number in range(1, 300, 3)}
    pages[7] = bytes(1024)
    written = write(tmp_path / "base", pages)
    data = (tmp_path / "base").read_bytes()
    directory = PageBlobDirectory.parse(data[written.directory_offset :])
    wanted = np.array([1, 2, 7, 100, 298], dtype=np.uint32)
    positions = directory.positions(wanted)
    assert (positions >= 0).tolist() == [True, False, True, True, True]
    held = positions[positions >= 0]
    numbers = directory.blocks_of(held)
    assert numbers[1] == -1
    blocks = {}
    for number in sorted(set(numbers.tolist()) - {-1}):
        offset, length = directory.block_range(number, number + 1)
        blocks[number] = directory.unpack_block(number, data[offset : offset + length])
    out = bytes(directory.unpack_pages(held, blocks))
    assert out == pages[1] + pages[7] + pages[100] + pages[298]
    assert not directory.are_patches(held).any()
    everything = directory.positions_in(0, directory.digests_block)
    assert directory.page_nos[everything].tolist() == [n for n in pages if n != 7]


@pytest.mark.parametrize("numbers", [[3, 2], [0], [2, 2]])
def test_pages_out_of_order_are_a_bug(tmp_path: Path, numbers: list[int]):
    batch = PageBatch(
        page_nos=np.array(numbers, dtype=np.uint32), data=memoryview(bytes(512 * len(numbers)))
    )
    spec = PageBlobSpec(kind=ContainerKind.PAGES, codec="none", identity=WHO, page_size=512)
    with pytest.raises(InvariantViolation):
        write_pages_blocking(tmp_path / "base", spec, [batch])
    with pytest.raises(InvariantViolation):
        write_pages_blocking(tmp_path / "base", spec, [])


# --- deltas -----------------------------------------------------------------------------------


def test_delta_file_format(tmp_path: Path):
    """Only the changed pages, each at the place that the directory says, as patches."""
    shapes = random.Random(5)
    pages = {number: shapes.randbytes(4096) for number in range(1, 65)}
    base_blob = write(tmp_path / "base", pages)
    dirty = {
        4: changed(pages[4], 100, b"hundred"),  # in place
        20: pages[20][:50] + b"inserted" + pages[20][50:-8],  # all behind it moved
        31: bytes(4096),
        40: shapes.randbytes(4096),  # nothing like it was
        70: shapes.randbytes(4096),  # not in the base
    }
    with PageBlobFile.open_blocking(tmp_path / "base", sha256=base_blob.sha256) as base:
        written = write(tmp_path / "delta", dirty, base=base, delta_id=2)
        assert read_all(tmp_path / "delta", base=base) == dirty
    data = (tmp_path / "delta").read_bytes()
    assert written.pages == BitMap(dirty)
    assert written.patches == 2
    assert written.bytes < 2 * 4096 + 1024
    directory = PageBlobDirectory.parse(data[written.directory_offset :])
    assert (directory.kind, directory.delta_id) == (ContainerKind.DELTA, 2)
    assert directory.base_sha256 == base_blob.sha256
    assert directory.page_nos.tolist() == sorted(dirty)
    offset = 0
    for number in sorted(dirty):
        place = directory.locate(number)
        assert place is not None
        assert place.is_zero == (number == 31)
        assert place.needs_base == (number in (4, 20))
        if place.is_zero:
            continue
        assert (place.block, place.offset_in_block) == (0, offset)
        assert place.slot_bytes < 100 if place.needs_base else place.slot_bytes == 4096
        stored = data[place.stored_offset : place.stored_offset + place.stored_bytes]
        assert directory.unpack_page(stored, place, pages.get(number)) == dirty[number]
        if place.needs_base:
            with pytest.raises(Damage):
                directory.unpack_page(stored, place)
            with pytest.raises(Damage):
                directory.unpack_page(stored, place, pages[5])
        offset += place.slot_bytes


def test_without_a_base_a_delta_has_whole_pages(tmp_path: Path):
    shapes = random.Random(6)
    pages = {number: shapes.randbytes(512) for number in (3, 9, 11)}
    written = write(tmp_path / "delta", pages, delta_id=1)
    assert written.patches == 0
    assert read_all(tmp_path / "delta") == pages
    with PageBlobFile.open_blocking(tmp_path / "delta", sha256=written.sha256) as blob:
        assert blob.directory.base_sha256 is None


def test_another_base_is_refused(tmp_path: Path):
    pages = {number: random.Random(number).randbytes(512) for number in range(1, 9)}
    first = write(tmp_path / "base", pages)
    with PageBlobFile.open_blocking(tmp_path / "base", sha256=first.sha256) as base:
        write(tmp_path / "delta", {2: changed(pages[2], 9, b"x")}, base=base, delta_id=1)
    with (
        PageBlobFile.open_blocking(tmp_path / "base", sha256=bytes(31) + b"x") as other,
        pytest.raises(Damage),
    ):
        read_all(tmp_path / "delta", base=other)


edits = st.lists(
    st.dictionaries(
        st.integers(1, 24),
        st.one_of(
            st.just(("zero", 0, b"")),
            st.tuples(st.just("write"), st.integers(0, 500), st.binary(min_size=1, max_size=12)),
            st.tuples(st.just("insert"), st.integers(0, 500), st.binary(min_size=1, max_size=12)),
            st.tuples(st.just("delete"), st.integers(0, 400), st.binary(min_size=1, max_size=99)),
            st.tuples(st.just("replace"), st.integers(0, 9), st.binary(min_size=1, max_size=9)),
        ),
        min_size=1,
        max_size=8,
    ),
    max_size=5,
)


def edited(page: bytes, edit: tuple[str, int, bytes]) -> bytes:
    kind, at, what = edit
    match kind:
        case "zero":
            return bytes(512)
        case "write":
            return changed(page, at, what)[:512]
        case "insert":
            return (page[:at] + what + page[at:])[:512]
        case "delete":
            return (page[:at] + page[at + len(what) :]).ljust(512, b"\0")
        case _:
            return random.Random(what).randbytes(512)


@given(edits, st.sampled_from(CODECS))
def test_a_chain_of_deltas_is_a_dictionary_of_pages(tmp_path_factory, chain, codec):
    """Base and deltas, newest page first, are what a plain dictionary of pages is."""
    tmp_path = tmp_path_factory.mktemp("chain")
    model = {number: random.Random(number % 5).randbytes(512) for number in range(1, 21)}
    base_pages = dict(model)
    first = write(tmp_path / "base", base_pages, codec=codec)
    with PageBlobFile.open_blocking(tmp_path / "base", sha256=first.sha256) as base:
        layers = []
        for delta_id, step in enumerate(chain, start=1):
            dirty = {
                number: edited(model.get(number, bytes(512)), edit) for number, edit in step.items()
            }
            model |= dirty
            write(tmp_path / f"{delta_id}", dirty, codec=codec, base=base, delta_id=delta_id)
            layers.append(read_all(tmp_path / f"{delta_id}", base=base))
        composed = read_all(tmp_path / "base")
        for layer in layers:
            composed |= layer
    assert composed == model


# --- damage -----------------------------------------------------------------------------------


def small_base(codec: str) -> dict[int, bytes]:
    shapes = random.Random(7)
    pages = {number: text_page(shapes, 512) for number in (2, 3, 5, 8)}
    pages[4] = bytes(512)
    if codec == "none":
        pages[9] = pages[2]
    return pages


def check_every_flip(path: Path, *, mask: int, base: PageBlobFile | None = None) -> None:
    good = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for at, byte in enumerate(good):
            os.pwrite(file.fileno(), bytes([byte ^ mask]), at)
            with pytest.raises(Damage):
                for _ in PageBlobFile(file.fileno(), sha256=b"").iter_blocking(base=base):
                    pass
            os.pwrite(file.fileno(), bytes([byte]), at)


@pytest.mark.parametrize("codec", CODECS)
def test_every_flipped_byte_of_a_base_is_noticed(tmp_path: Path, codec: str):
    write(tmp_path / "base", small_base(codec), codec=codec)
    check_every_flip(tmp_path / "base", mask=0x40)


@pytest.mark.parametrize("codec", CODECS)
def test_every_flipped_byte_of_a_delta_is_noticed(tmp_path: Path, codec: str):
    pages = small_base(codec)
    first = write(tmp_path / "base", pages, codec=codec)
    dirty = {2: changed(pages[2], 9, b"abc"), 4: random.Random(1).randbytes(512), 5: bytes(512)}
    with PageBlobFile.open_blocking(tmp_path / "base", sha256=first.sha256) as base:
        written = write(tmp_path / "delta", dirty, codec=codec, base=base, delta_id=1)
        assert written.patches == 1
        check_every_flip(tmp_path / "delta", mask=0x01, base=base)


def test_a_reader_of_ranges_never_takes_damage_for_a_page(tmp_path: Path):
    """As the service reads: directory and one block, by ranges. Only what lies outside them may
    rot unseen.
    """
    pages = small_base("zstd")
    written = write(tmp_path / "base", pages)
    good = (tmp_path / "base").read_bytes()
    noticed = 0
    for at in range(len(good)):
        bad = changed(good, at, bytes([good[at] ^ 0x80]))
        try:
            directory = PageBlobDirectory.parse(bad[written.directory_offset :])
            for number, page in pages.items():
                place = directory.locate(number)
                assert place is not None
                stored = bad[place.stored_offset : place.stored_offset + place.stored_bytes]
                assert directory.unpack_page(stored, place) == page
        except Damage:
            noticed += 1
    unread = CONTAINER_HEADER_BYTES + written.digests_bytes
    assert noticed == len(good) - unread


@pytest.mark.parametrize("kept", [0, 10, 63, 64, 200, -97, -96, -1])
def test_a_blob_that_is_cut_off_is_noticed(tmp_path: Path, kept: int):
    write(tmp_path / "base", small_base("zstd"))
    good = (tmp_path / "base").read_bytes()
    (tmp_path / "bad").write_bytes(good[:kept])
    with pytest.raises(Damage):
        read_all(tmp_path / "bad")


def test_a_log_container_is_no_page_blob(tmp_path: Path):
    with pytest.raises(Damage):
        read_all(GOLDEN / "chunk-log-v1-none.blob")


# --- golden files -----------------------------------------------------------------------------


def golden_pages() -> tuple[dict[int, bytes], dict[int, bytes]]:
    def page(seed: int) -> bytes:
        return b"".join(hashlib.sha256(b"%d.%d" % (seed, n)).digest() for n in range(8)) * 2

    base = {number: page(number) for number in range(17, 30)}
    base[20], base[21] = bytes(512), base[17]
    dirty = {
        18: changed(base[18], 40, b"changed"),
        19: base[19][:30] + b"new" + base[19][30:-3],
        22: bytes(512),
        25: page(99) + b"",
        40: page(40),
    }
    return base, dirty


@pytest.mark.parametrize("codec", CODECS)
def test_golden_page_blobs_stay_readable(codec: str):
    base_pages, dirty = golden_pages()
    path = GOLDEN / f"pages-v1-{codec}.blob"
    assert read_all(path) == base_pages
    sha256 = hashlib.sha256(path.read_bytes()).digest()
    with PageBlobFile.open_blocking(path, sha256=sha256) as base:
        assert read_all(GOLDEN / f"delta-v1-{codec}.blob", base=base) == dirty


def test_golden_page_blobs_are_what_is_written(tmp_path: Path):
    """For the codec `none`: what a library compresses may differ from version to version."""
    base_pages, _ = golden_pages()
    written = write(tmp_path / "base", base_pages, codec="none")
    golden = (GOLDEN / "pages-v1-none.blob").read_bytes()
    assert (tmp_path / "base").read_bytes()[: written.directory_offset] == golden[
        : written.directory_offset
    ]
    blocks = PageBlobDirectory.parse(golden[written.directory_offset :]).container.blocks
    assert blocks.nbytes == 2 * BLOCK_ROW_BYTES
