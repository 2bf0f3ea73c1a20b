"""`demo`: the whole promise in a minute, on a real service, real files and a real loss.

Fill, checkpoint, change a little, checkpoint again, lose everything but the remote store, recover,
read it all back and compare. Each part of the demo (a kind of database) fills before the loss and
verifies after it; the loss is shared.
"""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Protocol

import typer

from app.cli.failures import FAILED, Failure
from app.cli.screen import Column, Meter, Screen
from app.cli.session import explained, session_of
from app.cli.units import bytes_text, rate_text, seconds_text
from app.core.base.clock import Clock

if TYPE_CHECKING:
    from app.client import BopClient
    from app.client.wire import Job

MIB = 1024 * 1024
TENANT = "demo"
BLOCK_BYTES = 512  # of st_blocks, whatever the file system's own are


def demo(
    context: typer.Context,
    size_mib: Annotated[
        int, typer.Option("--size-mib", min=1, max=4096, help="How much of each kind is written.")
    ] = 64,
) -> None:
    """Start a service, checkpoint real data, lose the disk, recover, verify. Leaves nothing."""
    session = session_of(context)
    report = asyncio.run(until_signalled(session.screen, session.clock, size_mib * MIB))
    show_report(session.screen, report)
    if not report.verified:
        raise typer.Exit(FAILED)


@dataclass(slots=True)
class Step:
    """What a step did; filled in while it runs."""

    name: str
    bytes: int | None = None
    note: str = ""
    seconds: float = 0.0


@dataclass(slots=True)
class Report:
    steps: list[Step] = field(default_factory=list)
    checks: dict[str, bool] = field(default_factory=dict)

    @property
    def verified(self) -> bool:
        return bool(self.checks) and all(self.checks.values())


class Stage:
    """Where the parts play: times each step, shows it, keeps it for the report."""

    def __init__(self, screen: Screen, clock: Clock) -> None:
        self.report = Report()
        self._screen = screen
        self.clock = clock

    @contextmanager
    def step(self, name: str) -> Iterator[tuple[Step, Meter]]:
        step = Step(name)
        began = self.clock.monotonic()
        with self._screen.meter() as meter:
            meter(name, 0, None)
            yield step, meter
        step.seconds = self.clock.monotonic() - began
        self.report.steps.append(step)
        told = f"{name}: {step.note}" if step.note else name
        self._screen.note(f"  {told} ({seconds_text(step.seconds)})")


class Part(Protocol):
    """One kind of database in the demo."""

    async def fill(self, client: "BopClient", stage: Stage) -> None: ...

    async def verify(self, client: "BopClient", stage: Stage) -> None:
        """Puts its checks into the report; a mismatch is no exception."""
        ...


async def run_demo(screen: Screen, clock: Clock, part_bytes: int) -> Report:
    from app.cli.demo_records import RecordLog  # noqa: PLC0415 - brings the client
    from app.cli.demo_sqlite import SqliteDatabase  # noqa: PLC0415 - as above

    stage = Stage(screen, clock)
    with TemporaryDirectory(prefix="bop-demo-") as place:
        parts: list[Part] = [RecordLog(part_bytes), SqliteDatabase(Path(place), part_bytes)]
        data_dir, log = Path(place, "data"), Path(place, "service.log")
        screen.note(f"Data directory {data_dir}, remote store {data_dir / 'remote'}.")
        async with served("Start the service", data_dir, log, stage) as client:
            for part in parts:
                await part.fill(client, stage)
        lose_disk(data_dir, stage)
        await recover(data_dir, stage)
        async with served("Serve what was recovered", data_dir, log, stage) as client:
            for part in parts:
                await part.verify(client, stage)
    return stage.report


@asynccontextmanager
async def served(name: str, data_dir: Path, log: Path, stage: Stage) -> "AsyncIterator[BopClient]":
    from app.cli.service_process import running_service  # noqa: PLC0415 - brings the client

    async with AsyncExitStack() as stack:
        with stage.step(name):
            service = running_service(data_dir, log=log, clock=stage.clock)
            client = await stack.enter_async_context(service)
        yield client


async def checkpointed(client: "BopClient", stage: Stage, name: str, database: str) -> "Job":
    """Checkpoints the database and waits, as a step. Raises Failure unless it completes."""
    with stage.step(name) as (step, meter):
        job = await client.checkpoints.trigger(TENANT, database, reason="demo")
        async for seen in client.checkpoints.watch(job.id):
            job = seen
            meter(name, job.progress.uploaded_bytes, job.progress.total_bytes or None)
        if job.state != "completed" or job.result is None:
            raise Failure(f"The checkpoint ended as {job.state}: {job.error}", code=job.state)
        step.bytes = job.result["bytes_uploaded"]
        step.note = f"generation {job.result['generation']}, {bytes_text(step.bytes)} uploaded"
    return job


def lose_disk(data_dir: Path, stage: Stage) -> None:
    """Everything of the data directory goes, but the remote store."""
    with stage.step("Lose the disk") as (step, _):
        lost = sorted(path for path in data_dir.iterdir() if path.name != "remote")
        files = (file for path in lost for file in (path, *path.rglob("*")) if file.is_file())
        used = {stat.st_ino: stat.st_blocks for stat in map(Path.stat, files)}
        step.bytes = sum(used.values()) * BLOCK_BYTES  # links once, and no holes
        for path in lost:
            path.unlink() if path.is_file() else rmtree(path)
        step.note = f"deleted {', '.join(path.name for path in lost)}"


async def recover(data_dir: Path, stage: Stage) -> None:
    from app.cli.service_process import run_to_end  # noqa: PLC0415 - brings the client

    with stage.step("Recover from the remote store alone") as (step, _):
        output = await run_to_end(
            "--output", "json", "recover", environment={"BOP_DATA_DIR": str(data_dir)}
        )
        databases = json.loads(output)["databases"]
        generations = sum(database["generations"] for database in databases)
        step.note = f"databases {len(databases)}, generations {generations}"


async def until_signalled(screen: Screen, clock: Clock, part_bytes: int) -> Report:
    """The demo, ended in order by SIGTERM and SIGHUP as by Ctrl-C: no process is left behind."""
    from app.client import ClientError  # noqa: PLC0415 - brings httpx

    loop, this = asyncio.get_running_loop(), asyncio.current_task()
    assert this is not None
    signalled: list[signal.Signals] = []

    def end(number: signal.Signals) -> None:
        signalled.append(number)
        this.cancel()

    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, end, number)
    try:
        return await run_demo(screen, clock, part_bytes)
    except ClientError as error:
        raise explained(error) from error
    except asyncio.CancelledError:
        if signalled:
            raise typer.Exit(128 + signalled[0]) from None
        raise


def show_report(screen: Screen, report: Report) -> None:
    if screen.as_json:
        screen.document(
            {"steps": report.steps, "checks": report.checks, "verified": report.verified}
        )
        return
    screen.text("")
    screen.table(
        [
            Column(name="STEP"),
            Column(name="SIZE", right=True),
            Column(name="TIME", right=True),
            Column(name="RATE", right=True),
        ],
        [
            [
                step.name,
                "-" if step.bytes is None else bytes_text(step.bytes),
                seconds_text(step.seconds),
                "-" if step.bytes is None else rate_text(step.bytes, step.seconds),
            ]
            for step in report.steps
        ],
        empty="Nothing was done.",
    )
    screen.text("")
    for check, holds in report.checks.items():
        screen.text(f"{'[green]✓[/]' if holds else '[bold red]✗[/]'} {check}")
