"""The demo's record log: an access log appended, checkpointed, lost and read back."""

import hashlib
from typing import TYPE_CHECKING

from app.cli.demo import TENANT, Stage, checkpointed
from app.cli.demo_log import LogBatch, iter_log
from app.cli.units import bytes_text, count_text
from app.client.records import LINES

if TYPE_CHECKING:
    from app.client import BopClient

DATABASE = "access-log"
SEED = 1
BATCH_BYTES = 4 * 1024 * 1024
CHANGE_BYTES = 64 * 1024


class RecordLog:
    def __init__(self, log_bytes: int) -> None:
        self._log_bytes = log_bytes
        self._sent = hashlib.sha256()
        self._sent_count = 0

    async def fill(self, client: "BopClient", stage: Stage) -> None:
        await client.databases.create(TENANT, DATABASE, engine="append_only")
        await self._append(client, stage, "Append an access log", SEED, self._log_bytes)
        await checkpointed(client, stage, "Checkpoint it", DATABASE)
        await self._append(client, stage, "Append a little more", SEED + 1, CHANGE_BYTES)
        await checkpointed(client, stage, "Checkpoint only what changed", DATABASE)

    async def verify(self, client: "BopClient", stage: Stage) -> None:
        read = hashlib.sha256()
        count = 0
        gapless = True
        with stage.step("Read everything back") as (step, meter):
            step.bytes = 0
            async for batch in client.records.iter_batches(TENANT, DATABASE):
                lines = b"\n".join([*batch.records, b""])
                read.update(lines)
                gapless &= batch.first_lsn == count + 1
                count += len(batch.records)
                step.bytes += len(lines)
                meter(step.name, step.bytes, self._log_bytes + CHANGE_BYTES)
            step.note = f"{count_text(count)} records"
        checks = stage.report.checks
        checks[f"{count_text(count)} of {count_text(self._sent_count)} records came back"] = (
            count == self._sent_count
        )
        checks["every LSN from 1 on is there, once"] = gapless
        checks[f"SHA-256 of the log is the same: {read.hexdigest()[:16]}…"] = (
            read.digest() == self._sent.digest()
        )

    async def _append(
        self, client: "BopClient", stage: Stage, name: str, seed: int, total_bytes: int
    ) -> None:
        with stage.step(name) as (step, meter):
            step.bytes = count = 0
            batch: LogBatch
            for batch in iter_log(seed=seed, total_bytes=total_bytes, batch_bytes=BATCH_BYTES):
                await client.records.append(TENANT, DATABASE, batch.body, media_type=LINES)
                self._sent.update(batch.body)
                self._sent_count += batch.count
                count += batch.count
                step.bytes += len(batch.body)
                meter(name, step.bytes, total_bytes)
            step.note = f"{count_text(count)} records, {bytes_text(step.bytes)}"
