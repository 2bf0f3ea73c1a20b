"""The soak at its smallest: every feature at once, nothing grows, nothing is left, fsck is clean.

The long one is `make soak SECONDS=…`.
"""

import asyncio
import sys
from pathlib import Path

import pytest

from tests.helpers.launch import REPOSITORY, base_environment

SECONDS = 15


@pytest.mark.timeout(300)
async def test_a_short_soak(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.load", "soak", "--seconds", str(SECONDS),
        cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        env=base_environment() | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    told, _ = await process.communicate()
    print(told.decode())
    assert process.returncode == 0, told.decode()
