"""Two ways to keep a SQLite database in S3, measured in the same way: ours, and Litestream 0.5.

Both are their commands, from the process's start to its end. Litestream has no service; ours is
running before, as it is in use.
"""

import asyncio
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

from tests.helpers.seaweed import SeaweedS3

LITESTREAM = Path(sys.executable).with_name("litestream")


class Peer(Protocol):
    bucket: str

    async def sync(self, database: Path) -> float:
        """Everything committed is in the bucket; seconds."""

    async def restore(self, database: Path, target: Path) -> float:
        """A checked file; seconds."""

    async def sync_all(self, databases: Sequence[Path]) -> None:
        """The same for all databases of one directory."""

    def following(self, databases: Sequence[Path]) -> list[str]:
        """The command that follows them until it is ended."""


class Litestream:
    def __init__(self, seaweed: SeaweedS3, directory: Path) -> None:
        self.bucket = seaweed.bucket()
        self._seaweed = seaweed
        self._config = directory / "litestream.json"  # a JSON document is YAML

    async def sync(self, database: Path) -> float:
        self._configure([database])
        return await _timed(str(LITESTREAM), "replicate", "-config", str(self._config), "-once")

    async def restore(self, database: Path, target: Path) -> float:
        """With the check that ours makes."""
        self._configure([database])
        return await _timed(
            str(LITESTREAM), "restore", "-config", str(self._config),
            "-integrity-check", "quick", "-o", str(target), str(database),
        )  # fmt: skip

    async def sync_all(self, databases: Sequence[Path]) -> None:
        await _timed(*self.following(databases), "-once")

    def following(self, databases: Sequence[Path]) -> list[str]:
        self._configure(databases)
        return [str(LITESTREAM), "replicate", "-config", str(self._config)]

    def _configure(self, databases: Sequence[Path]) -> None:
        replicas = {
            path: {
                "type": "s3",
                "bucket": self.bucket,
                "path": path.stem,
                "endpoint": self._seaweed.endpoint,
                "region": self._seaweed.region,
                "force-path-style": True,
                "access-key-id": self._seaweed.access_key,
                "secret-access-key": self._seaweed.secret_key,
            }
            for path in databases
        }
        document = {
            "logging": {"level": "warn"},
            "dbs": [{"path": str(path), "replica": each} for path, each in replicas.items()],
        }
        self._config.write_text(json.dumps(document))


class Checkpointing:
    def __init__(self, port: int, bucket: str) -> None:
        self.bucket = bucket
        self._command = [
            sys.executable, "-m", "app.cli.main", "--url", f"http://127.0.0.1:{port}",
        ]  # fmt: skip

    async def sync(self, database: Path) -> float:
        arguments = ["replicate", str(database), _name(database), "--once", "--checkpoint"]
        return await _timed(*self._command, *arguments)

    async def restore(self, database: Path, target: Path) -> float:
        return await _timed(*self._command, "restore", _name(database), "-o", str(target))

    async def sync_all(self, databases: Sequence[Path]) -> None:
        await _timed(*self.following(databases), "--once", "--checkpoint")

    def following(self, databases: Sequence[Path]) -> list[str]:
        """All of one directory."""
        return [*self._command, "replicate", str(databases[0].parent), "bench"]


def _environment() -> dict[str, str]:
    """Without what Go's SDK refuses together with a client of its own; no TLS is used here."""
    return {name: value for name, value in os.environ.items() if name != "AWS_CA_BUNDLE"}


def _name(database: Path) -> str:
    return f"bench/{database.stem}"


async def _timed(*command: str) -> float:
    started = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        *command, env=_environment(),
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, errors = await process.communicate()
    seconds = time.perf_counter() - started
    if process.returncode:
        raise RuntimeError(f"{command}: {process.returncode}: {errors.decode()[-2000:]}")
    return seconds


@asynccontextmanager
async def started(command: list[str]) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *command, env=_environment(),
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), 30)
            except TimeoutError:
                process.kill()
                await process.wait()


def copy_blocking(source: Path, target: Path) -> Path:
    """As another disk would have it: written out, so that nobody's measurement pays for it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    with target.open("rb+") as file:
        os.fsync(file.fileno())
    return target
