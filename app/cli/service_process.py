"""A service as a child process, for the demo: started, waited for, ended whatever happens.

Invariants: the child never outlives the block that started it. Concurrency: one owner.
Cancellation: the child is told to end and waited for; a second cancellation kills it.
Crash: a child of a killed demo stays; it serves loopback only, from a temporary directory.
"""

import asyncio
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import app
from app.cli.failures import Failure
from app.cli.session import explained
from app.client import BopClient, ClientError, RetryPolicy
from app.core.base.clock import Clock

READY_SECONDS = 60.0
STOP_SECONDS = 40.0
POLL_SECONDS = 0.05
SHOWN_LOG_LINES = 15


@asynccontextmanager
async def running_service(data_dir: Path, *, log: Path, clock: Clock) -> AsyncIterator[BopClient]:
    """A client of a service on `data_dir` that is ready; it has ended, in order, afterwards.
    Raises Failure with the end of its log if it does not get ready or ends badly.
    """
    port = free_port()
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *command("serve"),
            stdin=DEVNULL,
            stdout=output,
            stderr=output,
            env=child_environment({"BOP_DATA_DIR": str(data_dir), "BOP_PORT": str(port)}),
            cwd=code_directory(),
            start_new_session=True,  # Ctrl-C in the terminal reaches us alone; we end the child
        )
        try:
            async with BopClient(f"http://127.0.0.1:{port}") as client:
                await _until_ready(process, f"http://127.0.0.1:{port}", log=log, clock=clock)
                yield client
        except ClientError as error:
            failure = explained(error)
            raise Failure(failure.detail + end_of(log), code=failure.code) from error
        finally:
            exit_code = await _end(process)
    if exit_code not in {0, -signal.SIGTERM}:
        raise Failure(f"The service ended with {exit_code}.{end_of(log)}", code="service_failed")


async def run_to_end(*arguments: str, environment: Mapping[str, str]) -> bytes:
    """The standard output of a command of this program. Raises Failure unless it exits with 0."""
    process = await asyncio.create_subprocess_exec(
        *command(*arguments),
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
        env=child_environment(environment),
        cwd=code_directory(),
        start_new_session=True,
    )
    try:
        output, errors = await process.communicate()
    finally:
        await _end(process)
    if process.returncode != 0:
        raise Failure(
            f"'bop-checkpoint {' '.join(arguments)}' ended with {process.returncode}: "
            f"{errors.decode(errors='replace').strip()}",
            code="command_failed",
        )
    return output


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "app.cli.main", *arguments]


def code_directory() -> Path:
    """Where `-m app.cli.main` finds this very program, wherever the user stands."""
    return Path(app.__path__[0]).parent


def child_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Ours, but the service's settings are these alone: nothing of the user's is touched."""
    inherited = os.environ  # noqa: TID251 - handed on, not read
    kept = {name: value for name, value in inherited.items() if not name.startswith("BOP_")}
    return {**kept, "BOP_CHECKPOINT_INTERVAL_SECONDS": "0", **settings}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def end_of(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LOG_LINES:]
    return "\n".join([" The end of its log:", *lines]) if lines else " It logged nothing."


async def _until_ready(process: Process, url: str, *, log: Path, clock: Clock) -> None:
    reason = "it does not listen yet"
    give_up_at = clock.monotonic() + READY_SECONDS
    async with BopClient(url, retry=RetryPolicy(attempts_max=1)) as client:
        while process.returncode is None and clock.monotonic() < give_up_at:
            try:
                readiness = await client.operations.readiness()
            except ClientError as error:
                reason = str(error)
            else:
                if readiness.ready:
                    return
                reason = "; ".join(readiness.reasons)
            await clock.sleep(POLL_SECONDS)
    why = reason if process.returncode is None else f"it ended with {process.returncode}"
    raise Failure(f"The service did not get ready: {why}.{end_of(log)}", code="service_failed")


async def _end(process: Process) -> int:
    """Asks, waits, and kills at last. Gives the exit code."""
    if process.returncode is None:
        try:
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            pass  # told by the exit code of the kill
        finally:
            if process.returncode is None:
                process.kill()
    return await process.wait()
