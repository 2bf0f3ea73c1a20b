"""What every fault test stands on."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import pytest
import pytest_asyncio

from tests.helpers import syscalls
from tests.helpers.failpoints import read_trace
from tests.helpers.launch import ForkServer
from tests.helpers.powercut import Recording, record
from tests.helpers.server import ServerProcess
from tests.helpers.workload import STANDARD_SETTINGS, Workload, plant_orphan

REPOSITORY = Path(__file__).resolve().parents[2]

requires_strace = pytest.mark.skipif(not syscalls.is_available(), reason="strace is not installed")


class Recorder(Protocol):
    def __call__(self, module: str, *arguments: str) -> Recording: ...


@pytest.fixture
def record_child(tmp_path: Path) -> Recorder:
    """Runs a module of `tests/fault/children` to its end and records what it did to its disk."""

    def run(module: str, *arguments: str) -> Recording:
        return record(
            [sys.executable, "-m", module, *arguments],
            environment={"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"},
            cwd=REPOSITORY,
            work=tmp_path / "recording",
        )

    return run


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def standard_hits(
    fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, int]:
    """Failpoints that the standard workload reaches undisturbed, and how often at least: a start
    on an empty directory, the work, an orderly end, and all that again.
    """
    directory = tmp_path_factory.mktemp("reference")
    trace = directory / "trace"
    server = ServerProcess(
        directory / "data", launcher=fork_server, settings=STANDARD_SETTINGS, trace=trace
    )
    workload = Workload()
    try:
        for _ in range(2):
            plant_orphan(server.data_dir)
            await server.start()
            await workload.run(server.client)
            assert await server.terminate() == 0, server.log_tail()
    finally:
        await server.aclose()
    return read_trace(trace)
