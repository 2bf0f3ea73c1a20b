"""Followers of live SQLite files, here and as a command, against the stub of the service.

The database files are read here only when nothing of this process follows them: closing a
descriptor of theirs would drop SQLite's locks.
"""

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any

from app.client import BopClient, RetryPolicy
from app.replication.events import Event
from app.replication.fleet import Fleet
from app.replication.plan import Limits
from app.replication.targets import rule_for
from tests.helpers import sqlite_writer
from tests.helpers.stub_libsql import StubLibsql, look_into
from tests.helpers.wait import wait_until as wait_until_within

ROOT = Path(__file__).parents[2]
NAME = "acme/main"
wait_until = partial(wait_until_within, timeout=60)
"""For a machine that is busy with other things."""


class Process:
    """A child whose lines of output are kept; with `stdout`, those on standard error alone."""

    def __init__(self, log: Path, *arguments: str, stdout: int | None = None) -> None:
        self._log = log
        with log.open("wb") as output:
            self._child = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                stdout=output if stdout is None else stdout,
                stderr=output,
            )

    def lines(self) -> list[str]:
        return self._log.read_text().splitlines()

    def events(self, kind: str) -> list[dict[str, Any]]:
        # the last line may be half written
        whole = [line for line in self._log.read_text().split("\n")[:-1] if line.startswith("{")]
        return [event for line in whole if (event := json.loads(line)).get("event") == kind]

    def end(self, number: int = signal.SIGKILL) -> int:
        if self._child.poll() is None:
            self._child.send_signal(number)
        return self._child.wait(timeout=30)

    def wait(self) -> int:
        return self._child.wait(timeout=60)


class Followed:
    """A fleet of one database in this process, and what it told."""

    def __init__(self, fleet: Fleet, told: list[Event]) -> None:
        self.fleet = fleet
        self.told = told

    def kinds(self) -> list[str]:
        return [event.event for event in self.told]

    def reasons(self) -> list[object]:
        return [e.members["reason"] for e in self.told if e.event == "image_sending"]


@asynccontextmanager
async def followed(
    path: Path, url: str, *, limits: Limits | None = None, name: str = NAME
) -> AsyncIterator[Followed]:
    told: list[Event] = []
    async with BopClient(url, retry=RetryPolicy(attempts_max=1)) as client:
        fleet = Fleet([rule_for(path, name)], client, tell=told.append, limits=limits)
        async with asyncio.TaskGroup() as group:
            group.create_task(fleet.run(once=False))
            try:
                yield Followed(fleet, told)
            finally:
                fleet.stop()


def write(
    tmp_path: Path,
    path: Path,
    *,
    kinds: str,
    count: int,
    page_size: int = 4096,
    pause_ms: int = 2,
) -> Process:
    return Process(
        tmp_path / f"writer-{os.urandom(4).hex()}",
        str(ROOT / "tests/helpers/sqlite_writer.py"),
        str(path),
        str(page_size),
        kinds,
        str(count),
        "7",
        str(pause_ms),
    )


def replicate(
    tmp_path: Path, path: Path, url: str, *options: str, stdout: int | None = None
) -> Process:
    return Process(
        tmp_path / f"replicate-{os.urandom(4).hex()}",
        *("-m", "app.cli.main", "replicate", str(path), NAME),
        *("--url", url, "--output", "json", *options),
        stdout=stdout,
    )


def committed(stub: StubLibsql, name: str = NAME) -> int:
    """The last transaction that the stub has."""
    found = stub.databases.get(name)
    if found is None or not found.page_count:
        return -1
    if _counted.get(id(found), (0, 0))[0] != found.last_lsn:
        with tempfile.NamedTemporaryFile() as file:
            lsn, image = found.last_lsn, found.image()
            Path(file.name).write_bytes(image)
            with closing(sqlite3.connect(f"file:{file.name}?immutable=1", uri=True)) as connection:
                (count,) = connection.execute("SELECT coalesce(max(tx), 0) FROM done").fetchone()
            _counted[id(found)] = (lsn, count)
    return _counted[id(found)][1]


_counted: dict[int, tuple[int, int]] = {}
"""What `committed` found, and at which LSN."""


def log_bytes(path: Path) -> int:
    return Path(f"{path}-wal").stat().st_size


def replace_database(path: Path, other: Path) -> None:
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink()
    other.rename(path)


def replace_link(link: Path, other: Path) -> None:
    other.rename(link)


def rename_database(old: Path, new: Path) -> None:
    for suffix in ("-wal", "-shm", ""):
        Path(f"{old}{suffix}").rename(f"{new}{suffix}")


def assert_equal(stub: StubLibsql, path: Path, name: str = NAME) -> None:
    """Page for page, once nobody has the file open."""
    assert stub.failures == []
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert stub.databases[name].image() == path.read_bytes()
    look_into(stub.databases[name].image(), sqlite_writer.checked)


def restore(tmp_path: Path, stub: StubLibsql, target: Path, *options: str) -> Process:
    return Process(
        tmp_path / f"restore-{os.urandom(4).hex()}",
        *("-m", "app.cli.main", "restore", NAME, "-o", str(target)),
        *("--url", stub.url, "--output", "json", *options),
    )
