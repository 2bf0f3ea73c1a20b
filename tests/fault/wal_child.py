"""A process that appends to a log, over a real manifest, until it is killed, told to die, or fails.

`python -m tests.fault.wal_child ROOT COUNT [PLACE NTH]`: COUNT appends to one database, saying
`acked FIRST LAST` after every one and `failed CODE` where one was refused; at the NTH pass of the
failpoint PLACE it kills itself. Record contents follow from their LSNs. One writer thread, so that
strace can count its calls.
"""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from app.core.base import failpoints
from app.core.base.clock import SystemClock
from app.core.base.errors import BopError, StorageFailure
from app.core.base.events import Events
from app.core.formats.segment import EngineCode
from app.core.stores.manifest import ops
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.wal.log import CatalogSegment, LogConfig, WalLog
from app.core.stores.wal.store import WalStore
from app.wal_catalog import ManifestSegmentCatalog
from tests.unit.core.stores.manifest.builders import batch, create, open_store
from tests.unit.core.stores.wal.builders import request

CHUNK = int(os.environ.get("WAL_CHILD_CHUNK_BYTES", "600"))
DRAFTS = "WAL_CHILD_DRAFTS" in os.environ
"""Appends that begin a segment are written before they are flushed."""


def say(text: str) -> None:
    print(text, flush=True)


def record(lsn: int) -> bytes:
    return b"record %d;" % lsn * (1 + lsn % 7)


def die_at(place: str, nth: int) -> None:
    passes = 0

    def hit(name: str) -> None:
        nonlocal passes
        if name == place:
            passes += 1
            if passes == nth:
                os.kill(os.getpid(), signal.SIGKILL)

    failpoints.fp = hit


@asynccontextmanager
async def opened(
    root: Path, fatal: list[BaseException]
) -> AsyncIterator[tuple[ManifestStore, WalLog]]:
    manifest = await open_store(root / "manifest")
    try:
        with manifest.read() as view:
            db_id = view.database_id("acme", "db")
        if db_id is None:
            made = await manifest.commit(batch(create(engine="append_only")))
            db_id = made.results[0]
        with manifest.read() as view:
            rows = view.segments(db_id)
        wal = WalStore(
            root / "wal", clock=SystemClock(), events=Events(),
            catalog=ManifestSegmentCatalog(manifest), on_fatal=fatal.append, threads=1,
        )  # fmt: skip
        try:
            yield manifest, await wal.open_log(
                LogConfig(
                    db_id=db_id, engine=EngineCode.APPEND_ONLY, chunk_bytes=CHUNK, floor_lsn=1,
                    has_lived=bool(rows),
                ),
                [
                    CatalogSegment(
                        segment_id=row.segment_id, first_lsn=row.first_lsn,
                        ceiling_lsn=row.ceiling_lsn, state=row.state, last_lsn=row.last_lsn,
                    )
                    for row in rows
                ],
            )  # fmt: skip
        finally:
            await wal.aclose()
    finally:
        await manifest.aclose()


async def append(log: WalLog, count: int) -> None:
    first = log.next_lsn
    made = request(*(record(lsn) for lsn in range(first, first + count)), per_entry=1)
    try:
        draft = await log.draft(made) if DRAFTS else None
        if draft is not None:
            draft.write_blocking(count)
            draft.sync_blocking()
        done = await log.append(made, draft=draft)
    except BopError as error:
        say(f"failed {error.code}")
    except StorageFailure:
        say("failed storage")
    else:
        say(f"acked {done.first_lsn} {done.last_lsn}")


async def release_oldest(manifest: ManifestStore, log: WalLog) -> None:
    oldest = log.sealed_segments()[0]
    covered = ops.CoverSegment(db_id=log.db_id, segment_id=oldest.segment_id, generation=1)
    await manifest.commit(batch(covered, db_id=log.db_id))
    say(f"released {oldest.last_lsn}")
    (removed,) = await log.remove([oldest.segment_id])
    await manifest.commit(
        batch(ops.RemoveSegment(db_id=log.db_id, segment_id=removed), db_id=log.db_id)
    )


async def main(root: Path, count: int) -> None:
    fatal: list[BaseException] = []
    async with opened(root, fatal) as (manifest, log):
        say("open")
        for number in range(count):
            await append(log, 1 + number % 5)
            if number % 7 == 6 and not fatal:
                await log.seal()
                await release_oldest(manifest, log)
    say(f"fatal {len(fatal)}")


if __name__ == "__main__":
    if len(sys.argv) > 3:
        die_at(sys.argv[3], int(sys.argv[4]))
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
