"""Reads ranges of a blob: from the hot cache's file as long as that is good, then from the object.

Invariants: I10: bytes leave here only through a `decode` that has checked them. Damage in the hot
cache drops that file, and the remote copy is read; damage on the way from the remote store is
fetched once more; what is still wrong is CorruptBlob. I11: of remote blobs only small ones are
kept, as they came, up to a limit: a small delta costs one request, whatever is read of it.
Concurrency: fetches of one open blob may run side by side. Cancellation: a blob's owner closes it.
Crash: nothing here is written.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from app.core.base.clock import Clock
from app.core.base.errors import CorruptBlob
from app.core.base.events import Events
from app.core.base.tasks import BlockingPool, uninterrupted
from app.core.formats.damage import Damage
from app.core.reads.byte_source import RangeReads, RemoteBlob, Tier, read_exactly_blocking
from app.core.reads.log_reader import REMOTE_READS, BlobCache, CachedBlob
from app.core.stores.manifest.records import BlobRef
from app.core.stores.remote.protocol import BlobMissing

SMALL_BLOB_BYTES = 512 * 1024
"""A request costs more time than this many bytes do."""
SMALL_BLOBS_KEPT_BYTES = 16 * 1024 * 1024

T = TypeVar("T")


class BlobReader:
    """`remote` is asked only when a remote copy is needed; it may raise NotReady."""

    def __init__(
        self,
        *,
        remote: Callable[[], RangeReads],
        hot_cache: BlobCache,
        pool: BlockingPool,
        clock: Clock,
        events: Events,
        small_blob_bytes: int = SMALL_BLOB_BYTES,
    ) -> None:
        self.small_blobs = SmallBlobs(
            each_bytes=small_blob_bytes, limit_bytes=SMALL_BLOBS_KEPT_BYTES
        )
        self.remote = remote
        self.hot_cache = hot_cache
        self.pool = pool
        self.clock = clock
        self.events = events

    async def open(self, blob: BlobRef) -> "OpenBlob":
        """To be closed by the caller."""
        pinned = await self.hot_cache.pin(blob.sha256.hex(), expected_bytes=blob.bytes)
        return OpenBlob(self, blob, pinned)


class OpenBlob:
    def __init__(self, reader: BlobReader, blob: BlobRef, file: CachedBlob | None) -> None:
        self._reader = reader
        self._blob = blob
        self._file = file
        self._users = 0
        self._closed = False

    @property
    def ref(self) -> BlobRef:
        return self._blob

    @property
    def tier(self) -> Tier:
        """Where the next fetch looks first."""
        return "local" if self._file is not None else "remote"

    @contextmanager
    def held_file(self) -> Iterator[int | None]:
        """The descriptor of its file, which stays open meanwhile; None where it has none."""
        file = self._file
        if file is None:
            yield None
            return
        self._users += 1
        try:
            yield file.descriptor
        finally:
            self._users -= 1
            if self._users == 0 and self._closed:
                file.close()

    async def fetch(self, first: int, length: int, decode: Callable[[bytes], T]) -> T:
        """What `decode` makes of these bytes, in the pool; it raises Damage for bytes that are
        not right. Raises CorruptBlob, RemoteUnavailable.
        """
        file = self._file
        if file is not None:
            try:
                return await self._load(file, first, length, decode)
            except (Damage, OSError) as error:
                self._tell("local", error)
                await self._drop(file)
        return await self._fetch_remote(first, length, decode)

    async def _load(
        self, file: CachedBlob, first: int, length: int, decode: Callable[[bytes], T]
    ) -> T:
        reader, started = self._reader, self._reader.clock.monotonic()
        with self.held_file():
            result = await uninterrupted(
                reader.pool.run(
                    lambda: decode(read_exactly_blocking(file.descriptor, first, length))
                )
            )
        self._tell_served("local", length, started)
        return result

    async def _fetch_remote(self, first: int, length: int, decode: Callable[[bytes], T]) -> T:
        reader = self._reader
        for attempt in range(1, REMOTE_READS + 1):
            started = reader.clock.monotonic()
            try:
                result = await reader.pool.run(decode, await self._read_remote(first, length))
            except BlobMissing as error:
                self._tell("remote", error)
                raise corrupt_blob(self._blob, "The blob is gone from the remote store.") from error
            except (Damage, CorruptBlob) as error:
                self._tell("remote", error)
                reader.small_blobs.drop(self._blob)
                if attempt == REMOTE_READS:
                    raise corrupt_blob(self._blob, f"The blob is damaged: {error}.") from error
            else:
                self._tell_served("remote", length, started)
                return result
        raise AssertionError("unreachable")

    async def _read_remote(self, first: int, length: int) -> bytes:
        blob, small = self._blob, self._reader.small_blobs
        whole = small.get(blob)
        if whole is None:
            source = RemoteBlob(self._reader.remote(), blob.key)
            if not small.takes(blob):
                return await source.read(first, length)
            whole = await source.read(0, blob.bytes)
            small.put(blob, whole)
        return whole[first : first + length]

    async def _drop(self, file: CachedBlob) -> None:
        if self._file is file:
            self._file = None
            self._close(file)
            await self._reader.hot_cache.drop(self._blob.sha256.hex())

    def close(self) -> None:
        """Again is harmless. A fetch that is under way ends first."""
        file, self._file = self._file, None
        if file is not None:
            self._close(file)

    def _close(self, file: CachedBlob) -> None:
        self._closed = True
        if self._users == 0:
            file.close()

    def _tell_served(self, tier: Tier, length: int, started: float) -> None:
        seconds = self._reader.clock.monotonic() - started
        self._reader.events.debug("read.served", tier=tier, bytes=length, seconds=seconds)

    def _tell(self, tier: Tier, error: Exception) -> None:
        self._reader.events.error(
            "read.damaged", tier=tier, key=self._blob.key, error=f"{type(error).__name__}: {error}"
        )


class SmallBlobs:
    """Objects as they came: not yet checked. Least recently used go first."""

    def __init__(self, *, each_bytes: int, limit_bytes: int) -> None:
        self._each_bytes = each_bytes
        self._limit_bytes = limit_bytes
        self._used_bytes = 0
        self._blobs: OrderedDict[bytes, bytes] = OrderedDict()

    def takes(self, blob: BlobRef) -> bool:
        return blob.bytes <= self._each_bytes

    def get(self, blob: BlobRef) -> bytes | None:
        data = self._blobs.get(blob.sha256)
        if data is not None:
            self._blobs.move_to_end(blob.sha256)
        return data

    def put(self, blob: BlobRef, data: bytes) -> None:
        self.drop(blob)
        self._blobs[blob.sha256] = data
        self._used_bytes += len(data)
        while self._used_bytes > self._limit_bytes:
            _, oldest = self._blobs.popitem(last=False)
            self._used_bytes -= len(oldest)

    def drop(self, blob: BlobRef) -> None:
        data = self._blobs.pop(blob.sha256, None)
        if data is not None:
            self._used_bytes -= len(data)


def corrupt_blob(blob: BlobRef, detail: str) -> CorruptBlob:
    return CorruptBlob(detail, key=blob.key)
