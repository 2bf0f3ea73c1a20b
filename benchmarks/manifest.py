"""Manifest batches per second: group commit at 64 submitters against one."""

import asyncio
import time
from pathlib import Path

from app.core.base.clock import SystemClock
from app.core.base.events import Events
from app.core.stores.manifest.ops import ManifestBatch, PutMeta
from app.core.stores.manifest.store import ManifestStore
from benchmarks.report import Result, at_least
from migrations.runner import load_steps


async def batches(work: Path, *, seconds: float = 3.0) -> Result:
    store = await ManifestStore.open(
        work / "manifest", clock=SystemClock(), events=Events(), process_id="bench",
        map_bytes=1 << 30, max_readers=16, migrations=load_steps(), on_fatal=_raise,
    )  # fmt: skip
    try:
        one = await _rate(store, submitters=1, seconds=seconds)
        many = await _rate(store, submitters=64, seconds=seconds)
    finally:
        await store.aclose()
    return at_least(
        "manifest batches at 64 submitters ÷ one submitter",
        measured=many, ceiling=one, unit="batches/s", target=6.0,
    )  # fmt: skip


async def _rate(store: ManifestStore, *, submitters: int, seconds: float) -> float:
    until = time.perf_counter() + seconds
    count = 0

    async def submit(number: int) -> None:
        nonlocal count
        turn = 0
        while time.perf_counter() < until:
            turn += 1
            value = turn.to_bytes(8, "big")
            await store.commit(
                ManifestBatch(ops=(PutMeta(name=f"bench-{number}", value=value),), reason="bench")
            )
            count += 1

    started = time.perf_counter()
    await asyncio.gather(*(submit(number) for number in range(submitters)))
    return count / (time.perf_counter() - started)


def _raise(error: BaseException) -> None:
    raise error
