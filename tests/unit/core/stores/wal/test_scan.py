"""Reading in blocks of any size, checking sealed segments, and hostile bytes."""

import asyncio
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.formats.damage import Damage
from app.core.formats.segment import ENTRY_MAGIC
from app.core.stores.wal import scan
from app.core.stores.wal.disk import SystemDisk
from app.core.stores.wal.scan import SegmentReader
from app.core.stores.wal.verification import verify_segment_blocking
from tests.unit.core.stores.wal.builders import (
    DB,
    Place,
    append,
    append_together,
    read_all,
    request,
)
from tests.unit.core.stores.wal.disks import FaultyDisk
from tests.unit.core.stores.wal.test_recovery import entry, segment_header


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "segment"


def claims(path: Path, lsn: int, *, start: int = 64, disk: SystemDisk | None = None) -> bool:
    disk = disk or SystemDisk()
    fd = disk.open(path, writable=False)
    try:
        return SegmentReader(disk, fd).claims_durable(lsn, start=start)
    finally:
        disk.close(fd)


@pytest.mark.parametrize("block_bytes", [1, 80, 97, 1 << 20])
def test_a_claim_is_found_wherever_it_lies(
    file: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(scan, "BLOCK_BYTES", block_bytes)
    for gap in (0, 1, 79, 95, 300):
        file.write_bytes(segment_header(1) + b"?" * gap + entry(9, b"x" * 30, durable_lsn=8) + b"!")
        assert claims(file, 8)
        assert claims(file, 3)
        assert not claims(file, 9)
        assert not claims(file, 8, start=64 + gap + 1)


def test_what_is_no_intact_entry_claims_nothing(file: Path) -> None:
    torn = bytearray(entry(9, b"x" * 30, durable_lsn=8))
    torn[-1] ^= 1
    backwards = entry(8, b"x", durable_lsn=8)  # nothing is durable before it is given out
    file.write_bytes(segment_header(1) + torn + backwards + entry(9, b"y", durable_lsn=8)[:-1])
    assert not claims(file, 1)


def test_hostile_claims_cost_a_bounded_amount_of_reading(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headers that announce the rest of the file, one after the other: gives up as if damaged."""
    monkeypatch.setattr(scan, "BLOCK_BYTES", 1000)
    rest = entry(9, b"x" * 60_000, durable_lsn=8)
    file.write_bytes(segment_header(1) + rest[:80] * 500 + bytes(65_000))
    disk = FaultyDisk()
    assert claims(file, 1, disk=disk)
    assert disk.calls.count("read") < 300


HOSTILE: dict[str, tuple[bytes, str]] = {
    "first bytes of heads": (ENTRY_MAGIC, "ok"),
    "halves of heads": (entry(9, durable_lsn=8)[:8], "ok"),
    "heads that claim nothing": (entry(9, b"x" * 4096, durable_lsn=0)[:80], "ok"),
    "heads that claim much": (entry(9, b"x" * 400_000, durable_lsn=8)[:80], "corrupt_wal"),
    "heads that claim little": (entry(9, b"x" * 80, durable_lsn=8)[:80], "corrupt_wal"),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_tail_full_of_what_looks_like_heads_costs_a_bounded_time(
    tmp_path: Path, name: str
) -> None:
    """A torn entry whose payload a client made up. Where looking at all of it would take too long,
    it counts as damage: nothing is cut.
    """
    unit, health = HOSTILE[name]
    place = Place(root=tmp_path / "wal")
    async with place.log() as log:
        await append(log, b"one")
    (path,) = place.files()
    tail_bytes = 48 * 1024 * 1024
    torn = entry(2, b"x" * (tail_bytes + 100), durable_lsn=1)[:84]
    with path.open("ab") as file:
        file.write(torn + unit * (tail_bytes // len(unit)))
    begun = time.process_time()
    async with place.log() as log:
        assert time.process_time() - begun < 2.0
        assert log.health == health
        assert read_all(log) == {1: b"one"}


@pytest.mark.parametrize("block_bytes", [1, 80, 150, 1 << 20])
async def test_recovery_reads_blocks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(scan, "BLOCK_BYTES", block_bytes)
    place = Place(root=tmp_path / "wal")
    async with place.log(chunk_bytes=400) as log:
        for number in range(20):
            await append(log, b"%d" % number * number)
        held = read_all(log)
    async with place.log(chunk_bytes=400) as log:
        assert read_all(log) == held
        for info in log.sealed_segments():
            assert verify_segment_blocking(info.path) == info.summary


async def test_verification_sees_every_flipped_bit_and_every_lost_byte(tmp_path: Path) -> None:
    place = Place(root=tmp_path / "wal")
    async with place.log() as log:
        await append(log, b"one", key=b"k")
        await append(log, b"t\nwo")
        await log.seal()
    (path,) = place.files()
    data = path.read_bytes()
    summary = verify_segment_blocking(path)
    assert (summary.entries, summary.line_safe, summary.keyed) == (2, False, True)
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        with pytest.raises(Damage):
            verify_segment_blocking(path)
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(Damage):
            verify_segment_blocking(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(Damage):
        verify_segment_blocking(path)
    with pytest.raises(FileNotFoundError):
        verify_segment_blocking(tmp_path / "none")


class Sample:
    """A log of several segments, sealed and open, as files and rows; made once."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp())
        self.place = Place(root=self.directory / "wal")
        asyncio.run(self._write())
        self.files = {path.name: path.read_bytes() for path in self.place.files()}

    async def _write(self) -> None:
        async with self.place.log(chunk_bytes=120) as log:
            await append(log, b"one", key=b"k")
            await append(log, b"two" * 20, b"three" * 20, b"four" * 20, per_entry=1)
            await append_together(log, request(b"five"), request(b"six"))
            await append(log, b"seven")
            self.held = read_all(log)


@pytest.fixture(scope="module")
def sample() -> Iterator[Sample]:
    made = Sample()
    yield made
    shutil.rmtree(made.directory)


changes = st.lists(
    st.tuples(
        st.integers(0, 10),
        st.integers(0, 2000),
        st.one_of(
            st.binary(max_size=8),
            st.just(ENTRY_MAGIC),
            st.just(b"BOPWEND\x01\x01"),
            st.none(),
        ),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=150, deadline=None)
@given(changes=changes)
def test_hostile_files_never_give_wrong_records(
    sample: Sample, changes: list[tuple[int, int, bytes | None]]
) -> None:
    """Fault row 51: bytes overwritten or cut anywhere; what is shown is true, or not shown."""
    files = {name: bytearray(data) for name, data in sample.files.items()}
    for which, where, data in changes:
        content = files[sorted(files)[which % len(files)]]
        position = where % (len(content) + 1)
        if data is None:
            del content[position:]
        else:
            content[position : position + len(data)] = data

    async def look() -> None:
        with tempfile.TemporaryDirectory() as directory:
            place = Place(root=Path(directory) / "wal", catalog=sample.place.catalog.copy())
            (place.root / str(DB)).mkdir(parents=True)
            for name, content in files.items():
                (place.root / str(DB) / name).write_bytes(content)
            async with place.log(chunk_bytes=120) as log:
                assert log.health in {"ok", "corrupt_wal"}
                try:
                    held = read_all(log)
                except Damage:
                    return  # sealed entries are checked when they are read
                assert held.items() <= sample.held.items()
                assert list(held) == list(range(1, len(held) + 1))
            assert place.fatal == []

    asyncio.run(look())
