"""The command line as a user runs it, against the real service."""

import asyncio
import json
import shutil
import signal
import sqlite3
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeServer
from tests.helpers.launch import base_environment
from tests.helpers.ports import free_port
from tests.helpers.server import ServerProcess
from tests.helpers.wait import wait_until

LINES = b"".join(b'{"n":%d,"text":"line %d"}\n' % (number, number) for number in range(20_000))


@dataclass
class Ran:
    exit_code: int
    stdout: bytes
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)

    @property
    def problem(self) -> Any:
        return json.loads(self.stderr)


async def start(*arguments: str, **environment: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "app.cli.main",
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**base_environment(), **environment},
    )


async def run(*arguments: str, input: bytes = b"", **environment: str) -> Ran:  # noqa: A002
    process = await start(*arguments, **environment)
    try:
        stdout, stderr = await process.communicate(input)
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode is not None
    told = stderr.decode()
    assert "Traceback" not in told
    return Ran(process.returncode, stdout, told)


class Cli:
    def __init__(self, server: ServerProcess) -> None:
        self.server = server

    async def __call__(self, *arguments: str, input: bytes = b"") -> Ran:  # noqa: A002
        return await run(*arguments, input=input, BOP_URL=self.server.base_url)

    async def json(self, *arguments: str, input: bytes = b"") -> Any:  # noqa: A002
        ran = await self("--output", "json", *arguments, input=input)
        assert ran.exit_code == 0, ran.stderr
        return ran.json


@pytest.fixture
def cli(server: ServerProcess) -> Cli:
    return Cli(server)


async def test_a_log_from_its_creation_to_its_verification(cli: Cli):
    made = await cli.json("databases", "create", "acme/log")
    assert (made["engine"], made["next_lsn"]) == ("append_only", 1)
    appended = await cli.json("append", "acme/log", input=LINES)
    assert (appended["first_lsn"], appended["last_lsn"]) == (1, 20_000)
    assert (await cli("records", "acme/log")).stdout == LINES

    job = await cli.json("checkpoint", "acme/log", "--wait", "--reason", "test")
    assert (job["state"], job["result"]["last_lsn"]) == ("completed", 20_000)
    (generation,) = (await cli.json("generations", "acme/log"))["items"]
    assert generation["bytes_uploaded"] == job["result"]["bytes_uploaded"] > len(LINES)
    assert (await cli.json("jobs", "show", job["id"])) == job
    watched = await cli("jobs", "watch", job["id"], "--output", "json")
    assert (watched.exit_code, watched.json) == (0, job)
    assert [one["id"] for one in (await cli.json("jobs", "list"))["items"]] == [job["id"]]
    cancelled = await cli("--output", "json", "jobs", "cancel", job["id"])
    assert (cancelled.exit_code, cancelled.problem["code"]) == (1, "job_already_ended")

    shown = await cli("databases", "list", "acme")
    assert b"acme/log" in shown.stdout
    assert (await cli.json("databases", "show", "acme/log"))["checkpointed_lsn"] == 20_000
    changes = (await cli("manifest", "change-log", "--output", "json")).stdout.splitlines()
    sequences = [json.loads(change)["sequence"] for change in changes]
    assert sequences == list(range(1, len(sequences) + 1))
    assert (await cli.json("leases", "list")) == {"items": []}
    assert await cli.json("manifest", "stats")
    report = await cli.json("fsck")
    assert report["findings"] == []
    assert report["checked"]["blobs"] >= 1
    assert (await cli("records", "acme/log", "--from", "19999")).stdout == b"".join(
        LINES.splitlines(keepends=True)[-2:]
    )


async def test_records_are_followed_until_interrupted(cli: Cli):
    await cli.json("databases", "create", "acme/log")
    process = await start(
        "records", "acme/log", "--from", "1", "--follow", BOP_URL=cli.server.base_url
    )
    assert process.stdout is not None
    try:
        await cli.json("append", "acme/log", input=b"one\n")
        assert await process.stdout.readline() == b"one\n"
        await cli.json("append", "acme/log", input=b"two\n")
        assert await process.stdout.readline() == b"two\n"
        process.send_signal(signal.SIGINT)
        _, stderr = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 130
    assert stderr == b""


async def test_a_pipe_is_appended_line_by_line(cli: Cli):
    await cli.json("databases", "create", "acme/log")
    process = await start("append", "acme/log", BOP_URL=cli.server.base_url)
    assert process.stdin is not None
    try:
        process.stdin.write(b"one\ntw")
        await process.stdin.drain()

        async def stored() -> bool:
            answer = await cli.server.client.get("/tenants/acme/databases/log")
            return bool(answer.json()["next_lsn"] == 2)

        await wait_until(stored, describe=lambda: "the first line, before the pipe ends")
        stdout, stderr = await process.communicate(b"o\n")
    finally:
        if process.returncode is None:
            process.kill()
    assert (process.returncode, stderr) == (0, b"")
    assert stdout == b"Appended 2 records (6 B) to acme/log as LSN 1-2.\n"


async def test_a_reader_that_leaves_is_no_traceback(cli: Cli):
    await cli.json("databases", "create", "acme/log")
    await cli.json("append", "acme/log", input=LINES)
    process = await start("records", "acme/log", BOP_URL=cli.server.base_url)
    assert process.stdout is not None
    assert process.stderr is not None
    assert await process.stdout.readline() == LINES.splitlines(keepends=True)[0]
    process._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined]
    assert await process.stderr.read() == b""
    assert await process.wait() == 1


async def test_nobody_listens():
    url = f"http://127.0.0.1:{free_port()}"
    ran = await run("jobs", "list", "--url", url)
    assert ran.exit_code == 1
    assert ran.stderr == (
        f"Error: No service answers at {url}: connection refused.\n"
        "Start one with 'bop-checkpoint serve', or say where it is with --url or BOP_URL.\n"
    )


async def test_a_data_directory_that_cannot_be_written_is_told_in_a_sentence(tmp_path: Path):
    taken = tmp_path / "file"
    taken.touch()
    ran = await run("serve", BOP_DATA_DIR=str(taken / "data"), BOP_PORT="0")
    assert ran.exit_code == 1
    logged = [json.loads(line) for line in ran.stdout.decode().splitlines()]
    (told,) = [line["detail"] for line in logged if line["event"] == "service.start_refused"]
    assert told.startswith(f"BOP_DATA_DIR={taken}/data cannot be used: ")
    assert "Traceback" not in ran.stdout.decode() + ran.stderr


async def test_fsck_of_a_data_directory_needs_it_stopped(cli: Cli):
    await cli.json("databases", "create", "acme/log")
    await cli.json("append", "acme/log", input=b"one\n")
    data_dir = str(cli.server.data_dir)
    busy = await run("--output", "json", "fsck", "--data-dir", data_dir)
    assert (busy.exit_code, busy.problem["code"]) == (1, "start_refused")
    await cli.server.terminate()
    clean = await run("--output", "json", "fsck", "--data-dir", data_dir)
    assert (clean.exit_code, clean.json["findings"]) == (0, [])


async def test_recover_from_the_remote_store_alone(cli: Cli, make_server: MakeServer):
    await cli.json("databases", "create", "acme/log")
    await cli.json("append", "acme/log", input=LINES)
    await cli.json("checkpoint", "acme/log", "--wait")
    await cli.server.terminate()
    data_dir = cli.server.data_dir
    lose_all_but_remote(data_dir)

    refused = await run("serve", BOP_DATA_DIR=str(data_dir), BOP_PORT="0")
    assert refused.exit_code == 1
    assert "recover" in refused.stdout.decode() + refused.stderr
    assert "Traceback" not in refused.stdout.decode() + refused.stderr
    recovered = await run("recover", "--output", "json", BOP_DATA_DIR=str(data_dir))
    assert recovered.exit_code == 0, recovered.stderr
    (database,) = recovered.json["databases"]
    assert (database["tenant"], database["generations"]) == ("acme", 1)
    again = await run("recover", "--output", "json", BOP_DATA_DIR=str(data_dir))
    assert (again.exit_code, again.problem["code"]) == (1, "start_refused")

    await cli.server.start()
    assert (await cli("records", "acme/log")).stdout == LINES
    appended = await cli.json("append", "acme/log", input=b"more\n")
    assert appended["first_lsn"] == database["next_lsn"] > 20_000
    assert (await cli("records", "acme/log")).stdout == LINES + b"more\n"


async def test_recover_of_nothing_says_so(tmp_path: Path):
    ran = await run("recover", BOP_DATA_DIR=str(tmp_path / "data"))
    assert (ran.exit_code, ran.stdout) == (0, b"")
    assert "holds no database" in ran.stderr


async def test_demo_verifies_and_leaves_nothing(tmp_path: Path):
    ran = await run("demo", "--size-mib", "2", "--output", "json", TMPDIR=str(tmp_path))
    assert ran.exit_code == 0, ran.stderr
    report = ran.json
    assert report["verified"] is True
    assert len(report["checks"]) == 5
    steps = {one["name"]: one for one in report["steps"]}
    uploads = (steps[name]["bytes"] for name in steps if name.startswith("Checkpoint"))
    log, more_log, database, updates = uploads
    assert log > 2 * 1024 * 1024 > 10 * more_log
    file_bytes = steps["Restore the database to a new file"]["bytes"]
    assert file_bytes == steps["Replicate it"]["bytes"] > 1_900_000
    assert steps["Replicate the updates"]["note"].endswith("WAL frames")
    assert steps["Replicate the updates"]["bytes"] > 20 * updates
    assert database > 20 * updates
    assert left_in(tmp_path) == []
    assert processes_of(tmp_path) == []


async def test_demo_tells_people_too(tmp_path: Path):
    ran = await run("demo", "--size-mib", "1", TMPDIR=str(tmp_path))
    assert ran.exit_code == 0, ran.stderr
    told = ran.stdout.decode()
    assert "Checkpoint only what changed" in told
    assert "Restore the database to a new file" in told
    assert told.count("✓") == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_demo_interrupted_leaves_nothing(tmp_path: Path, number: signal.Signals):
    process = await start("demo", "--size-mib", "512", TMPDIR=str(tmp_path))
    try:
        await wait_until(
            lambda: len(processes_of(tmp_path)) == 2,
            timeout=30,
            describe=lambda: "the demo and its service",
        )
        process.send_signal(number)
        stdout, stderr = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 128 + number
    assert b"Traceback" not in stderr
    assert b"verified" not in stdout
    assert processes_of(tmp_path) == []
    assert left_in(tmp_path) == []


def lose_all_but_remote(data_dir: Path) -> None:
    for path in data_dir.iterdir():
        if path.name != "remote":
            path.unlink() if path.is_file() else shutil.rmtree(path)


def left_in(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def processes_of(place: Path) -> list[int]:
    """The processes whose environment names `place`."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdecimal() and bytes(place) in (process / "environ").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue  # gone, or another user's
    return found


async def test_a_snapshot_a_fork_and_what_restore_makes_of_them(cli: Cli, tmp_path: Path):
    source = tmp_path / "app.db"
    with sqlite3.connect(source) as connection:
        connection.execute("CREATE TABLE t (n)")
        connection.execute("INSERT INTO t VALUES (1)")
    connection.close()

    async def send() -> bytes:
        content = source.read_bytes()
        path = "/tenants/acme/databases/app/image"
        answer = await cli.server.client.put(path, content=content)
        assert answer.status_code == 200, answer.text
        assert (await cli("checkpoint", "acme/app", "--wait")).exit_code == 0
        return content

    await cli.json("databases", "create", "acme/app", "--engine", "libsql")
    before = await send()
    made = await cli.json("snapshots", "create", "acme/app", "before")
    assert (made["name"], made["generation"]) == ("before", 1)
    with sqlite3.connect(source) as connection:
        connection.execute("INSERT INTO t VALUES (2)")
    connection.close()
    after = await send()
    restored = tmp_path / "restored.db"
    ran = await cli("restore", "acme/app", "-o", str(restored), "--snapshot", "before")
    assert ran.exit_code == 0, ran.stderr
    assert restored.read_bytes() == before
    fork = await cli.json("fork", "acme/app", "copy")
    assert fork["forked_from"] == {"tenant": "acme", "database": "app", "generation": 2}
    ran = await cli("restore", "acme/copy", "-o", str(restored), "--force")
    assert ran.exit_code == 0, ran.stderr
    assert restored.read_bytes() == after
    kept = await cli.json("databases", "update", "acme/app", "--minimum-generations", "3")
    assert kept["retention"]["minimum_generations"] == 3
    assert (await cli("snapshots", "delete", "acme/app", "before")).exit_code == 0
    assert (await cli.json("snapshots", "list", "acme/app")) == {"items": []}
