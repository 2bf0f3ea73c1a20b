"""Real servers for integration tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import sqlite_writer
from tests.helpers.following import Process
from tests.helpers.ports import free_port
from tests.helpers.seaweed import SeaweedS3
from tests.helpers.stub_libsql import StubLibsql


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedS3]:
    """One SeaweedFS per test worker; take a bucket of your own with `seaweed.bucket()`."""
    with SeaweedS3.running(tmp_path_factory.mktemp("seaweed") / "server") as server:
        yield server


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    started: list[Process] = []
    yield started
    for process in started:
        process.end()


@pytest.fixture
def stub() -> Iterator[StubLibsql]:
    with StubLibsql(free_port()) as stub:
        yield stub


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "app.db"
    sqlite_writer.prepare(str(path), 4096)
    return path
