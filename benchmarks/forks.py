"""The time of a fork: of a database of 10,000 chunks against one of 10, both engines, and of a fork
of a fork. The chunks are rows without blobs behind them: a fork reads none.
"""

import hashlib
import time
from pathlib import Path
from statistics import median

from app.core.base.clock import SystemClock
from app.core.base.events import Events
from app.core.checkpoint.history_objects import HistoryObjects
from app.core.services.directory import DatabaseDirectory
from app.core.services.forks import Forks
from app.core.stores.manifest.ops import (
    CreateDatabase,
    ManifestBatch,
    PublishGeneration,
    UpsertChunk,
)
from app.core.stores.manifest.records import BlobRef, ChunkRecord, Engine, GenerationRecord
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.wal.store import WalStore
from app.core.workers.history_upload import HistoryUpload
from app.wal_catalog import ManifestSegmentCatalog
from benchmarks.report import Result, at_most
from migrations.runner import load_steps

SMALL, LARGE = 10, 10_000
RATIO_MAX = 3.0
FORKS = 30
PER_CHUNK = 1000


async def forks(work: Path) -> list[Result]:
    clock, events = SystemClock(), Events()
    manifest = await ManifestStore.open(
        work / "forks-manifest", clock=clock, events=events, process_id="bench",
        map_bytes=1 << 30, max_readers=16, migrations=load_steps(), on_fatal=_raise,
    )  # fmt: skip
    wal = WalStore(
        work / "forks-wal", clock=clock, events=events,
        catalog=ManifestSegmentCatalog(manifest), on_fatal=_raise,
    )  # fmt: skip
    directory = DatabaseDirectory(manifest, wal, events=events)
    objects = HistoryObjects(
        manifest=manifest, remote=_no_remote, on_durable=lambda _: None, events=events
    )
    upload = HistoryUpload(objects, ready=_ready, clock=clock, events=events)
    service = Forks(manifest, directory, upload, clock=clock, events=events)
    try:
        results = []
        for engine in ("libsql", "append_only"):
            for chunks in (SMALL, LARGE):
                await _parent(manifest, f"{engine[:3]}-{chunks}", engine, chunks)
            results.append(await _compare(service, engine, f"{engine[:3]}-{{}}"))
        for chunks in (SMALL, LARGE):
            await service.create(
                "bench", f"app-{chunks}", fork_tenant="bench", fork_database=f"child-{chunks}"
            )
        results.append(await _compare(service, "fork of a fork", "child-{}"))
        return results
    finally:
        await wal.aclose()
        await manifest.aclose()


async def _compare(service: Forks, what: str, names: str) -> Result:
    """The medians of forks made in turn."""
    seconds: dict[int, list[float]] = {SMALL: [], LARGE: []}
    for number in range(FORKS):
        for chunks, taken in seconds.items():
            parent = names.format(chunks)
            started = time.perf_counter()
            await service.create(
                "bench", parent, fork_tenant="bench", fork_database=f"{parent}-{number}"
            )
            taken.append(time.perf_counter() - started)
    small, large = median(seconds[SMALL]), median(seconds[LARGE])
    return at_most(
        f"fork, {what}: {LARGE:,} chunks, against {RATIO_MAX:.0f} × {SMALL} chunks",
        measured=large * 1000, limit=small * RATIO_MAX * 1000, unit="ms",
    )  # fmt: skip


async def _parent(manifest: ManifestStore, name: str, engine: Engine, chunks: int) -> None:
    receipt = await manifest.commit(
        ManifestBatch(
            ops=(
                CreateDatabase(
                    tenant="bench", name=name, engine=engine, chunk_bytes=1 << 26,
                    page_size=4096 if engine == "libsql" else 0, compression="none",
                    created_at_us=1,
                ),
            ),
            reason="bench",
        )
    )  # fmt: skip
    db_id: int = receipt.results[0]
    rows = [UpsertChunk(row=_chunk(db_id, chunk_id)) for chunk_id in range(chunks)]
    generation = GenerationRecord(
        db_id=db_id, generation=1, checkpoint_id="bench", first_lsn=1,
        last_lsn=chunks * PER_CHUNK, page_count=chunks * PER_CHUNK, committed_at_us=1,
        base_chunks=chunks, delta_chunks=0, bytes_uploaded=0, document_key="bench",
        document_stored=True,
    )  # fmt: skip
    publish = PublishGeneration(row=generation, next_chunk_id=chunks)
    await manifest.commit(ManifestBatch(ops=(*rows, publish), reason="bench"))


def _chunk(db_id: int, chunk_id: int) -> ChunkRecord:
    key = f"checkpoints/bench/{db_id}/chunk-{chunk_id}"
    first = chunk_id * PER_CHUNK + 1
    return ChunkRecord(
        db_id=db_id, chunk_id=chunk_id, generation=1, first=first, last=first + PER_CHUNK - 1,
        visible_last=first + PER_CHUNK - 1,
        blob=BlobRef(key=key, sha256=hashlib.sha256(key.encode()).digest(), crc64=1, bytes=1),
    )  # fmt: skip


def _no_remote():
    raise RuntimeError("a fork writes nothing to the remote store")


async def _ready() -> None:
    pass


def _raise(error: BaseException) -> None:
    raise error
