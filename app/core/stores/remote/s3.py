"""Blobs on S3 or what speaks its protocol: one attempt per call; `Retrying` decides about more.

Invariants: a PUT carries the body's CRC-64/NVME, the store checks it, and what the store says it
holds is compared before the call returns (I2); a whole object that is read is compared with the
store's checksum, a range is not, for its blocks carry their own (I10); a lost answer is
`OutcomeUnknown`, never failure (I15); bodies are streamed, memory does not grow with them (I11).
Concurrency: any number of calls at once on one event loop; the connection pool bounds them.
Cancellation: closes the connection. A cancelled PUT may land all the same, later: its key holds the
hash of its content, so it is an orphan at worst.
Crash: as cancellation; an unfinished multipart upload stays until the bucket's lifecycle rule or
the next attempt's abort removes it.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, Self

from botocore.exceptions import ClientError

from app.core.base.errors import CorruptBlob, OutcomeUnknown, RemoteUnavailable
from app.core.base.tasks import BlockingPool
from app.core.formats.crc64 import encode_crc64
from app.core.stores.remote.keys import check_key, check_prefix
from app.core.stores.remote.protocol import (
    BlobInfo,
    BlobMissing,
    Body,
    BytesBody,
    FileBody,
    RemoteMisconfigured,
)
from app.core.stores.remote.requests import Retrier
from app.core.stores.remote.s3_body import FileStream, OpenedFile
from app.core.stores.remote.s3_client import S3Options, deadlines, open_client
from app.core.stores.remote.s3_errors import (
    VENDOR_ERRORS,
    ConditionFailed,
    Effect,
    crc64_of,
    map_error,
    size_behind_416,
    status_of,
)
from app.core.stores.remote.s3_multipart import MultipartUpload
from app.core.stores.remote.streams import closing

READ_BYTES = 128 * 1024
DELETE_COUNT_MAX = 1000


class S3RemoteStore:
    def __init__(
        self,
        client: Any,
        options: S3Options,
        *,
        retrier: Retrier,
        pool: BlockingPool,
        closing: AsyncExitStack,
    ) -> None:
        """`retrier` serves the requests inside a compound call (listing pages, multipart parts);
        the calls themselves are made once.
        """
        self._client = client
        self._options = options
        self._prefix = f"{options.prefix.strip('/')}/" if options.prefix.strip("/") else ""
        self._retrier = retrier
        self._pool = pool
        self._closing = closing
        self._stored_as = _stored_as(options)

    @classmethod
    async def open(cls, options: S3Options, *, retrier: Retrier, pool: BlockingPool) -> Self:
        """Asks the store nothing, `probe` does; the SDK may fetch credentials."""
        async with AsyncExitStack() as stack:
            client = await open_client(stack, options)
            return cls(client, options, retrier=retrier, pool=pool, closing=stack.pop_all())

    def __repr__(self) -> str:
        return f"<S3RemoteStore s3://{self._options.bucket}/{self._prefix}>"

    async def aclose(self) -> None:
        await self._closing.aclose()

    # --- writing ------------------------------------------------------------------------------

    async def put_blob(self, key: str, body: Body) -> BlobInfo:
        match body:
            case BytesBody():
                return await self._put("put_blob", key, body)
            case FileBody():
                async with OpenedFile(body.path, length=body.bytes, pool=self._pool) as file:
                    if body.bytes > self._options.single_put_bytes_max:
                        return await self._put_in_parts(key, body, file.fd)
                    return await self._put("put_blob", key, body, fd=file.fd)

    async def put_if_absent(self, key: str, body: BytesBody) -> BlobInfo | None:
        return await self._put_if("put_if_absent", key, body, IfNoneMatch="*")

    async def put_if_match(self, key: str, body: BytesBody, *, etag: str) -> BlobInfo | None:
        return await self._put_if("put_if_match", key, body, IfMatch=etag)

    async def _put_if(
        self, op: str, key: str, body: BytesBody, **condition: str
    ) -> BlobInfo | None:
        try:
            return await self._put(op, key, body, condition=condition)
        except (ConditionFailed, BlobMissing):  # some answer 404 to If-Match where nothing is
            return None

    async def _put(
        self,
        op: str,
        key: str,
        body: Body,
        *,
        fd: int = -1,
        condition: dict[str, str] | None = None,
    ) -> BlobInfo:
        with self._mapped(op, key, effect="write"):
            async with self._deadlines() as progress:
                stream = self._stream(body, fd, progress)
                with _reading(stream):
                    answer = await self._client.put_object(
                        Bucket=self._options.bucket,
                        Key=self._full(key),
                        Body=stream,
                        ContentLength=body.bytes,
                        ChecksumCRC64NVME=encode_crc64(body.crc64),
                        **self._stored_as,
                        **(condition or {}),
                    )
        confirmed = crc64_of(answer)
        if confirmed is None:
            return await self._confirmed_by_head(key, body)
        if confirmed != body.crc64:
            raise OutcomeUnknown("The store confirms another checksum.", op=op, key=key)
        return BlobInfo(
            key=key,
            bytes=body.bytes,
            crc64=confirmed,
            etag=str(answer["ETag"]),
            modified_at_us=_date_us(answer),
        )

    def _stream(self, body: Body, fd: int, progress: Callable[[], None]) -> FileStream | bytes:
        if isinstance(body, BytesBody):
            return body.data
        return FileStream(
            fd, first=0, length=body.bytes, pool=self._pool, progress=(progress, body.on_moved)
        )

    async def _confirmed_by_head(self, key: str, body: Body) -> BlobInfo:
        """For endpoints whose PUT answers name no checksum."""
        found = await self.head_blob(key)
        if found is None or (found.crc64 is not None and found.crc64 != body.crc64):
            raise OutcomeUnknown("The store holds something else than was uploaded.", key=key)
        if found.crc64 is None:
            raise RemoteMisconfigured("The store keeps no CRC-64/NVME of its objects.", key=key)
        if found.bytes != body.bytes:
            raise OutcomeUnknown("The store holds another length than was uploaded.", key=key)
        return found

    async def _put_in_parts(self, key: str, body: FileBody, fd: int) -> BlobInfo:
        upload = MultipartUpload(
            self._client,
            bucket=self._options.bucket,
            key=self._full(key),
            body=body,
            fd=fd,
            part_bytes=self._options.part_bytes,
            stored_as=self._stored_as,
            pool=self._pool,
            retrier=self._retrier,
            deadlines=self._deadlines,
            mapped=lambda effect: self._mapped("put_blob", key, effect=effect),
        )
        try:
            await upload.run()
        except OutcomeUnknown:
            found = await self.head_blob(key)
            if found is None or (found.bytes, found.crc64) != (body.bytes, body.crc64):
                raise
            return found
        return await self._confirmed_by_head(key, body)

    # --- reading ------------------------------------------------------------------------------

    async def head_blob(self, key: str) -> BlobInfo | None:
        try:
            with self._mapped("head_blob", key, effect="read"):
                async with self._deadlines():
                    answer = await self._client.head_object(
                        Bucket=self._options.bucket, Key=self._full(key), ChecksumMode="ENABLED"
                    )
        except BlobMissing:
            return None
        return BlobInfo(
            key=key,
            bytes=int(answer["ContentLength"]),
            crc64=crc64_of(answer),
            etag=str(answer["ETag"]),
            modified_at_us=round(answer["LastModified"].timestamp() * 1e6),
        )

    async def get_blob(self, key: str, *, first: int = 0, length: int | None = None) -> bytes:
        """Raises CorruptBlob where the object does not hold the whole range."""
        with self._mapped("get_blob", key, effect="read"):
            async with self._deadlines() as progress:
                pieces = []
                async with closing(self._pieces(key, first, length)) as stream:
                    async for piece in stream:
                        pieces.append(piece)
                        progress()
                return b"".join(pieces)

    async def iter_blob(
        self, key: str, *, first: int = 0, length: int | None = None
    ) -> AsyncIterator[bytes]:
        """One attempt: raises RemoteUnavailable where the connection breaks. A whole object is
        checked against the store's checksum at its end, so it is good only once the stream ended.
        """
        with self._mapped("iter_blob", key, effect="read"):
            async with closing(self._pieces(key, first, length)) as stream:
                async for piece in stream:
                    yield piece

    async def _pieces(self, key: str, first: int, length: int | None) -> AsyncIterator[bytes]:
        full = self._full(key)
        if length == 0:
            return
        idle_seconds = self._options.idle_timeout_seconds
        async with asyncio.timeout(idle_seconds + self._options.connect_timeout_seconds):
            answer = await self._open_range(full, first, length)
        if answer is None:
            return
        body, left = answer["Body"], int(answer["ContentLength"])
        try:
            if length is not None and left != length:
                raise CorruptBlob("The object ends before the range does.", key=key)
            # Read to the end that the transport sees: only there the checksum is compared.
            while True:
                async with asyncio.timeout(idle_seconds):
                    piece = await body.read(READ_BYTES)
                if not piece:
                    return
                left -= len(piece)
                yield piece
        finally:
            body.close()

    async def _open_range(self, full: str, first: int, length: int | None) -> Any:
        """None for the empty range at an object's very end."""
        where: dict[str, str] = {}
        if first == 0 and length is None:
            where["ChecksumMode"] = "ENABLED"
        else:
            where["Range"] = f"bytes={first}-" + ("" if length is None else f"{first + length - 1}")
        try:
            answer = await self._client.get_object(Bucket=self._options.bucket, Key=full, **where)
        except ClientError as error:
            if status_of(error) != 416:
                raise
            if length is None and size_behind_416(error) == first:
                return None
            raise CorruptBlob("The object ends before the range begins.", key=full) from error
        if "Range" in where and "ContentRange" not in answer:
            answer["Body"].close()
            raise RemoteMisconfigured("The endpoint ignores Range.", key=full)
        return answer

    # --- deleting and listing -----------------------------------------------------------------

    async def delete_blobs(self, keys: Sequence[str]) -> Sequence[str]:
        if len(keys) > DELETE_COUNT_MAX:
            raise ValueError(f"at most {DELETE_COUNT_MAX} keys at once")
        if not keys:
            return ()
        objects = [{"Key": self._full(key)} for key in keys]
        with self._mapped("delete_blobs", keys[0], effect="write"):
            async with self._deadlines():
                answer = await self._client.delete_objects(
                    Bucket=self._options.bucket, Delete={"Objects": objects, "Quiet": True}
                )
        return tuple(
            str(failed["Key"]).removeprefix(self._prefix)
            for failed in answer.get("Errors", ())
            if failed.get("Code") not in {"NoSuchKey", "404"}
        )

    async def list_blobs(self, prefix: str) -> AsyncIterator[BlobInfo]:
        """Each page is tried again by itself; a listing that ends is complete (I8)."""
        full = self._prefix + check_prefix(prefix)
        token: str | None = None
        while True:
            page = await self._retrier.run("list_blobs", partial(self._page, full, token))
            for found in page.get("Contents", ()):
                yield self._listed(found, full)
            if not page["IsTruncated"]:
                return
            if page.get("NextContinuationToken") in {None, token}:
                raise RemoteUnavailable("A listing cannot be continued.", prefix=prefix)
            token = str(page["NextContinuationToken"])

    async def _page(self, full: str, token: str | None) -> Any:
        after = {} if token is None else {"ContinuationToken": token}
        with self._mapped("list_blobs", full, effect="read"):
            async with self._deadlines():
                page = await self._client.list_objects_v2(
                    Bucket=self._options.bucket,
                    Prefix=full,
                    MaxKeys=self._options.list_page_count,
                    **after,
                )
        if "IsTruncated" not in page:
            raise RemoteUnavailable("A listing does not say whether it is complete.", prefix=full)
        return page

    def _listed(self, found: Any, full: str) -> BlobInfo:
        name = str(found["Key"])
        if not name.startswith(full):
            raise RemoteUnavailable("A listing names an object outside its prefix.", prefix=full)
        return BlobInfo(
            key=name.removeprefix(self._prefix),
            bytes=int(found["Size"]),
            crc64=None,
            etag=str(found["ETag"]),
            modified_at_us=round(found["LastModified"].timestamp() * 1e6),
        )

    # --- the edge -----------------------------------------------------------------------------

    def _full(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _deadlines(self) -> AbstractAsyncContextManager[Callable[[], None]]:
        return deadlines(
            idle_seconds=self._options.idle_timeout_seconds,
            total_seconds=self._options.request_timeout_seconds,
        )

    @contextlib.contextmanager
    def _mapped(self, op: str, key: str, *, effect: Effect) -> Iterator[None]:
        try:
            yield
        except VENDOR_ERRORS as error:
            raise map_error(error, op=op, effect=effect, key=key) from error


@contextlib.contextmanager
def _reading(stream: FileStream | bytes) -> Iterator[None]:
    """Tells a file that cannot be read from a connection that broke."""
    try:
        yield
    except VENDOR_ERRORS:
        if isinstance(stream, FileStream) and stream.failure is not None:
            raise stream.failure from None
        raise


def _stored_as(options: S3Options) -> dict[str, str]:
    chosen = {
        "StorageClass": options.storage_class,
        "ServerSideEncryption": options.sse,
        "SSEKMSKeyId": options.sse_kms_key_id,
    }
    return {name: value for name, value in chosen.items() if value is not None}


def _date_us(answer: Any) -> int:
    """When the store answered; 0 where it does not say."""
    text = answer["ResponseMetadata"]["HTTPHeaders"].get("date", "")
    try:
        return round(parsedate_to_datetime(text).timestamp() * 1e6)
    except ValueError:
        return 0
