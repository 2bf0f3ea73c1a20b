"""Fault rows 10, 11, 13 under the WAL: a failed fsync, a short write, a disk that is full."""

import asyncio
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from app.core.base.errors import DiskFull
from app.core.stores.wal.log import NewSegment
from tests.fault.conftest import requires_strace
from tests.fault.test_wal_kill import ROOT, check, numbers
from tests.unit.core.stores.wal.builders import Place, append, append_together, read_all, request

CALLS = "trace=pwritev,pwritev2,fdatasync,ftruncate"
APPENDS = 6
CALLED = re.compile(r"(pwritev|fdatasync|ftruncate)2?\((.*)\) += (-?\d+)(.*)")


@dataclass(frozen=True)
class Call:
    name: str
    offset: int  # of a write
    injected: bool


def strace_child(root: Path, inject: str) -> tuple[list[str], list[Call]]:
    """What the child said, and what it did to its only segment, the injected faults included."""
    trace = root.with_suffix(".trace")
    segment = root / "wal" / "1" / f"{1:016d}.wal"
    done = subprocess.run(
        ["strace", "-f", "-qq", "-o", str(trace), "-P", str(segment), "-e", CALLS,
         "-e", f"inject={inject}",
         sys.executable, "-m", "tests.fault.wal_child", str(root), str(APPENDS)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=90, check=False,
        env=os.environ | {"WAL_CHILD_CHUNK_BYTES": str(1 << 20)},
    )  # fmt: skip
    assert done.returncode == 0
    calls = []
    for line in trace.read_text().splitlines():
        if called := CALLED.search(line):
            arguments = called[2].split(", ")
            offset = int(arguments[-2 if "pwritev2" in line else -1]) if "pwritev" in line else 0
            calls.append(Call(called[1], offset, "INJECTED" in called[4]))
    return done.stdout.splitlines(), calls


@requires_strace
def test_a_failed_fdatasync_acknowledges_nothing_and_is_never_tried_again(tmp_path: Path) -> None:
    said, calls = strace_child(tmp_path / "data", "fdatasync:error=EIO:when=3")
    assert [call.name for call in calls] == ["pwritev", "fdatasync"] * 3
    assert calls[-1].injected
    assert len(numbers(said, "acked")) == 2
    assert said.count("failed storage") == APPENDS - 2
    assert said[-1] == "fatal 1"
    asyncio.run(check(tmp_path / "data", said))


@requires_strace
def test_a_failed_write_is_fatal(tmp_path: Path) -> None:
    said, calls = strace_child(tmp_path / "data", "pwritev,pwritev2:error=EIO:when=3")
    assert calls[-1].injected
    assert (said.count("failed storage"), said[-1]) == (APPENDS - 2, "fatal 1")
    asyncio.run(check(tmp_path / "data", said))


@requires_strace
def test_a_write_without_room_is_taken_back_durably(tmp_path: Path) -> None:
    said, calls = strace_child(tmp_path / "data", "pwritev,pwritev2:error=ENOSPC:when=3")
    at = next(place for place, call in enumerate(calls) if call.injected)
    assert [call.name for call in calls[at : at + 4]] == [
        "pwritev", "ftruncate", "fdatasync", "pwritev",
    ]  # fmt: skip
    assert calls[at + 3].offset == calls[at].offset
    assert (said.count("failed disk_full"), said[-1]) == (1, "fatal 0")
    asyncio.run(check(tmp_path / "data", said))


@requires_strace
def test_a_short_write_is_completed(tmp_path: Path) -> None:
    """The kernel says that 100 bytes went in: the rest follows at once, from there."""
    said, calls = strace_child(tmp_path / "data", "pwritev,pwritev2:retval=100:when=3")
    at = next(place for place, call in enumerate(calls) if call.injected)
    assert [call.name for call in calls[at : at + 3]] == ["pwritev", "pwritev", "fdatasync"]
    assert calls[at + 1].offset == calls[at].offset + 100
    assert said[-1] == "fatal 0"


def test_a_write_that_the_kernel_cuts_short_and_then_refuses(tmp_path: Path) -> None:
    """RLIMIT_FSIZE: a real short write, then EFBIG. The tail is cut at the next start."""
    limit_bytes = 2000

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    code = (
        "import asyncio, sys; from pathlib import Path\n"
        "from app.core.base.errors import StorageFailure\n"
        "from tests.unit.core.stores.wal.builders import Place, append\n"
        "async def main():\n"
        "    place = Place(root=Path(sys.argv[1]))\n"
        "    async with place.log(chunk_bytes=1 << 20) as log:\n"
        "        try:\n"
        "            for number in range(100):\n"
        "                done = await append(log, b'x' * 300)\n"
        "                print(done.last_lsn, flush=True)\n"
        "        except StorageFailure:\n"
        "            print('fatal', len(place.fatal), flush=True)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "wal")],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60, check=False, preexec_fn=limit,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.stdout.split() == ["1", "2", "3", "4", "5", "fatal", "1"]
    place = Place(root=tmp_path / "wal")
    (path,) = place.files()
    assert path.stat().st_size == limit_bytes
    row = NewSegment(segment_id=1, first_lsn=1, ceiling_lsn=10_000)
    place.catalog.register_blocking(db_id=7, segments=[row])

    async def recover() -> None:
        async with place.log(chunk_bytes=1 << 20) as log:
            assert read_all(log) == dict.fromkeys(range(1, 6), b"x" * 300)

    asyncio.run(recover())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    where = tmp_path / "small"
    where.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(where)],
        capture_output=True, check=False,
    )  # fmt: skip
    if mounted.returncode != 0:
        pytest.skip("no right to mount a tmpfs")
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)


async def test_a_full_disk_refuses_and_goes_on_when_there_is_room(small_disk: Path) -> None:
    place = Place(root=small_disk / "wal")
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(100_000))
    written: dict[int, bytes] = {}
    async with place.log(chunk_bytes=50_000) as log:
        free_bytes = []
        for number in range(30):
            try:
                done = await append(log, b"%02d" % number * 5_000)
            except DiskFull as full:
                free_bytes.append(full.fields["free_bytes"])
            else:
                written[done.first_lsn] = b"%02d" % number * 5_000
        assert len(free_bytes) > 5
        assert max(free_bytes) < 15_000
        assert sorted(written) == list(range(1, len(written) + 1))
        assert read_all(log) == written
        answers = await append_together(log, request(b"x" * 300_000), request(b"small"))
        assert [type(one) for one in answers] == [DiskFull, DiskFull]
        ballast.unlink()
        done = await append(log, b"room")
        written[done.first_lsn] = b"room"
        await log.seal()
        assert log.unsealed_bytes == 0
    assert place.fatal == []
    async with place.log(chunk_bytes=50_000) as log:
        assert (log.health, read_all(log)) == ("ok", written)
