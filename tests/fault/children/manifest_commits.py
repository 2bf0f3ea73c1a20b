"""Commits to a manifest, some alone and some together, and notes each try and each receipt.

The first argument names the protection to take away.
"""

import asyncio
import sys

from app.core.base.clock import SystemClock
from app.core.base.events import Events
from app.core.stores.manifest.ops import CreateDatabase, ManifestBatch, PutMeta
from app.core.stores.manifest.store import ManifestStore
from migrations.runner import load_steps
from tests.fault.children.notes import ROOT, note
from tests.fault.children.protections import take_away

ALONE, TOGETHER, GROUPS = 8, 6, 4
FILLER_BYTES = 6000  # a value beyond a page, so that commits write overflow pages too


async def commit(store: ManifestStore, name: str) -> None:
    create = CreateDatabase(
        tenant="acme",
        name=name,
        engine="append_only",
        page_size=0,
        chunk_bytes=65536,
        compression="none",
        created_at_us=1,
    )
    filler = PutMeta(name=f"filler/{name}", value=name.encode() * (FILLER_BYTES // len(name)))
    note(trying=name)
    receipt = await store.commit(ManifestBatch(ops=(create, filler), reason="test"))
    note(committed=name, sequence=receipt.sequence)


async def main() -> None:
    store = await ManifestStore.open(
        ROOT / "manifest",
        clock=SystemClock(),
        events=Events(),
        process_id="child",
        map_bytes=64 * 1024 * 1024,
        max_readers=16,
        on_fatal=lambda failure: sys.exit(str(failure)),
        migrations=load_steps(),
    )
    note(opened=store.node_id)
    for number in range(ALONE):
        await commit(store, f"alone-{number}")
    for group in range(GROUPS):
        async with asyncio.TaskGroup() as tasks:
            for number in range(TOGETHER):
                tasks.create_task(commit(store, f"group-{group}-{number}"))
    await store.aclose()


take_away(sys.argv[1])
asyncio.run(main())
