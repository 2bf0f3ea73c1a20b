"""What the service asks of an object store.

Consistency: read-after-write for objects and lists, as S3 gives since 2020. Keys are relative to
the store's prefix and use `/`. Every method raises `RemoteUnavailable` for a clean failure,
`OutcomeUnknown` where a write may have happened all the same (I15), `BlobMissing` for an absent
key, and `CorruptBlob` where bytes do not match their recorded checksum.
"""

import abc
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from app.core.base.errors import NotFound, RemoteUnavailable


class BlobMissing(NotFound):
    title = "No such object on the remote store"


class RemoteThrottled(RemoteUnavailable):
    """503 SlowDown or 429: lowers concurrency, then is retried."""

    title = "The remote store asks for fewer requests"


class RemoteMisconfigured(RemoteUnavailable):
    """Credentials, permissions, the bucket's name or what the endpoint can do: trying again is of
    no use until someone changes something, and the text says what.
    """

    title = "The remote store refuses what it is asked"
    hint = "Correct the settings, credentials or permissions; the WAL goes on buffering."


class UploadCorrupted(RemoteUnavailable):
    """The store received other bytes than the checksum promised. Nothing was stored."""

    title = "An upload arrived damaged"


class BlobInfo(msgspec.Struct, frozen=True, kw_only=True):
    key: str
    bytes: int
    crc64: int | None
    """CRC-64/NVME of the whole object as the store recorded it; None if it recorded none."""
    etag: str
    modified_at_us: int


def _nobody_asks() -> None: ...


class FileBody(msgspec.Struct, frozen=True, kw_only=True):
    """A file that holds exactly the object's bytes. Streamed with pread; never held in memory."""

    path: Path
    bytes: int
    crc64: int
    on_moved: Callable[[], None] = _nobody_asks
    """Told, on the event loop, whenever a piece has left: the upload lives, however long it takes.
    Attempts that begin anew tell of the same bytes again; their number is bounded."""


class BytesBody(msgspec.Struct, frozen=True, kw_only=True):
    """A small object: documents, probes."""

    data: bytes
    crc64: int

    @property
    def bytes(self) -> int:
        return len(self.data)


Body = FileBody | BytesBody


class RemoteStore(Protocol):
    @abc.abstractmethod
    async def put_blob(self, key: str, body: Body) -> BlobInfo:
        """Uploads with CRC-64/NVME checked by the store, and returns what it confirmed.
        Overwriting an equal object is harmless.
        """

    @abc.abstractmethod
    async def put_if_absent(self, key: str, body: BytesBody) -> BlobInfo | None:
        """None if an object is there already (its content may be our own: compare)."""

    @abc.abstractmethod
    async def put_if_match(self, key: str, body: BytesBody, *, etag: str) -> BlobInfo | None:
        """None if the object changed or is gone."""

    @abc.abstractmethod
    async def head_blob(self, key: str) -> BlobInfo | None:
        """None if there is no such object."""

    @abc.abstractmethod
    async def get_blob(self, key: str, *, first: int = 0, length: int | None = None) -> bytes:
        """A range's bytes, in memory. Bounded by its caller; blocks carry their own checksums."""

    @abc.abstractmethod
    def iter_blob(
        self, key: str, *, first: int = 0, length: int | None = None
    ) -> AsyncIterator[bytes]:
        """Streams a range in pieces of some 128 KiB; resumes by range when a connection breaks."""

    @abc.abstractmethod
    async def delete_blobs(self, keys: Sequence[str]) -> Sequence[str]:
        """Deletes up to 1,000 keys; absent ones count as deleted. Returns those that failed."""

    @abc.abstractmethod
    def list_blobs(self, prefix: str) -> AsyncIterator[BlobInfo]:
        """Every object below `prefix`, in no promised order (`crc64` None). Raises rather than
        end early: a listing that ends is complete.
        """

    @abc.abstractmethod
    async def aclose(self) -> None: ...
