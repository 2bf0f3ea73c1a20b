"""Reads a blob whole from the remote store and says whether it is what it should be.

Invariants: I10: SHA-256 over all bytes, length and CRC-64 are compared with the catalogue's; bytes
that came damaged are fetched once more before the object is called damaged. A repair uploads only
bytes that have that SHA-256, under the same key, and reads them back.
I11: a piece of 4 MiB is held at a time; nothing is open between pieces, however slow the pace.
Concurrency: any number at once. Cancellation: an upload that is cancelled may land: it is right.
Crash: as for a cancellation; an object is replaced whole.
"""

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from app.core.base import failpoints
from app.core.base.errors import CorruptBlob
from app.core.base.tasks import BlockingPool
from app.core.formats.chunk import hash_file_blocking
from app.core.formats.crc64 import crc64
from app.core.reads.log_reader import REMOTE_READS, CachedBlob
from app.core.stores.manifest.records import BlobRef
from app.core.stores.remote.metered import cold_reads
from app.core.stores.remote.protocol import BlobMissing, FileBody, RemoteStore

PIECE_BYTES = 4 * 1024 * 1024

Outcome = Literal["ok", "damaged", "missing"]


class LocalCopies(Protocol):
    """The hot cache, as far as a repair needs it."""

    async def pin(self, sha256: str, *, expected_bytes: int | None = None) -> CachedBlob | None: ...

    async def drop(self, sha256: str) -> None: ...

    def path_of(self, sha256: str) -> Path: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    outcome: Outcome
    detail: str = ""


class BlobCheck:
    def __init__(
        self, *, remote: Callable[[], RemoteStore], copies: LocalCopies, pool: BlockingPool
    ) -> None:
        self._remote = remote
        self._copies = copies
        self._pool = pool

    async def check(self, blob: BlobRef, turn: Callable[[int], Awaitable[None]]) -> Verdict:
        """`turn` is awaited before each piece is read. Raises RemoteUnavailable: not to know is
        no damage.
        """
        verdict = Verdict(outcome="ok")
        for _ in range(REMOTE_READS):
            with cold_reads():
                verdict = await self._read_whole(blob, turn)
            if verdict.outcome != "damaged":
                break
        return verdict

    async def _read_whole(self, blob: BlobRef, turn: Callable[[int], Awaitable[None]]) -> Verdict:
        remote = self._remote()
        info = await remote.head_blob(blob.key)
        if info is None:
            return Verdict(outcome="missing", detail="the object is gone")
        if info.bytes != blob.bytes:
            return Verdict(
                outcome="damaged", detail=f"{info.bytes} bytes instead of {blob.bytes}"
            )  # fmt: skip
        if info.crc64 is not None and info.crc64 != blob.crc64:
            return Verdict(outcome="damaged", detail="the store recorded another CRC-64")
        sha256, checksum = hashlib.sha256(), 0

        def take_blocking(data: bytes, before: int) -> int:
            sha256.update(data)
            return crc64(data, before)

        for first in range(0, blob.bytes, PIECE_BYTES):
            length = min(PIECE_BYTES, blob.bytes - first)
            await turn(length)
            try:
                data = await remote.get_blob(blob.key, first=first, length=length)
            except BlobMissing:
                return Verdict(outcome="missing", detail="the object is gone")
            except CorruptBlob as error:
                return Verdict(outcome="damaged", detail=error.detail)
            checksum = await self._pool.run(take_blocking, data, checksum)
        if sha256.digest() != blob.sha256 or checksum != blob.crc64:
            return Verdict(outcome="damaged", detail="its content is not what was uploaded")
        return Verdict(outcome="ok")

    async def repair(
        self,
        blob: BlobRef,
        turn: Callable[[int], Awaitable[None]],
        *,
        on_moved: Callable[[], None],
    ) -> bool:
        """From the hot cache's file, where there is one and it is right. True: the object is whole
        again. `on_moved` is told of every piece that is uploaded. Raises RemoteUnavailable.
        """
        name = blob.sha256.hex()
        copy = await self._copies.pin(name, expected_bytes=blob.bytes)
        if copy is None:
            return False
        try:
            path = self._copies.path_of(name)
            try:
                found = await self._pool.run(hash_file_blocking, path)
            except OSError:
                return False
            if (found.sha256, found.crc64) != (blob.sha256, blob.crc64):
                await self._copies.drop(name)
                return False
            failpoints.fp("verify.before_repair")
            await self._remote().put_blob(
                blob.key,
                FileBody(path=path, bytes=blob.bytes, crc64=blob.crc64, on_moved=on_moved),
            )
        finally:
            copy.close()
        return (await self.check(blob, turn)).outcome == "ok"
