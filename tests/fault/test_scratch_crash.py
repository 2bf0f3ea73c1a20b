"""Kill -9 in the middle of writing a scratch file (fault row 23): what is left has no name that
anyone would read, and goes with the job's directory.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

from app.core.base.clock import SystemClock
from app.core.base.tasks import BlockingPool
from app.core.stores.local.scratch import ScratchStore
from tests.helpers.failpoints import failpoint_environment, kill_at
from tests.helpers.launch import REPOSITORY, base_environment

JOB = "01J0000000000000000000000A"
CHILD = """
import asyncio, sys
from pathlib import Path
from app.core.base.clock import SystemClock
from app.core.base.tasks import BlockingPool
from app.core.stores.local.scratch import ScratchStore

async def main():
    pool = BlockingPool("child", threads=1)
    store = ScratchStore(Path(sys.argv[1]), pool=pool, clock=SystemClock())
    scratch = await store.create(sys.argv[2])
    scratch.write_blocking("whole", [b"written before"])
    print("written", flush=True)
    scratch.write_blocking("torn", [b"half of it"])

asyncio.run(main())
"""


def write_until_killed(root: Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", CHILD, os.fspath(root), JOB],
        env=base_environment() | failpoint_environment(kill_at("stage.mid_write", nth=2)),
        cwd=REPOSITORY,
        capture_output=True,
        timeout=60,
        check=False,
    )


async def test_a_file_cut_short_by_a_crash_never_takes_its_name(tmp_path: Path) -> None:
    root = tmp_path / "checkpoint_scratch"
    done = write_until_killed(root)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"written\n"), done.stderr
    pool = BlockingPool("test", threads=1)
    scratch = ScratchStore(root, pool=pool, clock=SystemClock())
    assert (root / JOB / "whole").read_bytes() == b"written before"
    assert not (root / JOB / "torn").exists()
    again = await scratch.create(JOB)
    await pool.run(lambda: again.write_blocking("torn", [b"all of it"]))
    assert (root / JOB / "torn").read_bytes() == b"all of it"
    await scratch.remove(JOB)
    assert list(root.iterdir()) == []
    pool.close_blocking()
