"""Fault row 7: killed before, during and after every step of the WAL (I1, I4, I13).

The service is killed at the same places in test_crash_points.py; here the log alone, cheaply, at
more passes of each place, and its bytes are looked at.
"""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fault.wal_child import opened, record
from tests.helpers.registry import failpoints_in
from tests.unit.core.stores.wal.builders import read_all

ROOT = Path(__file__).parents[2]
PLACES = sorted(name for name in failpoints_in(ROOT / "app" / "core" / "stores" / "wal"))


def run_child(root: Path, count: int, *place: str) -> tuple[int, list[str]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fault.wal_child", str(root), str(count), *place],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60, check=False,
        env=os.environ | {"WAL_CHILD_DRAFTS": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout.splitlines()


def numbers(said: list[str], word: str) -> list[list[int]]:
    return [[int(part) for part in line.split()[1:]] for line in said if line.startswith(word)]


async def check(root: Path, said: list[str]) -> int:
    """All that was acknowledged and not released is there, whole requests only; next_lsn."""
    acked = max((last for _, last in numbers(said, "acked")), default=0)
    released = max((last for (last,) in numbers(said, "released")), default=0)
    fatal: list[BaseException] = []
    async with opened(root, fatal) as (_, log):
        held = read_all(log)
        assert log.health == "ok"
        kept = [lsn for lsn in held if lsn > released]
        assert kept == list(range(released + 1, log.next_lsn))
        assert all(content == record(lsn) for lsn, content in held.items())
        tried = 1 + len(numbers(said, "acked")) % 5  # of the one that was cut off
        assert log.next_lsn in {acked + 1, acked + 1 + tried}
        assert fatal == []
        return log.next_lsn


def test_every_place_is_known() -> None:
    assert len(PLACES) == 12


@pytest.mark.parametrize("place", PLACES)
def test_kill_at_every_step_keeps_what_was_acknowledged(tmp_path: Path, place: str) -> None:
    for nth in (1, 3):
        root = tmp_path / str(nth)
        code, said = run_child(root, 40, place, str(nth))
        assert code == -signal.SIGKILL, said
        next_lsn = asyncio.run(check(root, said))
        code, after = run_child(root, 2)
        assert code == 0
        assert numbers(after, "acked")[0][0] == next_lsn


def test_kill_before_the_write_loses_it_and_after_the_sync_keeps_it(tmp_path: Path) -> None:
    """Each outcome that is allowed does occur: the places are where they say they are."""
    outcomes = {}
    for place in ("wal.before_write", "wal.mid_write", "wal.after_fsync"):
        root = tmp_path / place
        _, said = run_child(root, 40, place, "2")
        acked = numbers(said, "acked")[-1][1]
        outcomes[place] = asyncio.run(check(root, said)) - 1 - acked
    assert outcomes == {"wal.before_write": 0, "wal.mid_write": 0, "wal.after_fsync": 2}


def test_kill_at_any_moment_keeps_what_was_acknowledged(tmp_path: Path) -> None:
    for wanted in (3, 30, 90):
        root = tmp_path / str(wanted)
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.fault.wal_child", str(root), "100000"],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert child.stdout is not None
        said = []
        for line in child.stdout:
            said.append(line)
            if len(numbers(said, "acked")) == wanted:
                break
        child.kill()
        said += child.stdout  # communicate() would leave out what is in its buffer
        child.stdout.close()
        child.wait(timeout=60)
        asyncio.run(check(root, said))
