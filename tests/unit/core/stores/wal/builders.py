"""Logs on real files, with a catalogue in memory that refuses what the manifest would refuse."""

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from app.core.base.clock import Clock
from app.core.base.errors import BopError
from app.core.base.events import Events
from app.core.formats.record_framing import pack_records, unpack_records
from app.core.formats.segment import SEGMENT_HEADER_BYTES, EngineCode, EntryType, iter_entries
from app.core.stores.wal.disk import Disk
from app.core.stores.wal.log import (
    Appended,
    AppendRequest,
    CatalogSegment,
    LogConfig,
    MemoryPayload,
    NewSegment,
    RememberedAppend,
    SegmentInfo,
    WalLog,
)
from app.core.stores.wal.store import WalStore
from tests.helpers.fake_clock import FakeClock

DB = 7
CHUNK = 4096


@dataclass
class Catalog:
    """The manifest's rules for rows of wal_catalog."""

    rows: dict[int, dict[int, CatalogSegment]] = field(default_factory=dict)
    refusals: list[BopError] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    on_commit: Callable[["Catalog"], None] = lambda _: None

    def register_blocking(self, *, db_id: int, segments: Sequence[NewSegment]) -> None:
        with self.lock:
            self._refuse()
            rows = self.rows.setdefault(db_id, {})
            for new in segments:
                known = rows.get(new.segment_id)
                if known is not None:
                    assert known.state == "open"
                    assert known.first_lsn == new.first_lsn
                    assert known.ceiling_lsn <= new.ceiling_lsn
                rows[new.segment_id] = CatalogSegment(
                    segment_id=new.segment_id, first_lsn=new.first_lsn,
                    ceiling_lsn=new.ceiling_lsn, state="open", last_lsn=0,
                )  # fmt: skip
            self.on_commit(self)

    def seal_blocking(self, info: SegmentInfo) -> None:
        with self.lock:
            self._refuse()
            row = self.rows[info.db_id][info.segment_id]
            assert row.first_lsn <= info.last_lsn < row.ceiling_lsn
            if row.state != "open":
                assert row.last_lsn == info.last_lsn
                return
            sealed = replace(row, state="sealed", last_lsn=info.last_lsn)
            self.rows[info.db_id][info.segment_id] = sealed
            self.on_commit(self)

    def checkpoint(self, segment_id: int, db_id: int = DB) -> None:
        row = self.rows[db_id][segment_id]
        assert row.state == "sealed"
        self.rows[db_id][segment_id] = replace(row, state="checkpointed")

    def of(self, db_id: int = DB) -> tuple[CatalogSegment, ...]:
        return tuple(row for _, row in sorted(self.rows.get(db_id, {}).items()))

    def copy(self) -> "Catalog":
        return Catalog(rows={db_id: dict(rows) for db_id, rows in self.rows.items()})

    def _refuse(self) -> None:
        if self.refusals:
            raise self.refusals.pop(0)


class EventLog:
    def __init__(self) -> None:
        self.seen: list[tuple[str, Mapping[str, object]]] = []
        self.events = Events(lambda name, _, fields: self.seen.append((name, fields)))

    def names(self) -> list[str]:
        return [name for name, _ in self.seen]

    def fields(self, name: str) -> list[Mapping[str, object]]:
        return [fields for seen, fields in self.seen if seen == name]


@dataclass
class Place:
    """A data directory that outlives the stores opened on it."""

    root: Path
    catalog: Catalog = field(default_factory=Catalog)
    clock: FakeClock | Clock = field(default_factory=FakeClock)
    log_of_events: EventLog = field(default_factory=EventLog)
    fatal: list[BaseException] = field(default_factory=list)
    disk: Disk | None = None
    threads: int = 2

    @asynccontextmanager
    async def store(self) -> AsyncIterator[WalStore]:
        store = WalStore(
            self.root, clock=self.clock, events=self.log_of_events.events, catalog=self.catalog,
            on_fatal=self.fatal.append, threads=self.threads, disk=self.disk,
        )  # fmt: skip
        try:
            yield store
        finally:
            await store.aclose()

    @asynccontextmanager
    async def log(
        self,
        *,
        chunk_bytes: int = CHUNK,
        floor_lsn: int = 1,
        remembered: Sequence[RememberedAppend] = (),
        has_lived: bool = False,
    ) -> AsyncIterator[WalLog]:
        async with self.store() as store:
            yield await store.open_log(
                config(
                    chunk_bytes=chunk_bytes,
                    floor_lsn=floor_lsn,
                    remembered=remembered,
                    has_lived=has_lived,
                ),
                self.catalog.of(),
            )

    def files(self, db_id: int = DB) -> list[Path]:
        return sorted((self.root / str(db_id)).glob("*"))

    def copy_to(self, root: Path) -> "Place":
        shutil.copytree(self.root, root)
        return Place(root=root, catalog=self.catalog.copy())


class Hold:
    """Keeps a writer thread at a failpoint until released."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._reached = threading.Event()
        self._released = threading.Event()

    def __call__(self, name: str) -> None:
        if name == self._place:
            self._reached.set()
            assert self._released.wait(30)

    async def reached(self) -> None:
        assert await asyncio.to_thread(self._reached.wait, 30)

    def release(self) -> None:
        self._released.set()


def config(
    *,
    db_id: int = DB,
    chunk_bytes: int = CHUNK,
    floor_lsn: int = 1,
    remembered: Sequence[RememberedAppend] = (),
    has_lived: bool = False,
) -> LogConfig:
    return LogConfig(
        db_id=db_id, engine=EngineCode.APPEND_ONLY, chunk_bytes=chunk_bytes, floor_lsn=floor_lsn,
        remembered=remembered, has_lived=has_lived,
    )  # fmt: skip


def payload(*records: bytes) -> MemoryPayload:
    return MemoryPayload(
        payload=pack_records(list(records)),
        count=len(records),
        line_safe=not any(b"\n" in record for record in records),
    )


def request(
    *records: bytes,
    expected: int | None = None,
    key: bytes | None = None,
    body: bytes = b"body",
    per_entry: int | None = None,
) -> AppendRequest:
    """`per_entry` records in each entry; all in one by default."""
    step = per_entry or len(records)
    groups = [records[at : at + step] for at in range(0, len(records), step)]
    return AppendRequest(
        entries=tuple(payload(*group) for group in groups),
        entry_type=EntryType.RECORDS,
        expected_next_lsn=expected,
        key_hash=key.ljust(16, b".") if key is not None else None,
        body_hash=body.ljust(16, b".") if key is not None else None,
    )


async def append(log: WalLog, *records: bytes, **options: object) -> Appended:
    return await log.append(request(*records, **options))  # type: ignore[arg-type]


async def append_together(log: WalLog, *requests: AppendRequest) -> list[Appended | BaseException]:
    """In one turn of the loop: they share a flush."""
    return await asyncio.gather(*(log.append(one) for one in requests), return_exceptions=True)


async def settled(log: WalLog) -> None:
    """What is full is sealed after its appends were answered: waits for that."""
    await log._idle.wait()


def read_all(log: WalLog) -> dict[int, bytes]:
    """Every durable record by its LSN, read as a reader would."""
    found: dict[int, bytes] = {}
    with log.pin(1, 1 << 62) as pin:
        for segment in pin.segments:
            data = segment.path.read_bytes()[SEGMENT_HEADER_BYTES : segment.entries_end]
            for offset, header in iter_entries(data):
                body = data[offset + 80 : offset + header.entry_bytes]
                for place, record in enumerate(unpack_records(body)):
                    lsn = header.first_lsn + place
                    assert lsn not in found
                    found[lsn] = record
            assert max(found) == segment.durable_last_lsn
    assert list(found) == sorted(found)
    return found
