"""Chunk files of one log, joined."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from app.core.formats import chunk
from app.core.formats.chunk import LogIdentity, write_log_blocking
from app.core.formats.damage import Damage
from app.core.formats.segment import EngineCode, SegmentHeader
from app.core.formats.segment_merge import MergeInput, merge_segments_blocking
from app.core.stores.wal.verification import verify_segment_blocking
from tests.helpers.logs import build_segment

WHO = LogIdentity(db_id=7, chunk_id=3, generation=12)


def records(first: int, count: int, *, size: int) -> list[bytes]:
    return [b"%08d" % (first + n) + b"x" * (size - 8) for n in range(count)]


@pytest.fixture
def made(tmp_path):
    """Three neighbouring segments from LSN 100 on: small, larger than an index stride, small."""
    parts, lsn = [], 100
    for count, size in ((5, 20), (900, 400), (1, 9)):
        whole = records(lsn, count, size=size)
        entries = [whole[at : at + 7] for at in range(0, count, 7)]
        parts.append(build_segment(tmp_path / f"s{lsn}", entries, first_lsn=lsn))
        lsn += count
    return parts


def header_of(first_lsn: int = 100) -> SegmentHeader:
    return SegmentHeader(
        engine=EngineCode.APPEND_ONLY, db_id=7, segment_id=first_lsn, first_lsn=first_lsn,
        chunk_bytes=1 << 20,
    )  # fmt: skip


def files_of(parts, codec, tmp_path) -> list[Path]:
    files = []
    for part in parts:
        path = part.path
        if codec != "none":
            path = tmp_path / f"{part.path.name}.{codec}"
            write_log_blocking(part.path, path, codec=codec, identity=WHO)
        files.append(path)
    return files


@contextmanager
def opened(parts, files, codec) -> Iterator[list[MergeInput]]:
    with ExitStack() as stack:
        yield [
            MergeInput(
                descriptor=stack.enter_context(path.open("rb")).fileno(), codec=codec,
                first_lsn=part.first_lsn, last_lsn=part.durable_last_lsn,
            )
            for path, part in zip(files, parts, strict=True)
        ]  # fmt: skip


def merge(parts, files, target, *, codec="none"):
    with opened(parts, files, codec) as inputs:
        return merge_segments_blocking(inputs, target, header=header_of())


@pytest.mark.parametrize("codec", ["none", "zstd", "lz4"])
def test_a_merged_segment_is_as_if_the_log_had_written_it(tmp_path, made, codec):
    target = tmp_path / "merged"
    summary = merge(made, files_of(made, codec, tmp_path), target, codec=codec)
    assert verify_segment_blocking(target) == summary
    assert (summary.first_lsn, summary.last_lsn) == (100, 100 + 905)
    assert summary.segment_bytes == target.stat().st_size
    assert summary.segment_bytes <= sum(part.path.stat().st_size for part in made)
    entries = [
        part.path.read_bytes()[64 : verify_segment_blocking(part.path).entries_end] for part in made
    ]
    assert target.read_bytes()[64 : summary.entries_end] == b"".join(entries)


def test_the_same_sources_give_the_same_bytes_over_an_older_file(tmp_path, made):
    files = files_of(made, "none", tmp_path)
    first, second = tmp_path / "a", tmp_path / "b"
    second.write_bytes(b"half written" * 9999)
    merge(made, files, first)
    merge(made, files, second)
    assert first.read_bytes() == second.read_bytes()


def test_a_gap_is_refused(tmp_path, made):
    apart = [made[0], made[2]]
    with pytest.raises(Damage, match="instead of 105"):
        merge(apart, files_of(apart, "none", tmp_path), tmp_path / "m")


def test_a_block_without_an_entry_is_damage(tmp_path, made, monkeypatch):
    """No writer cuts so; a container that is intact may still say so."""
    monkeypatch.setattr(
        chunk, "plan_log_blocks",
        lambda summary, _: [
            (summary.first_lsn, 0), (summary.first_lsn, 64),
            (summary.last_lsn + 1, summary.entries_end),
        ],
    )  # fmt: skip
    files = files_of(made[:1], "zstd", tmp_path)
    monkeypatch.undo()
    with pytest.raises(Damage, match="without an entry"):
        merge(made[:1], files, tmp_path / "m", codec="zstd")


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_damage_is_not_sealed_anew(tmp_path, made, codec):
    files = files_of(made, codec, tmp_path)
    data = files[1].read_bytes()
    for offset in (70, len(data) // 2, len(data) - 100):
        flipped = bytearray(data)
        flipped[offset] ^= 4
        files[1].write_bytes(flipped)
        with pytest.raises(Damage):
            merge(made, files, tmp_path / "m", codec=codec)
