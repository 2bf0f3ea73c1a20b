"""A remote store in memory that keeps the protocol's promises, and breaks them when told to."""

from collections.abc import AsyncIterator, Callable, Sequence
from hashlib import sha256

from app.core.base.errors import RemoteUnavailable
from app.core.formats.crc64 import crc64
from app.core.stores.remote.protocol import (
    BlobInfo,
    BlobMissing,
    Body,
    BytesBody,
    RemoteStore,
    UploadCorrupted,
)

Fault = Callable[[str, int, bytes], bytes]


class MemoryRemote(RemoteStore):
    """`reads` notes every (key, first, length) that was fetched. `on_read` may change or refuse
    what a read answers; `unavailable` fails everything.
    """

    def __init__(self, *, piece_bytes: int = 128 * 1024) -> None:
        self.objects: dict[str, bytes] = {}
        self.reads: list[tuple[str, int, int]] = []
        self.on_read: Fault = lambda key, first, data: data
        self.unavailable = False
        self.closed = False
        self._piece_bytes = piece_bytes

    async def put_blob(self, key: str, body: Body) -> BlobInfo:
        self._check()
        data = body.data if isinstance(body, BytesBody) else body.path.read_bytes()
        if len(data) != body.bytes or crc64(data) != body.crc64:
            raise UploadCorrupted(key=key)
        self.objects[key] = data
        return self._info(key)

    async def put_if_absent(self, key: str, body: BytesBody) -> BlobInfo | None:
        self._check()
        return None if key in self.objects else await self.put_blob(key, body)

    async def put_if_match(self, key: str, body: BytesBody, *, etag: str) -> BlobInfo | None:
        self._check()
        if key not in self.objects or self._info(key).etag != etag:
            return None
        return await self.put_blob(key, body)

    async def head_blob(self, key: str) -> BlobInfo | None:
        self._check()
        return self._info(key) if key in self.objects else None

    async def get_blob(self, key: str, *, first: int = 0, length: int | None = None) -> bytes:
        self._check()
        if key not in self.objects:
            raise BlobMissing(key=key)
        whole = self.objects[key]
        data = whole[first:] if length is None else whole[first : first + length]
        self.reads.append((key, first, len(data)))
        return self.on_read(key, first, data)

    async def iter_blob(
        self, key: str, *, first: int = 0, length: int | None = None
    ) -> AsyncIterator[bytes]:
        data = await self.get_blob(key, first=first, length=length)
        for start in range(0, len(data), self._piece_bytes):
            yield data[start : start + self._piece_bytes]

    async def delete_blobs(self, keys: Sequence[str]) -> Sequence[str]:
        self._check()
        for key in keys:
            self.objects.pop(key, None)
        return []

    async def list_blobs(self, prefix: str) -> AsyncIterator[BlobInfo]:
        self._check()
        for key in sorted(self.objects):
            if key.startswith(prefix):
                info = self._info(key)
                yield BlobInfo(
                    key=key, bytes=info.bytes, crc64=None, etag=info.etag, modified_at_us=0
                )

    async def aclose(self) -> None:
        self.closed = True

    def _info(self, key: str) -> BlobInfo:
        data = self.objects[key]
        return BlobInfo(
            key=key,
            bytes=len(data),
            crc64=crc64(data),
            etag=f'"{sha256(data).hexdigest()[:32]}"',
            modified_at_us=0,
        )

    def _check(self) -> None:
        if self.unavailable:
            raise RemoteUnavailable
