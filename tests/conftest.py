"""Fixtures that every layer of tests may use."""

import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.helpers.launch import ForkServer, Launcher
from tests.helpers.server import ServerProcess


def pytest_configure() -> None:
    """A shell's background job ignores SIGINT, and so would every command under test."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The long size runs only where `-m` names it."""
    if "long" in config.option.markexpr:
        return
    long = [item for item in items if item.get_closest_marker("long")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """One warm process per test worker; servers are its forks."""
    server = ForkServer()
    yield server
    server.close()


class MakeServer(Protocol):
    def __call__(
        self, name: str = "data", *, launcher: Launcher | None = None, **options: Any
    ) -> ServerProcess: ...


@pytest.fixture
async def make_server(tmp_path: Path, fork_server: ForkServer) -> AsyncIterator[MakeServer]:
    """Servers on data directories below the test's own; all are gone when it ends."""
    made: list[ServerProcess] = []

    def make(
        name: str = "data", *, launcher: Launcher | None = None, **options: Any
    ) -> ServerProcess:
        server = ServerProcess(tmp_path / name, launcher=launcher or fork_server, **options)
        made.append(server)
        return server

    yield make
    for server in made:
        await server.aclose()
        print(f"--- {server!r}\n{server.log_tail()}")  # pytest shows it where the test failed


@pytest.fixture
async def server(make_server: MakeServer) -> ServerProcess:
    """A running service with an empty data directory."""
    server = make_server()
    await server.start()
    return server
