"""Kill -9 at every failpoint of a standard workload (fault rows 6, 7, 20-23).

For each failpoint: the service dies there when it first comes by; started again it dies there
some way into its next life; then it runs undisturbed. What was acknowledged is there exactly once
at its LSNs, nothing is invented, accepted jobs complete by themselves, nothing is left behind.
"""

import signal
from collections.abc import Mapping

import pytest

from app.container import fsck
from app.settings import Settings
from tests.conftest import MakeServer
from tests.fault.scenarios import STANDARD
from tests.helpers.failpoints import Failpoints, kill_at
from tests.helpers.server import ServerEnded, ServerProcess
from tests.helpers.workload import (
    LARGE_COUNT,
    LARGE_ORDINAL,
    STANDARD_SETTINGS,
    Crashed,
    Workload,
    plant_orphan,
)


@pytest.mark.parametrize("name", STANDARD)
async def test_kill_at(
    name: str, make_server: MakeServer, standard_hits: Mapping[str, int]
) -> None:
    server, workload = make_server(settings=STANDARD_SETTINGS), Workload()
    died = await live_until_killed(server, workload, kill_at(name))
    assert died, f"{name} was not reached"
    if standard_hits[name] > 1:
        await live_until_killed(server, workload, kill_at(name, nth=later(standard_hits[name])))
    plant_orphan(server.data_dir)
    await server.start(failpoints={})
    await workload.check(server)
    await workload.create(server.client)
    await workload.retry_unknown(server.client)
    await workload.run(server.client)
    await workload.check(server)
    assert await server.terminate() == 0, server.log_tail()
    report = await fsck(Settings(data_dir=server.data_dir))
    assert report.findings == ()


@pytest.mark.parametrize("name", ["wal.mid_write", "wal.before_register", "wal.after_register"])
async def test_kill_within_an_append_over_several_segments(
    name: str, make_server: MakeServer
) -> None:
    """Wholly there or wholly absent, and its key makes the retry safe (I1)."""
    server, workload = make_server(settings=STANDARD_SETTINGS), Workload()
    nth = LARGE_ORDINAL + 2 if name == "wal.mid_write" else 2
    assert await live_until_killed(server, workload, kill_at(name, nth=nth))
    torn = [append for append in workload.ledger.appends if append.outcome == "unknown"]
    assert [len(append.payloads) for append in torn] == [LARGE_COUNT]
    await server.start(failpoints={})
    await workload.check(server)
    assert await workload.retry_unknown(server.client) == 1
    await workload.run(server.client)
    await workload.check(server)


async def live_until_killed(
    server: ServerProcess, workload: Workload, failpoints: Failpoints
) -> bool:
    """One life of the service under the workload, its start and its orderly end included. True
    if it died at the failpoint.
    """
    plant_orphan(server.data_dir)
    try:
        await server.start(failpoints=failpoints)
        await workload.run(server.client)
        await workload.retry_unknown(server.client)
        code = await server.terminate()
    except (Crashed, ServerEnded):
        code = await server.wait_exit(timeout=10)
    assert code in {0, -signal.SIGKILL}, server.log_tail()
    return code == -signal.SIGKILL


def later(hits: int) -> int:
    """A hit in the middle of a life."""
    return max(2, hits // 2 + 1)
