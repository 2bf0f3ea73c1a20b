"""Records: append them, read them back across gaps and broken connections.

Invariants: an append is sent again under the key of its first attempt, so it takes effect once
(I7). A reader gets every record once, in LSN order, whatever happens to its connections.
"""

import os
import struct
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import httpx

from app.client.calls import Calls, Content, decoded
from app.client.databases import Databases, database_path
from app.client.failures import StreamBroken
from app.client.wire import Appended
from app.core.base.tasks import BlockingPool
from app.core.formats.record_framing import LENGTH_BYTES, pack_records

OCTETS = "application/octet-stream"
LINES = "application/x-ndjson"
RECORDS = "application/vnd.bop.records"
FILE_READ_BYTES = 256 * 1024
FOLLOW_WAIT_SECONDS = 30.0

_unpack_length = struct.Struct("<I").unpack_from


@dataclass(frozen=True, slots=True)
class Record:
    lsn: int
    data: bytes


@dataclass(frozen=True, slots=True)
class RecordBatch:
    """Records with consecutive LSNs, as many as happened to arrive together; never none."""

    first_lsn: int
    records: list[bytes]

    @property
    def last_lsn(self) -> int:
        return self.first_lsn + len(self.records) - 1


class Records:
    def __init__(self, calls: Calls, databases: Databases) -> None:
        self._calls = calls
        self._databases = databases

    async def append(
        self,
        tenant: str,
        database: str,
        body: Content,
        *,
        media_type: str = RECORDS,
        expected_next_lsn: int | None = None,
        idempotency_key: str | None = None,
        content_bytes: int | None = None,
    ) -> Appended:
        """One request: all its records become durable, or none. Raises ProblemError, with
        `lsn_mismatch` where `expected_next_lsn` is not the database's.
        """
        headers = {"Content-Type": media_type}
        if content_bytes is not None:
            headers["Content-Length"] = str(content_bytes)
        if expected_next_lsn is not None:
            headers["If-Match"] = f'"{expected_next_lsn}"'
        response = await self._calls.send(
            "POST",
            f"{database_path(tenant, database)}/records",
            content=body,
            headers=headers,
            key=idempotency_key or self._calls.new_key(),
        )
        return decoded(response, Appended)

    async def append_one(
        self, tenant: str, database: str, record: bytes, *, expected_next_lsn: int | None = None
    ) -> Appended:
        return await self.append(
            tenant, database, record, media_type=OCTETS, expected_next_lsn=expected_next_lsn
        )

    async def append_many(
        self,
        tenant: str,
        database: str,
        records: Iterable[bytes],
        *,
        expected_next_lsn: int | None = None,
    ) -> Appended:
        """All the records in one request, held in memory."""
        return await self.append(
            tenant, database, pack_records(list(records)), expected_next_lsn=expected_next_lsn
        )

    async def append_file(
        self, tenant: str, database: str, path: Path, *, media_type: str = LINES
    ) -> Appended:
        """A file's records in one request, streamed. The file must not change meanwhile."""
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return await self.append(
                tenant,
                database,
                lambda: _pieces(file, size),
                media_type=media_type,
                content_bytes=size,
            )

    async def iter(
        self,
        tenant: str,
        database: str,
        *,
        from_lsn: int | None = None,
        to_lsn: int | None = None,
        limit: int | None = None,
        follow: bool = False,
    ) -> AsyncGenerator[Record, None]:
        """As `iter_batches`, one record at a time."""
        async with aclosing(
            self.iter_batches(
                tenant, database, from_lsn=from_lsn, to_lsn=to_lsn, limit=limit, follow=follow
            )
        ) as batches:
            async for batch in batches:
                for offset, data in enumerate(batch.records):
                    yield Record(batch.first_lsn + offset, data)

    async def iter_batches(
        self,
        tenant: str,
        database: str,
        *,
        from_lsn: int | None = None,
        to_lsn: int | None = None,
        limit: int | None = None,
        follow: bool = False,
    ) -> AsyncGenerator[RecordBatch, None]:
        """Records of [from_lsn, to_lsn], by default from the oldest readable one to the newest at
        the time of the call; with `follow`, those to come too. Gaps are stepped over. Raises
        ProblemError, ServiceUnreachable, StreamBroken.
        """
        end = to_lsn
        if from_lsn is None or (to_lsn is None and not follow):
            found = await self._databases.get(tenant, database)
            from_lsn = found.first_lsn if from_lsn is None else from_lsn
            if to_lsn is None and not follow:
                end = found.next_lsn - 1
        reading = _Reading(from_lsn, end, limit)
        broken_count = 0
        while reading.wants_more:
            before = reading.at
            try:
                answer = self._read_answer(tenant, database, reading, follow=follow)
                async with aclosing(answer) as batches:
                    async for batch in batches:
                        yield batch
            except (httpx.TransportError, StreamBroken) as error:
                broken_count = 1 if reading.at > before else broken_count + 1
                if broken_count >= self._calls.retry.attempts_max:
                    if isinstance(error, httpx.TransportError):
                        raise self._calls.unreachable(error) from error
                    raise
                await self._calls.back_off(attempt=broken_count)
                continue
            broken_count = 0
            if reading.at == before and not follow:
                return

    async def _read_answer(
        self, tenant: str, database: str, reading: "_Reading", *, follow: bool
    ) -> AsyncGenerator[RecordBatch, None]:
        """The records of one request. `reading` moves on with each batch, before it is given."""
        wait_seconds = FOLLOW_WAIT_SECONDS if follow else 0.0
        async with self._calls.stream(
            f"{database_path(tenant, database)}/records",
            params={
                "from_lsn": reading.at,
                "to_lsn": reading.end,
                "limit": reading.left,
                "wait": f"{wait_seconds:g}" if follow else None,
            },
            headers={"Accept": RECORDS},
            wait_seconds=wait_seconds,
        ) as response:
            first, last, following = (
                _lsn(response, name) for name in ("Bop-First-Lsn", "Bop-Last-Lsn", "Bop-Next-Lsn")
            )
            if first is not None and first > reading.at:
                reading.at = first
            decoder = RecordDecoder()
            async for piece in response.aiter_bytes():
                records = decoder.feed(piece)
                if records:
                    batch = RecordBatch(reading.at, records)
                    reading.move(len(records))
                    yield batch
            if decoder.unfinished or (
                first is not None and last is not None and reading.at <= last
            ):
                raise StreamBroken(f"The stream ended before LSN {reading.at} was whole.")
            if following is not None and following > reading.at:
                reading.at = following


@dataclass(slots=True)
class _Reading:
    """Where a reader is."""

    at: int
    end: int | None
    left: int | None

    @property
    def wants_more(self) -> bool:
        return (self.end is None or self.at <= self.end) and (self.left is None or self.left > 0)

    def move(self, count: int) -> None:
        self.at += count
        if self.left is not None:
            self.left -= count


class RecordDecoder:
    """Whole records out of pieces of `application/vnd.bop.records`."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._bytes = 0
        self._needed = LENGTH_BYTES  # with fewer bytes no record can be whole

    @property
    def unfinished(self) -> bool:
        return self._bytes > 0

    def feed(self, piece: bytes) -> list[bytes]:
        self._pieces.append(piece)
        self._bytes += len(piece)
        if self._bytes < self._needed:
            return []
        data = b"".join(self._pieces)
        records: list[bytes] = []
        at, end = 0, len(data)
        self._needed = LENGTH_BYTES
        while end - at >= LENGTH_BYTES:
            stop = at + LENGTH_BYTES + _unpack_length(data, at)[0]
            if stop > end:
                self._needed = stop - at
                break
            records.append(data[at + LENGTH_BYTES : stop])
            at = stop
        self._pieces = [data[at:]]
        self._bytes = end - at
        return records


async def _pieces(file: BinaryIO, size: int) -> AsyncGenerator[bytes, None]:
    """The first `size` bytes of `file`, from its beginning."""
    pool = BlockingPool("append-file", threads=1)
    try:
        at = 0
        while at < size:
            piece = await pool.run(os.pread, file.fileno(), min(FILE_READ_BYTES, size - at), at)
            if not piece:
                raise OSError(f"{file.name} became shorter while it was read")
            at += len(piece)
            yield piece
    finally:
        pool.close_blocking()


def _lsn(response: httpx.Response, name: str) -> int | None:
    value = response.headers.get(name, "")
    return int(value) if value.isdecimal() else None
