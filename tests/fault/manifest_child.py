"""A process that writes a manifest until it is killed, told to die, or fails.

`python -m tests.fault.manifest_child PATH COUNT [PLACE NTH]`: makes a database, then publishes
COUNT generations, one batch each, saying `acked N` after every one; at the NTH pass of the
failpoint PLACE it kills itself.
"""

import asyncio
import os
import signal
import sys
from pathlib import Path

from app.core.base import failpoints
from app.core.base.errors import DiskFull, FatalError, StorageFailure
from app.core.stores.manifest import ops
from tests.unit.core.stores.manifest.builders import batch, chunk, create, open_store, publish


def say(text: str) -> None:
    print(text, flush=True)


def die_at(place: str, nth: int) -> None:
    passes = 0

    def hit(name: str) -> None:
        nonlocal passes
        if name == place:
            passes += 1
            if passes == nth:
                os.kill(os.getpid(), signal.SIGKILL)

    failpoints.fp = hit


def generation(db_id: int, number: int) -> ops.ManifestBatch:
    """Four tables at once: a part of it would show."""
    return batch(
        ops.UpsertChunk(row=chunk(db_id, number, number)),
        publish(db_id, number, last_lsn=10 * number, next_chunk_id=number + 1),
        ops.PutMeta(name="marker", value=str(number).encode()),
    )


async def main(path: Path, count: int) -> None:
    fatal: list[FatalError] = []
    store = await open_store(path, on_fatal=fatal.append)
    say("open")
    with store.read() as view:
        db_id = view.database_id("acme", "db")
    if db_id is None:
        db_id = (await store.commit(batch(create()))).results[0]
    for number in range(1, count + 1):
        try:
            await store.commit(generation(db_id, number))
        except StorageFailure:
            say(f"failed {number}")
            continue
        except DiskFull:
            say(f"full {number}")
            break
        say(f"acked {number}")
    say(f"fatal {len(fatal)}")
    await store.aclose()


if __name__ == "__main__":
    if len(sys.argv) > 3:
        die_at(sys.argv[3], int(sys.argv[4]))
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
