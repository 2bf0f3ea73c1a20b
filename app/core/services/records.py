"""Records of append_only databases: append, read."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from app.core.base.errors import CorruptWal, DatabaseNotFound, LsnTruncated, WalLost
from app.core.formats.segment import EntryType
from app.core.reads.paged_plan import ListedChunks
from app.core.reads.published_chunks import PublishedChunks
from app.core.reads.read_point import GenerationPins
from app.core.reads.record_reader import RecordReader, RecordStream
from app.core.services.directory import DatabaseDirectory
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.wal.pins import WalPin
from app.core.stores.wal.requests import Appended, AppendRequest, EntryPayload

ROWS_AT_ONCE = 256
"""So many rows of chunks are looked at on the event loop; who reads from further back goes through
them in the pool.
"""


@dataclass(frozen=True, slots=True)
class AppendLimits:
    record_bytes_max: int


class Records:
    def __init__(
        self,
        manifest: ManifestStore,
        directory: DatabaseDirectory,
        reader: RecordReader,
        *,
        pins: GenerationPins,
        record_bytes_max: int,
    ) -> None:
        self._manifest = manifest
        self._directory = directory
        self._reader = reader
        self._pins = pins
        self._record_bytes_max = record_bytes_max

    def check_appendable(self, tenant: str, name: str) -> AppendLimits:
        """Before a body is read: is there anywhere to put it? Raises DatabaseNotFound,
        WrongEngine, WalLost, CorruptWal.
        """
        record, log = self._directory.require(tenant, name, "append_only")
        if log.health == "wal_lost":
            raise WalLost(lost_from_lsn=log.lost_from_lsn)
        if log.health == "corrupt_wal":
            raise CorruptWal
        return AppendLimits(min(self._record_bytes_max, record.chunk_bytes))

    async def append(
        self,
        tenant: str,
        name: str,
        entries: Sequence[EntryPayload],
        *,
        expected_next_lsn: int | None,
        key_hash: bytes | None,
        body_hash: bytes | None,
    ) -> Appended:
        """Returns once the records are durable (I1), all of them or none. With a key, the same
        append again gives the first answer (`replayed`). Raises LsnMismatch,
        IdempotencyKeyReused, DiskFull, Backpressure.
        """
        _, log = self._directory.require(tenant, name, "append_only")
        return await log.append(
            AppendRequest(
                entries=entries,
                entry_type=EntryType.RECORDS,
                expected_next_lsn=expected_next_lsn,
                key_hash=key_hash,
                body_hash=body_hash,
            )
        )

    async def open_read(
        self,
        tenant: str,
        name: str,
        *,
        from_lsn: int,
        to_lsn: int | None,
        limit: int | None,
        wait_seconds: float,
        as_lines: bool,
    ) -> RecordStream:
        """A stream of [from_lsn, to_lsn] up to a gap, to be closed by the caller. From beyond the
        newest record it is empty, after waiting up to `wait_seconds` for that record; where the
        WAL is damaged it leads up to the damage, which is an error like any other.
        Raises LsnTruncated, NotLineRecords, CorruptWal.
        """
        record, log = self._directory.require(tenant, name, "append_only")
        if log.health == "corrupt_wal" and from_lsn >= log.next_lsn:
            raise CorruptWal(
                f"Records from LSN {log.next_lsn} on were acknowledged, and are damaged.",
                next_lsn=log.next_lsn,
            )
        if wait_seconds > 0 and from_lsn >= log.next_lsn:
            try:
                async with asyncio.timeout(wait_seconds):
                    await log.wait_for(from_lsn)
            except TimeoutError:
                pass  # an empty answer says where to go on
        # Pinned first: a row goes only after its file, so that what is pinned has one.
        pin = _ReadPin(log.pin(from_lsn, to_lsn if to_lsn is not None else log.next_lsn))
        try:
            with self._manifest.read() as view:
                found = view.database(record.db_id)
                if found is None or found.state == "tombstoned":
                    raise DatabaseNotFound(tenant=tenant, database=name)
                if from_lsn < found.first_lsn:
                    raise LsnTruncated(
                        f"LSN {from_lsn} was truncated; the oldest readable one is "
                        f"{found.first_lsn}.",
                        first_lsn=found.first_lsn,
                    )
                pin.hold(self._pins.pin(found.db_id, found.generation))
                rows = view.newest_chunks(
                    found.db_id, found.generation, from_lsn, looks_max=ROWS_AT_ONCE
                )
                cut = [
                    (row.visible_last + 1, row.last_lsn)
                    for row in view.segments(found.db_id)
                    if row.visible_last is not None
                ]
        except BaseException:
            pin.release()
            raise
        chunks = (
            PublishedChunks(self._manifest, found.db_id, found.generation)
            if rows is None
            else ListedChunks(rows)
        )
        return await self._reader.open(
            chunks=chunks,
            pin=pin,
            next_lsn=log.next_lsn,
            from_lsn=from_lsn,
            to_lsn=to_lsn,
            limit=limit,
            as_lines=as_lines,
            cut=cut,
        )


class _ReadPin:
    """The segments and the generation that a stream reads, until `release` (I4, I8)."""

    def __init__(self, pin: WalPin) -> None:
        self._held = [pin.release]
        self.segments = pin.segments

    def hold(self, release: Callable[[], None]) -> None:
        self._held.append(release)

    def release(self) -> None:
        while self._held:
            self._held.pop()()
