"""The means by which the other fault tests start, kill and watch the service."""

import signal
from pathlib import Path

import pytest

from tests.conftest import MakeServer
from tests.helpers.failpoints import kill_at
from tests.helpers.launch import ForkServer, NewInterpreter
from tests.helpers.ports import free_port
from tests.helpers.server import ServerEnded, ServerProcess
from tests.helpers.wait import wait_until
from tests.helpers.workload import DATABASE, Workload


async def test_kill_takes_one_fork_and_no_other(make_server: MakeServer) -> None:
    first, second = make_server("first"), make_server("second")
    await first.start()
    await second.start()
    await first.kill9()
    assert first.exit_code == -signal.SIGKILL
    assert (await second.client.get("/readyz")).status_code == 200
    await first.start()
    assert await first.terminate() == 0
    assert await second.terminate() == 0


async def test_restart_keeps_the_data(server: ServerProcess) -> None:
    workload = Workload()
    await workload.create(server.client)
    await workload.append(server.client, 3, pad_bytes=10)
    before = server.pid
    await server.restart()
    assert server.pid != before
    await workload.check(server)


async def test_a_new_interpreter_serves_as_a_fork_does(make_server: MakeServer) -> None:
    server = make_server(launcher=NewInterpreter())
    await server.start()
    await Workload().create(server.client)
    assert (await server.client.get(DATABASE)).status_code == 200
    assert 0 < server.rss_bytes() <= server.rss_peak_bytes()
    assert await server.terminate() == 0


async def test_settings_are_read_in_the_fork(make_server: MakeServer) -> None:
    server = make_server(settings={"BOP_JOB_CONCURRENCY": "none"})
    with pytest.raises(ServerEnded, match="BOP_JOB_CONCURRENCY"):
        await server.start()
    assert server.exit_code == 2


async def test_failpoints_are_armed_in_the_fork_only(make_server: MakeServer) -> None:
    armed, plain = make_server("armed"), make_server("plain")
    with pytest.raises(ServerEnded, match="exit -9"):
        await armed.start(failpoints=kill_at("manifest.before_create_rename"))
    await plain.start()
    await armed.start(failpoints={})


async def test_a_paused_server_answers_when_resumed(server: ServerProcess) -> None:
    server.pause()
    await wait_until(lambda: _state(server) == "T", describe="the stop")
    server.resume()
    assert (await server.client.get("/healthz")).status_code == 200


def test_the_fork_servers_end_takes_its_forks_along(tmp_path: Path) -> None:
    fork_server = ForkServer()
    forked = fork_server.launch(
        ["serve"],
        environment={"BOP_DATA_DIR": str(tmp_path / "data"), "BOP_PORT": str(free_port())},
        log=tmp_path / "log",
        cwd=tmp_path,
    )
    assert forked.poll() is None
    fork_server.close()
    assert forked.poll() == -signal.SIGKILL


def test_ports_are_given_once_and_leave_room_for_grpc() -> None:
    ports = [free_port() for _ in range(20)]
    assert len(set(ports)) == 20
    assert all(port < 55000 for port in ports)


def _state(server: ServerProcess) -> str:
    stat = Path(f"/proc/{server.pid}/stat").read_text()
    return stat.rpartition(")")[2].split()[0]
