"""A libsql database as a SQLite file: the whole of it, or ranges, at one state.

Invariants: I10: every page is checked before it is sent, and the first piece is read before the
answer begins, so that most damage is an error and not a broken stream. I11: a stream holds a few
pieces of 1 MiB. I4, I5: the state is held until the stream ends. A stream that fails after it
began ends the connection.
Concurrency: pieces are read ahead while one is sent. Cancellation: what is held is let go.
Crash: nothing is held.
"""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from app.core.base.errors import (
    CorruptBlob,
    CorruptWal,
    DatabaseNotFound,
    GenerationExpired,
    NoGeneration,
    PreconditionFailed,
    RangeNotSatisfiable,
    RemoteUnavailable,
    SnapshotNotFound,
    WrongEngine,
)
from app.core.services.images import Image
from app.routers.auth import needs
from app.routers.databases import DATABASE_PATH
from app.routers.deps import NAME_PARAMETERS, desk_of, names_of
from app.routers.openapi import problems
from app.routers.ranges import CONDITION_PARAMETERS, ByteRange, answer_to
from app.routers.route import ScopedRoute
from app.routers.selectors import (
    AT_PARAMETER,
    GENERATION_PARAMETER,
    SNAPSHOT_PARAMETER,
    selector_of,
)

router = APIRouter(route_class=ScopedRoute, tags=["images"])
IMAGE_PATH = f"{DATABASE_PATH}/image"
SQLITE = "application/vnd.sqlite3"

_HEADERS: dict[str, Any] = {
    "ETag": {
        "description": "Strong; names the state (database and LSN).",
        "schema": {"type": "string"},
    },
    "Bop-Generation": {
        "description": "The newest generation of the state; 0: none is published.",
        "schema": {"type": "integer"},
    },
    "Bop-Lsn": {"description": "The last LSN of the state.", "schema": {"type": "integer"}},
    "Accept-Ranges": {"description": "`bytes`", "schema": {"type": "string"}},
}
_CONTENT = {
    SQLITE: {"schema": {"type": "string", "format": "binary"}, "example": "SQLite format 3\x00…"}
}
_READ: dict[str, Any] = {
    "parameters": [
        *NAME_PARAMETERS,
        GENERATION_PARAMETER,
        SNAPSHOT_PARAMETER,
        AT_PARAMETER,
        *CONDITION_PARAMETERS,
    ]
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The SQLite file.", "headers": _HEADERS, "content": _CONTENT},
    206: {
        "description": "The range of it.",
        "headers": {**_HEADERS, "Content-Range": {"schema": {"type": "string"}}},
        "content": _CONTENT,
    },
    304: {"description": "The state is the one that `If-None-Match` names."},
    **problems(
        DatabaseNotFound,
        SnapshotNotFound,
        WrongEngine,
        NoGeneration,
        GenerationExpired,
        PreconditionFailed,
        RangeNotSatisfiable,
        CorruptBlob,
        CorruptWal,
        RemoteUnavailable,
    ),
}


@router.get(IMAGE_PATH, response_class=Response, openapi_extra=_READ, responses=_RESPONSES)
@needs("read")
async def read_image(request: Request) -> Response:
    """The database as a SQLite file, without a selector at its newest committed state. `If-Range`
    and `If-Match` hold a reader of ranges to one state.
    """
    return await _answer(request)


@router.head(
    IMAGE_PATH,
    response_class=Response,
    openapi_extra=_READ,
    responses={
        status: {"description": answer["description"], "headers": answer.get("headers", {})}
        for status, answer in _RESPONSES.items()
        if status not in {206, 416, 422, 500, 503}
    },
)
@needs("read")
async def look_at_image(request: Request) -> Response:
    """What GET would say of the whole file."""
    return await _answer(request)


async def _answer(request: Request) -> Response:
    tenant, database = names_of(request)
    selector = selector_of(request, takes_time=True)
    desk = desk_of(request)
    image = await desk.services.images.open(tenant, database, selector)
    content: AsyncGenerator[memoryview, None] | None = None
    try:
        etag, size = f'"{image.tag}"', image.size_bytes
        headers = {
            "ETag": etag,
            "Bop-Generation": str(image.generation),
            "Bop-Lsn": str(image.lsn),
            "Cache-Control": "no-cache",
            "Accept-Ranges": "bytes",
        }
        answer = answer_to(request, etag=etag, size=size)
        if answer == "not_modified":
            image.release()
            return Response(status_code=304, headers=headers)
        span = answer if isinstance(answer, ByteRange) else None
        first, stop = (span.first, span.stop) if span is not None else (0, size)
        headers["Content-Length"] = str(stop - first)
        if request.method == "HEAD":
            image.release()
            return Response(headers=headers, media_type=SQLITE)
        if span is not None:
            headers["Content-Range"] = span.content_range
        content = image.content(first, stop)
        first_piece = await anext(content, None)
        return ImageResponse(
            image, content, first_piece,
            status_code=206 if span is not None else 200, headers=headers,
            stall_seconds=desk.settings.body_idle_timeout_seconds,
        )  # fmt: skip
    except BaseException:
        if content is not None:
            await content.aclose()
        image.release()
        raise


class ImageResponse(StreamingResponse):
    """Sends an image's content and lets go of the image, however the sending ends."""

    def __init__(
        self,
        image: Image,
        content: AsyncGenerator[memoryview, None],
        first_piece: memoryview | None,
        *,
        status_code: int,
        headers: dict[str, str],
        stall_seconds: float,
    ) -> None:
        super().__init__(
            _joined(first_piece, content), status_code=status_code, headers=headers,
            media_type=SQLITE,
        )  # fmt: skip
        self._image = image
        self._content = content
        self._stall_seconds = stall_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            """A client that does not read must not hold a state for ever."""
            async with asyncio.timeout(self._stall_seconds):
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        finally:
            try:
                await self._content.aclose()
            finally:
                self._image.release()


async def _joined(
    first: memoryview | None, following: AsyncGenerator[memoryview, None]
) -> AsyncGenerator[memoryview, None]:
    piece = first
    while piece is not None:
        yield piece
        piece = await anext(following, None)
