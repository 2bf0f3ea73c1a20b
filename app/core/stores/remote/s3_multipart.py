"""One object in parts, for bodies too large for a single PUT.

Invariants: each part carries its own CRC-64/NVME, computed over the bytes as they lie in the file;
together they must make the body's, or nothing is completed (I2). The completion carries the whole
object's CRC and length. A completion whose answer was lost, or that failed inside a 200, is
`OutcomeUnknown`: the caller reads the object back (I15).
Concurrency: parts go up a few at once within their caller's one slot.
Cancellation and failure: the upload is aborted, within a time limit; what that misses is removed by
the bucket's lifecycle rule for incomplete uploads.
Crash: leaves an incomplete upload, invisible to readers.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

from app.core.base.errors import BopError, CorruptBlob
from app.core.base.tasks import BlockingPool, for_each
from app.core.formats.crc64 import combine_crc64, crc64, encode_crc64
from app.core.stores.remote.protocol import FileBody
from app.core.stores.remote.requests import Retrier
from app.core.stores.remote.s3_body import PIECE_BYTES, FileStream
from app.core.stores.remote.s3_errors import VENDOR_ERRORS, Effect

PARTS_MAX = 10_000
PARTS_AT_ONCE = 4
ABORT_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    number: int
    first: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPart:
    part: Part
    crc64: int
    etag: str


def plan_parts(total_bytes: int, *, part_bytes: int) -> tuple[Part, ...]:
    """Equal parts but for the last; larger than `part_bytes` where S3's limit of parts asks."""
    least = -(-total_bytes // PARTS_MAX)
    size = max(part_bytes, -(-least // PIECE_BYTES) * PIECE_BYTES)
    return tuple(
        Part(number=number, first=first, bytes=min(size, total_bytes - first))
        for number, first in enumerate(range(0, total_bytes, size), start=1)
    )


class MultipartUpload:
    def __init__(
        self,
        client: Any,
        *,
        bucket: str,
        key: str,
        body: FileBody,
        fd: int,
        part_bytes: int,
        stored_as: dict[str, str],
        pool: BlockingPool,
        retrier: Retrier,
        deadlines: Callable[[], AbstractAsyncContextManager[Callable[[], None]]],
        mapped: Callable[[Effect], AbstractContextManager[None]],
    ) -> None:
        self._client = client
        self._object = {"Bucket": bucket, "Key": key}
        self._body = body
        self._fd = fd
        self._part_bytes = part_bytes
        self._stored_as = stored_as
        self._pool = pool
        self._retrier = retrier
        self._deadlines = deadlines
        self._mapped = mapped

    async def run(self) -> None:
        """Raises OutcomeUnknown where the completion may have happened."""
        upload = {**self._object, "UploadId": await self._create()}
        try:
            stored = await for_each(
                plan_parts(self._body.bytes, part_bytes=self._part_bytes),
                partial(self._put_part, upload),
                limit=PARTS_AT_ONCE,
            )
            whole = reduce(
                lambda crc, part: combine_crc64(crc, part.crc64, second_bytes=part.part.bytes),
                stored,
                0,
            )
            if whole != self._body.crc64:
                raise CorruptBlob("The file to upload does not match its recorded checksum.")
            await self._complete(upload, stored)
        except BaseException:
            await self._abort(upload)
            raise

    async def _create(self) -> str:
        with self._mapped("read"):  # repeating it is harmless: at worst an unused upload remains
            async with self._deadlines():
                answer = await self._client.create_multipart_upload(
                    **self._object,
                    ChecksumAlgorithm="CRC64NVME",
                    ChecksumType="FULL_OBJECT",
                    **self._stored_as,
                )
        return str(answer["UploadId"])

    async def _put_part(self, upload: dict[str, str], part: Part) -> StoredPart:
        checksum = await self._pool.run(_crc64_of_range_blocking, self._fd, part.first, part.bytes)

        async def attempt() -> str:
            with self._mapped("read"):  # a part put twice is the same part
                async with self._deadlines() as progress:
                    stream = FileStream(
                        self._fd,
                        first=part.first,
                        length=part.bytes,
                        pool=self._pool,
                        progress=(progress, self._body.on_moved),
                    )
                    answer = await self._client.upload_part(
                        **upload,
                        PartNumber=part.number,
                        Body=stream,
                        ContentLength=part.bytes,
                        ChecksumCRC64NVME=encode_crc64(checksum),
                    )
            return str(answer["ETag"])

        etag = await self._retrier.run("put_blob", attempt)
        return StoredPart(part=part, crc64=checksum, etag=etag)

    async def _complete(self, upload: dict[str, str], stored: list[StoredPart]) -> None:
        parts = [
            {
                "PartNumber": part.part.number,
                "ETag": part.etag,
                "ChecksumCRC64NVME": encode_crc64(part.crc64),
            }
            for part in stored
        ]
        with self._mapped("write"):
            async with self._deadlines():
                await self._client.complete_multipart_upload(
                    **upload,
                    MultipartUpload={"Parts": parts},
                    ChecksumCRC64NVME=encode_crc64(self._body.crc64),
                    ChecksumType="FULL_OBJECT",
                    MpuObjectSize=self._body.bytes,
                )

    async def _abort(self, upload: dict[str, str]) -> None:
        with contextlib.suppress(BopError, *VENDOR_ERRORS):
            async with asyncio.timeout(ABORT_SECONDS):
                await self._client.abort_multipart_upload(**upload)


def _crc64_of_range_blocking(fd: int, first: int, length: int) -> int:
    checksum, offset, end = 0, first, first + length
    while offset < end:
        data = os.pread(fd, min(PIECE_BYTES, end - offset), offset)
        if not data:
            raise CorruptBlob("The file became shorter while it was uploaded.")
        checksum = crc64(data, checksum)
        offset += len(data)
    return checksum
