"""A bucket that outlives the service's lives, and a way to it on which everything goes wrong.

It keeps what the real stores promise (conditional writes, whole objects, read-after-write) and
watches two invariants itself: a blob is never overwritten by other bytes, and none is deleted that
a row of the manifest names (I8).
"""

import asyncio
import heapq
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TypeVar

from app.core.base.errors import CorruptBlob, OutcomeUnknown, RemoteUnavailable
from app.core.formats.crc64 import crc64
from app.core.stores.remote.keys import ChunkKey, DeltaKey, parse_key
from app.core.stores.remote.protocol import (
    BlobInfo,
    BlobMissing,
    Body,
    BytesBody,
    RemoteStore,
    RemoteThrottled,
    UploadCorrupted,
)

T = TypeVar("T")
PIECE_BYTES = 32 * 1024


class Violation(AssertionError):
    """An invariant does not hold."""


@dataclass(frozen=True, kw_only=True)
class FaultRates:
    """How often, of all requests; each of the kinds that a request can meet."""

    refused: float = 0.03
    throttled: float = 0.01
    lost_answer: float = 0.02
    """It took effect, and nobody was told."""
    vanished: float = 0.01
    """It had no effect, and nobody was told."""
    late: float = 0.02
    """It takes effect minutes later."""
    slow: float = 0.01
    flipped: float = 0.003
    """A bit of a range that is read. Of whole objects the store's checksum tells."""
    outage_every_seconds: float = 1200.0
    outage_seconds: float = 300.0


@dataclass
class Bucket:
    source: random.Random
    rates: FaultRates = field(default_factory=FaultRates)
    objects: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    """Bytes, and when they were put, in microseconds of wall time."""
    now: Callable[[], float] = lambda: 0.0
    wall_us: Callable[[], int] = lambda: 0
    named: Callable[[str], bool] = lambda key: False
    """Whether a row of the manifest names the key."""
    faults: "Counter[str]" = field(default_factory=Counter)
    healthy: bool = False
    """From then on all goes well."""
    rotten: dict[str, bytes] = field(default_factory=dict)
    """Objects of which a bit has flipped where they lie, as they were before."""
    rots: int = 0
    _late: list[tuple[float, int, Callable[[], object]]] = field(default_factory=list)
    _order: "itertools.count[int]" = field(default_factory=itertools.count)
    _outage: tuple[float, float] = (0.0, 0.0)

    # --- what may go wrong

    def draw(self, *kinds: str) -> str | None:
        if self.healthy:
            return None
        kind, at = None, self.source.random()
        for each in kinds:
            rate = getattr(self.rates, each)
            if at < rate:
                kind = each
                break
            at -= rate
        if kind is not None:
            self.faults[kind] += 1
        return kind

    def is_away(self) -> bool:
        if self.healthy:
            return False
        begin, end = self._outage
        if self.now() >= end:
            begin = self.now() + self.source.expovariate(1 / self.rates.outage_every_seconds)
            end = begin + self.source.expovariate(1 / self.rates.outage_seconds)
            self._outage = begin, end
            self.faults["outage"] += 1
        return self.now() >= begin

    def later(self, effect: Callable[[], object]) -> None:
        seconds = self.source.expovariate(1 / 120.0)
        heapq.heappush(self._late, (self.now() + seconds, next(self._order), effect))

    def land(self) -> None:
        """What was on its way and is due."""
        while self._late and self._late[0][0] <= self.now():
            heapq.heappop(self._late)[2]()

    # --- effects

    def put(self, key: str, data: bytes) -> BlobInfo:
        self.heal(key)
        known = self.objects.get(key)
        is_blob = isinstance(parse_key(key), ChunkKey | DeltaKey)
        if known is not None and known[0] != data and is_blob:
            raise Violation(f"{key} was overwritten by other bytes")
        self.objects[key] = data, self.wall_us()
        return self.info(key)

    def put_if(self, key: str, data: bytes, *, etag: str | None) -> BlobInfo | None:
        found = self.info(key).etag if key in self.objects else None
        return self.put(key, data) if found == etag else None

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            if self.named(key):
                raise Violation(f"{key} was deleted while a row names it")
            self.objects.pop(key, None)
            self.rotten.pop(key, None)

    def rot(self, key: str) -> None:
        data, put_at_us = self.objects[key]
        self.rotten[key] = data
        at = self.source.randrange(len(data))
        self.objects[key] = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], put_at_us
        self.faults["rotten"] += 1
        self.rots += 1

    def heal(self, key: str) -> None:
        """The right bytes are there again, if it was rotten."""
        if (data := self.rotten.pop(key, None)) is not None:
            self.objects[key] = data, self.objects[key][1]

    def info(self, key: str) -> BlobInfo:
        """As it was put: of what became of it since, the store knows nothing."""
        data, put_at_us = self.objects[key]
        data = self.rotten.get(key, data)
        return BlobInfo(
            key=key,
            bytes=len(data),
            crc64=crc64(data),
            etag=f'"{sha256(data).hexdigest()[:32]}"',
            modified_at_us=put_at_us,
        )


class WayToBucket(RemoteStore):
    """One life's connections. When the process is `dead`, what it sent may land, and no more."""

    def __init__(self, bucket: Bucket, *, is_dead: Callable[[], bool]) -> None:
        self._bucket = bucket
        self._is_dead = is_dead

    async def put_blob(self, key: str, body: Body) -> BlobInfo:
        data = body.data if isinstance(body, BytesBody) else body.path.read_bytes()
        if (len(data), crc64(data)) != (body.bytes, body.crc64):
            raise UploadCorrupted(key=key)
        return await self._write(lambda: self._bucket.put(key, data))

    async def put_if_absent(self, key: str, body: BytesBody) -> BlobInfo | None:
        return await self._write(lambda: self._bucket.put_if(key, body.data, etag=None))

    async def put_if_match(self, key: str, body: BytesBody, *, etag: str) -> BlobInfo | None:
        return await self._write(lambda: self._bucket.put_if(key, body.data, etag=etag))

    async def head_blob(self, key: str) -> BlobInfo | None:
        await self._read()
        return self._bucket.info(key) if key in self._bucket.objects else None

    async def get_blob(self, key: str, *, first: int = 0, length: int | None = None) -> bytes:
        await self._read()
        if key not in self._bucket.objects:
            raise BlobMissing(key=key)
        whole = self._bucket.objects[key][0]
        if key in self._bucket.rotten and not first and (length or len(whole)) >= len(whole):
            raise CorruptBlob("The store's checksum of it does not hold.", key=key)
        data = whole[first:] if length is None else whole[first : first + length]
        if len(data) < len(whole) and data and self._bucket.draw("flipped"):
            at = self._bucket.source.randrange(len(data))
            data = data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
        return data

    async def iter_blob(
        self, key: str, *, first: int = 0, length: int | None = None
    ) -> AsyncIterator[bytes]:
        data = await self.get_blob(key, first=first, length=length)
        for start in range(0, len(data), PIECE_BYTES):
            if start:
                await self._read()
            yield data[start : start + PIECE_BYTES]

    async def delete_blobs(self, keys: Sequence[str]) -> Sequence[str]:
        await self._write(lambda: self._bucket.delete(keys))
        return []

    async def list_blobs(self, prefix: str) -> AsyncIterator[BlobInfo]:
        await self._read()
        for number, key in enumerate(sorted(self._bucket.objects)):
            if number and number % 50 == 0:
                await self._read()
            if key.startswith(prefix) and key in self._bucket.objects:
                yield self._bucket.info(key)

    async def aclose(self) -> None:
        """Nothing is held."""

    # --- the way

    async def _travel(self) -> None:
        slow = self._bucket.draw("slow")
        await asyncio.sleep(self._bucket.source.expovariate(1 / (60.0 if slow else 0.02)))

    async def _read(self) -> None:
        await self._travel()
        self._bucket.land()
        if self._is_dead() or self._bucket.is_away() or self._bucket.draw("refused"):
            raise RemoteUnavailable("simulated")
        if self._bucket.draw("throttled"):
            raise RemoteThrottled("simulated")

    async def _write(self, effect: Callable[[], T]) -> T:
        bucket = self._bucket
        if self._is_dead():
            raise RemoteUnavailable("simulated")
        try:
            await self._travel()
        except asyncio.CancelledError:
            if bucket.source.random() < 0.5:
                bucket.later(effect)
            raise
        bucket.land()
        if self._is_dead():
            if bucket.source.random() < 0.5:
                bucket.later(effect)
            raise RemoteUnavailable("simulated")
        self._meet_fault(effect)
        result = effect()
        await self._travel()
        return result

    def _meet_fault(self, effect: Callable[[], object]) -> None:
        if self._bucket.is_away():
            raise RemoteUnavailable("simulated")
        match self._bucket.draw("refused", "throttled", "lost_answer", "vanished", "late"):
            case "refused":
                raise RemoteUnavailable("simulated")
            case "throttled":
                raise RemoteThrottled("simulated")
            case "lost_answer":
                effect()
                raise OutcomeUnknown("simulated")
            case "vanished":
                raise OutcomeUnknown("simulated")
            case "late":
                self._bucket.later(effect)
                raise OutcomeUnknown("simulated")
