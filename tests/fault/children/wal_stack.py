"""Manifest and WAL on a data directory, without the rest of the service."""

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from app.core.base.clock import SystemClock
from app.core.base.errors import FatalError
from app.core.base.events import Events
from app.core.formats.record_framing import pack_records, unpack_records
from app.core.formats.segment import ENTRY_HEADER_BYTES, SEGMENT_HEADER_BYTES, iter_entries
from app.core.services.directory import DatabaseDirectory
from app.core.stores.manifest.environment import fsync_path_blocking
from app.core.stores.manifest.ops import CreateDatabase, ManifestBatch
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.wal.log import AppendRequest, MemoryPayload, WalLog
from app.core.stores.wal.store import WalStore
from app.wal_catalog import ManifestSegmentCatalog
from migrations.runner import load_steps
from tests.helpers.ledger import Append, FinalRecord

CHUNK_BYTES = 65536
ENTRY_RECORDS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class WalStack:
    manifest: ManifestStore
    directory: DatabaseDirectory

    async def create_database(self) -> WalLog:
        create = CreateDatabase(
            tenant="acme",
            name="orders",
            engine="append_only",
            page_size=0,
            chunk_bytes=CHUNK_BYTES,
            compression="none",
            created_at_us=1,
        )
        receipt = await self.manifest.commit(ManifestBatch(ops=(create,), reason="test"))
        return await self.directory.open(receipt.results[0])

    def find_log(self) -> WalLog | None:
        with self.manifest.read() as view:
            db_id = view.database_id("acme", "orders")
        return None if db_id is None else self.directory.log(db_id)


def make_directory(path: Path) -> bool:
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True


@asynccontextmanager
async def wal_stack(data_dir: Path) -> AsyncIterator[WalStack]:
    """Raises what ended it, if something did."""
    fatal: list[BaseException] = []
    clock, events = SystemClock(), Events()
    if make_directory(data_dir):
        fsync_path_blocking(data_dir.parent)
    manifest = await ManifestStore.open(
        data_dir / "manifest",
        clock=clock,
        events=events,
        process_id="child",
        map_bytes=64 * 1024 * 1024,
        max_readers=16,
        on_fatal=fatal.append,
        migrations=load_steps(),
    )
    wal = WalStore(
        data_dir / "wal",
        clock=clock,
        events=events,
        catalog=ManifestSegmentCatalog(manifest),
        on_fatal=fatal.append,
    )
    directory = DatabaseDirectory(manifest, wal, events=events)
    try:
        await directory.open_all()
        yield WalStack(manifest=manifest, directory=directory)
    finally:
        with contextlib.suppress(FatalError):
            await wal.aclose()
        await manifest.aclose()
    if fatal:
        raise fatal[0]


def request_of(append: Append, *, keyed: bool) -> AppendRequest:
    """Several entries to a request, so that a torn one is torn between them too."""
    payloads = append.payloads
    entries = []
    for start in range(0, len(payloads), ENTRY_RECORDS):
        part = list(payloads[start : start + ENTRY_RECORDS])
        entries.append(MemoryPayload(payload=pack_records(part), count=len(part), line_safe=True))
    if not keyed:
        return AppendRequest(entries=entries)
    key = blake2b(f"key-{append.ordinal}".encode(), digest_size=16).digest()
    body = blake2b(b"".join(payloads), digest_size=16).digest()
    return AppendRequest(entries=entries, key_hash=key, body_hash=body)


def read_log(log: WalLog) -> list[FinalRecord]:
    found: list[FinalRecord] = []
    with log.pin(1, log.next_lsn) as pin:
        for segment in pin.segments:
            whole = memoryview(segment.path.read_bytes())
            data = whole[SEGMENT_HEADER_BYTES : segment.entries_end]
            for offset, entry in iter_entries(data):
                payload = data[offset + ENTRY_HEADER_BYTES : offset + entry.entry_bytes]
                found += enumerate(unpack_records(payload), start=entry.first_lsn)
    return found
