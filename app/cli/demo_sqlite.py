"""The demo's SQLite database: replicated while its application has it open, changed a little,
lost with the service's disk, restored, and compared with the application's own file.
"""

import asyncio
import hashlib
import sqlite3
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVarTuple

from app.cli import demo_orders
from app.cli.demo import TENANT, Stage, checkpointed
from app.cli.failures import Failure
from app.cli.units import bytes_text, count_text
from app.client.images import Wanted
from app.core.base.clock import SeededRandomness
from app.replication.events import Event
from app.replication.fleet import Fleet
from app.replication.restore import RestoreFailed, restore
from app.replication.targets import rule_for

if TYPE_CHECKING:
    from app.client import BopClient

Ts = TypeVarTuple("Ts")

DATABASE = "orders"
SEED = 3
UPDATES_MAX = 1000
BYTES_PER_UPDATE = 32 * 1024
"""A smaller database gets fewer updates: scattered, they touch a page each."""


class Application:
    """Has the database open, in a thread of its own."""

    def __init__(self, connection: sqlite3.Connection, thread: ThreadPoolExecutor) -> None:
        self._connection = connection
        self._thread = thread

    async def do(self, function: Callable[[sqlite3.Connection, *Ts], None], *args: *Ts) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, function, self._connection, *args)


@asynccontextmanager
async def application(path: Path) -> AsyncIterator[Application]:
    """The thread has ended afterwards, also where the demo is interrupted: no file is written to a
    directory that goes.
    """
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1, thread_name_prefix="application") as thread:
        connection = await loop.run_in_executor(thread, demo_orders.open_blocking, path)
        try:
            yield Application(connection, thread)
        finally:
            thread.submit(connection.close)


class SqliteDatabase:
    def __init__(self, place: Path, total_bytes: int) -> None:
        self._source = place / "orders.db"
        self._restored = place / "orders-restored.db"
        self._rows = max(1, total_bytes // demo_orders.ROW_BYTES)
        self._updates = min(UPDATES_MAX, total_bytes // BYTES_PER_UPDATE)

    async def fill(self, client: "BopClient", stage: Stage) -> None:
        bits = SeededRandomness(SEED).bits
        async with application(self._source) as writer:
            await self._write(writer, stage, bits)
            await self._replicate(client, stage, "Replicate it")
            await checkpointed(client, stage, "Checkpoint the database", DATABASE)
            with stage.step(f"Update {count_text(self._updates)} rows all over it"):
                await writer.do(demo_orders.update_blocking, bits, self._rows, self._updates)
            await self._replicate(client, stage, "Replicate the updates")
            await checkpointed(client, stage, "Checkpoint the updates", DATABASE)

    async def verify(self, client: "BopClient", stage: Stage) -> None:
        checks = stage.report.checks
        sound = "PRAGMA integrity_check of the restored database says ok"
        same = "the restored file is the application's, byte for byte"
        with stage.step("Restore the database to a new file") as (step, meter):
            try:
                restored = await restore(
                    client,
                    Wanted(tenant=TENANT, database=DATABASE),
                    self._restored,
                    check="full",
                    progress=lambda done, total: meter(step.name, done, total),
                )
            except RestoreFailed as failure:
                step.note = str(failure)
                checks[sound] = checks[same] = False
                return
            step.bytes = restored.bytes
            step.note = f"{count_text(restored.page_count)} pages, integrity_check included"
        checks[sound] = True
        # closing the last connection put the log into the file: the file is the whole database
        digests = [
            await asyncio.to_thread(_sha256_blocking, path)
            for path in (self._source, self._restored)
        ]
        checks[f"{same}: SHA-256 {digests[1][:16]}…"] = digests[0] == digests[1]

    async def _write(self, writer: Application, stage: Stage, bits: demo_orders.Bits) -> None:
        with stage.step("Write a SQLite database") as (step, meter):
            for first in range(1, self._rows + 1, demo_orders.ROWS_PER_COMMIT):
                stop = min(self._rows + 1, first + demo_orders.ROWS_PER_COMMIT)
                await writer.do(demo_orders.insert_blocking, bits, first, stop)
                meter(step.name, stop, self._rows)
            await writer.do(demo_orders.settle_blocking)
            step.bytes = self._source.stat().st_size
            step.note = f"{count_text(self._rows)} rows, {bytes_text(step.bytes)}, WAL mode"

    async def _replicate(self, client: "BopClient", stage: Stage, name: str) -> None:
        """As `replicate --once` does it: all that is committed, beside the open application."""
        told: list[Event] = []
        rules = [rule_for(self._source, f"{TENANT}/{DATABASE}")]
        with stage.step(name) as (step, _):
            fleet = Fleet(rules, client, tell=told.append)
            await fleet.run(once=True)
            (status,) = fleet.statuses.values()
            if status.refusal is not None:
                raise Failure(status.refusal, code=status.refusal_code or "refused")
            image_bytes = _sum_of(told, "image_sending", "bytes")
            frames = _sum_of(told, "wal_sent", "frames")
            step.bytes = image_bytes + status.sent_bytes
            step.note = f"{count_text(frames)} WAL frames" if frames else "its image"


def _sum_of(told: list[Event], kind: str, member: str) -> int:
    return sum(int(event.members[member] or 0) for event in told if event.event == kind)


def _sha256_blocking(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
