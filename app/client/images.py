"""A database's image, read by threads: any part of it at one state.

Reading 256 MiB through the event loop takes three times the CPU time that threads take for it.

Concurrency: a reader may have any number of parts open at once; each is drained by one thread.
Cancellation: `stop` ends a part under way at its next piece, and wakes it where it waits for one.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import httpx

from app.client.calls import Calls
from app.client.databases import database_path
from app.client.failures import UnexpectedAnswer

_ANY_STATUS = frozenset(range(400, 600))
# what is sent is what is counted
_AS_IT_IS = {"Accept-Encoding": "identity"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A database at a state; the newest one unless another is chosen."""

    tenant: str
    database: str
    generation: int | None = None
    snapshot: str | None = None
    at: datetime | None = None

    @property
    def path(self) -> str:
        return f"{database_path(self.tenant, self.database)}/image"

    @property
    def params(self) -> dict[str, Any]:
        return {
            "generation": self.generation,
            "snapshot": self.snapshot,
            "at": None if self.at is None else self.at.isoformat().replace("+00:00", "Z"),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageState:
    """What the service says of an image: the ETag names one state of one database."""

    etag: str
    content_bytes: int
    generation: int | None
    lsn: int | None


class Body:
    """An answer's body, drained once by one thread."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self._is_stopped = False

    def drain_blocking(self, take: Callable[[bytes], None]) -> None:
        """Gives all of it to `take`, in pieces of no certain size. Raises httpx.TransportError
        where it breaks off, `stop` included.
        """
        try:
            for piece in self._response.iter_raw():
                if self._is_stopped:
                    raise httpx.ReadError("stopped")
                take(piece)
        finally:
            self._response.close()

    def stop(self) -> None:
        self._is_stopped = True
        stream = self._response.extensions.get("network_stream")
        connection = None if stream is None else stream.get_extra_info("socket")
        if isinstance(connection, socket.socket):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    async def aclose(self) -> None:
        await asyncio.to_thread(self._response.close)


class ImageReader:
    """`Images.reading` makes one."""

    def __init__(self, calls: Calls, http: httpx.Client, wanted: Wanted) -> None:
        self._calls = calls
        self._http = http
        self._wanted = wanted

    async def look(self) -> ImageState | None:
        """None where the service refuses to say; `open` then says why."""
        answer = await self._calls.send(
            "HEAD", self._wanted.path, params=self._wanted.params, accepted=_ANY_STATUS
        )
        return None if answer.status_code >= 400 else _state(answer.headers)

    async def open(self) -> tuple[ImageState, Body]:
        """The whole of it. Raises ProblemError, ServiceUnreachable, UnexpectedAnswer."""
        response = await self._opened(200, {})
        return _state(response.headers), Body(response)

    async def open_part(self, state: ImageState, *, first: int, end: int) -> Body:
        """The bytes from `first` to before `end`. Raises as `open` does; ProblemError with
        `precondition_failed` if the database is no longer in that state.
        """
        headers = {"Range": f"bytes={first}-{end - 1}", "If-Match": state.etag}
        response = await self._opened(206, headers)
        span = f"bytes {first}-{end - 1}/{state.content_bytes}"
        if response.headers.get("ETag") != state.etag or (
            response.headers.get("Content-Range") != span
        ):
            await Body(response).aclose()
            raise UnexpectedAnswer("The answer is of another part of the image, or of another one.")
        return Body(response)

    def unreachable(self, error: httpx.TransportError) -> Exception:
        return self._calls.unreachable(error)

    async def back_off(self, *, attempt: int) -> None:
        await self._calls.back_off(attempt=attempt)

    async def _opened(self, status: int, headers: dict[str, str]) -> httpx.Response:
        response = await self._calls.open_blocking(
            self._http,
            self._wanted.path,
            params=self._wanted.params,
            headers=_AS_IT_IS | headers,
        )
        if response.status_code != status or "Content-Encoding" in response.headers:
            await Body(response).aclose()
            raise UnexpectedAnswer(f"An image was asked for, and {response.status_code} came.")
        return response


class Images:
    def __init__(self, calls: Calls, connect: Callable[[], httpx.Client]) -> None:
        self._calls = calls
        self._connect = connect

    @asynccontextmanager
    async def reading(self, wanted: Wanted) -> AsyncIterator[ImageReader]:
        """With connections of its own; whatever was opened must have been drained or closed."""
        http = await asyncio.to_thread(self._connect)
        try:
            yield ImageReader(self._calls, http, wanted)
        finally:
            await asyncio.to_thread(http.close)


def _state(headers: httpx.Headers) -> ImageState:
    etag, length = headers.get("ETag", ""), headers.get("Content-Length", "")
    if not etag.startswith('"') or not length.isdecimal():
        raise UnexpectedAnswer("The answer has no strong ETag or no Content-Length.")
    return ImageState(
        etag=etag,
        content_bytes=int(length),
        generation=_number(headers.get("Bop-Generation", "")),
        lsn=_number(headers.get("Bop-Lsn", "")),
    )


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None
