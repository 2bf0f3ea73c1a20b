"""Rows and batches with sensible defaults, and a clock that only moves when told."""

import hashlib
from collections.abc import Sequence
from typing import Any

from app.core.base.events import Events
from app.core.stores.manifest import conditions, ops
from app.core.stores.manifest.records import (
    BlobRef,
    ChunkDeltaRecord,
    ChunkRecord,
    DatabaseRecord,
    GenerationRecord,
    JobRecord,
    LeaseRecord,
    WalSegmentRecord,
)
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.manifest.view import ManifestView
from migrations.runner import load_steps

MIB = 1024 * 1024
PROCESS = "process-1"


class FakeClock:
    def __init__(self) -> None:
        self.wall_seconds = 1_700_000_000.0
        self.monotonic_seconds = 1000.0

    def wall_ns(self) -> int:
        return int(self.wall_seconds * 1_000_000_000)

    def monotonic(self) -> float:
        return self.monotonic_seconds

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("the manifest does not sleep")


def batch(
    *operations: ops.Op,
    expect: Sequence[conditions.Precondition] = (),
    reason: str = "test",
    db_id: int = 0,
) -> ops.ManifestBatch:
    return ops.ManifestBatch(
        ops=operations, preconditions=tuple(expect), reason=reason, db_id=db_id
    )


def create(name: str = "db", tenant: str = "acme", engine: str = "libsql") -> ops.CreateDatabase:
    return ops.CreateDatabase(
        tenant=tenant,
        name=name,
        engine=engine,
        page_size=4096 if engine == "libsql" else 0,
        chunk_bytes=64 * MIB,
        compression="none",
        created_at_us=1,
    )


def descriptor(db_id: int, name: str = "restored", **fields: Any) -> DatabaseRecord:
    return DatabaseRecord(
        db_id=db_id,
        tenant="acme",
        name=name,
        engine="libsql",
        page_size=4096,
        chunk_bytes=64 * MIB,
        compression="none",
        created_at_us=1,
        **fields,
    )


def blob(key: str) -> BlobRef:
    return BlobRef(key=key, sha256=hashlib.sha256(key.encode()).digest(), crc64=7, bytes=100)


def chunk(db_id: int, chunk_id: int = 0, generation: int = 1, **fields: Any) -> ChunkRecord:
    values: dict[str, Any] = {
        "blob": blob(f"base-{db_id}-{chunk_id}-{generation}"),
        "first": 1,
        "last": 10,
        "visible_last": 10,
    }
    return ChunkRecord(db_id=db_id, chunk_id=chunk_id, generation=generation, **values | fields)


def delta(db_id: int, chunk_id: int = 0, generation: int = 2, **fields: Any) -> ChunkDeltaRecord:
    values: dict[str, Any] = {
        "delta_id": generation,
        "blob": blob(f"delta-{db_id}-{chunk_id}-{generation}"),
        "base_key": "",
        "pages": b"\x01",
    }
    return ChunkDeltaRecord(
        db_id=db_id, chunk_id=chunk_id, generation=generation, **values | fields
    )


def publish(
    db_id: int, generation: int = 1, *, last_lsn: int = 10, next_chunk_id: int = 1, **fields: Any
) -> ops.PublishGeneration:
    values: dict[str, Any] = {
        "checkpoint_id": f"checkpoint-{generation}",
        "first_lsn": 1,
        "last_lsn": last_lsn,
        "page_count": 10 * generation,
        "committed_at_us": 1_000_000 + generation,
        "base_chunks": 1,
        "delta_chunks": 0,
        "bytes_uploaded": 100,
        "document_key": f"generations/{generation}",
    }
    return ops.PublishGeneration(
        row=GenerationRecord(db_id=db_id, generation=generation, **values | fields),
        next_chunk_id=next_chunk_id,
    )


def segment(db_id: int, segment_id: int = 1, **fields: Any) -> WalSegmentRecord:
    values: dict[str, Any] = {"first_lsn": 1, "ceiling_lsn": 1000}
    return WalSegmentRecord(db_id=db_id, segment_id=segment_id, **values | fields)


def job(job_id: str = "J1", db_id: int = 1, **fields: Any) -> JobRecord:
    values: dict[str, Any] = {
        "kind": "create_checkpoint",
        "tenant": "acme",
        "database": "db",
        "created_at_us": 1,
    }
    return JobRecord(job_id=job_id, db_id=db_id, **values | fields)


def retire(key: str, *, eligible_at_us: int = 5) -> ops.RetireBlob:
    return ops.RetireBlob(blob=blob(key), db_id=1, eligible_at_us=eligible_at_us, reason="test")


def leases_of(view: ManifestView, job_id: str) -> list[LeaseRecord]:
    return [held for held in view.leases() if held.job_id == job_id]


def lease(job_id: str = "J1", chunk_id: int = 0, ttl_seconds: float = 60.0) -> ops.AcquireLease:
    return ops.AcquireLease(
        db_id=1, chunk_id=chunk_id, generation=1, job_id=job_id, ttl_seconds=ttl_seconds
    )


async def open_store(path: Any, **options: Any) -> ManifestStore:
    defaults: dict[str, Any] = {
        "clock": FakeClock(),
        "events": Events(),
        "process_id": PROCESS,
        "map_bytes": 64 * MIB,
        "max_readers": 16,
        "on_fatal": lambda failure: None,
        "migrations": load_steps(),
    }
    return await ManifestStore.open(path, **defaults | options)


async def create_database(store: ManifestStore, **fields: Any) -> int:
    receipt = await store.commit(batch(create(**fields)))
    db_id: int = receipt.results[0]
    return db_id
