"""Collecting 10,000 retired blobs beside a small and beside a large catalogue (ratio of times and
requests): what it costs follows what is retired, not what there is.
"""

import time
from pathlib import Path
from typing import Any

from app.core.base.clock import SystemClock, wall_us
from app.core.base.events import Events
from app.core.reads.read_point import GenerationPins
from app.core.retention.collector import BlobCollector
from app.core.retention.expiry import Expiry
from app.core.stores.manifest.ops import (
    ManifestBatch,
    Op,
    PublishGeneration,
    RestoreDatabase,
    SupersedeChunk,
    UpsertChunk,
)
from app.core.stores.manifest.records import (
    BlobRef,
    ChunkRecord,
    DatabaseRecord,
    GenerationRecord,
)
from app.core.stores.manifest.store import ManifestStore
from benchmarks.report import Result, at_most
from migrations.runner import load_steps

RETIRED = 10_000
SMALL, LARGE = 1_000, 100_000
OPS_AT_ONCE = 5_000
PAGE_SIZE = 4096


class CountingRemote:
    """A store that answers at once: what is measured is how often it is asked."""

    def __init__(self) -> None:
        self.requests = 0

    async def delete_blobs(self, keys: Any) -> list[str]:
        self.requests += 1
        return []

    async def confirm(self) -> None:
        self.requests += 1

    async def forget(self, sha256: str) -> None:
        del sha256


async def collection(work: Path) -> list[Result]:
    small_seconds, small_requests = await _collect(work / "small", beside=SMALL)
    large_seconds, large_requests = await _collect(work / "large", beside=LARGE)
    return [
        at_most(
            f"seconds to collect {RETIRED:,} blobs beside {LARGE:,} rows against 2 × {SMALL:,}",
            measured=large_seconds, limit=2 * small_seconds, unit="s",
        ),
        at_most(
            f"requests to collect {RETIRED:,} blobs beside {LARGE:,} rows against {SMALL:,}",
            measured=large_requests, limit=small_requests, unit="requests",
        ),
    ]  # fmt: skip


async def _collect(path: Path, *, beside: int) -> tuple[float, int]:
    clock, remote = SystemClock(), CountingRemote()
    store = await ManifestStore.open(
        path, clock=clock, events=Events(), process_id="bench", map_bytes=1 << 31,
        max_readers=16, migrations=load_steps(), on_fatal=_raise,
    )  # fmt: skip
    try:
        await _fill(store, beside=beside)
        expiry = Expiry(store, GenerationPins(), events=Events())
        blobs = BlobCollector(
            store,
            lambda: remote,
            remote,
            local=remote,
            events=Events(),
            grace_us=0,  # type: ignore[arg-type, return-value]
        )
        started = time.perf_counter()
        removed = await expiry.expire(1, [1])
        collected = await blobs.collect(wall_us(clock))
        seconds = time.perf_counter() - started
        assert removed.rows == RETIRED
        assert collected.deleted == RETIRED + 1  # with the generation's document
    finally:
        await store.aclose()
    return seconds, remote.requests


async def _fill(store: ManifestStore, *, beside: int) -> None:
    """Two databases: one of `beside` rows, and one whose RETIRED rows were all superseded."""
    for db_id, count in ((1, RETIRED), (2, beside)):
        record = DatabaseRecord(
            db_id=db_id, tenant="bench", name=f"d{db_id}", engine="libsql", page_size=PAGE_SIZE,
            chunk_bytes=1 << 26, compression="none", created_at_us=1,
        )  # fmt: skip
        first: list[Op] = [RestoreDatabase(record=record), _published(db_id, 1, count)]
        first += [UpsertChunk(row=_row(db_id, chunk, 1)) for chunk in range(count)]
        await _commit(store, first)
    second: list[Op] = [_published(1, 2, RETIRED)]
    for chunk in range(RETIRED):
        second.append(SupersedeChunk(db_id=1, chunk_id=chunk, generation=1, superseded_at=2))
        second.append(UpsertChunk(row=_row(1, chunk, 2)))
    await _commit(store, second)


async def _commit(store: ManifestStore, ops: list[Op]) -> None:
    for start in range(0, len(ops), OPS_AT_ONCE):
        part = tuple(ops[start : start + OPS_AT_ONCE])
        await store.commit(ManifestBatch(ops=part, reason="bench", db_id=1))


def _published(db_id: int, generation: int, chunks: int) -> PublishGeneration:
    row = GenerationRecord(
        db_id=db_id, generation=generation, checkpoint_id="bench", first_lsn=1,
        last_lsn=generation, page_count=1, committed_at_us=generation, base_chunks=chunks,
        delta_chunks=0, bytes_uploaded=0, document_key=f"generations/{db_id}/{generation}",
        document_stored=True,
    )  # fmt: skip
    return PublishGeneration(row=row, next_chunk_id=chunks)


def _row(db_id: int, chunk: int, generation: int) -> ChunkRecord:
    key = f"checkpoints/bench/d{db_id}/{generation}/chunk-{chunk}-{generation}-{'0' * 64}.blob"
    return ChunkRecord(
        db_id=db_id, chunk_id=chunk, generation=generation,
        blob=BlobRef(key=key, sha256=bytes(32), crc64=0, bytes=1), first=1, last=1, visible_last=1,
    )  # fmt: skip


def _raise(error: BaseException) -> None:
    raise error
