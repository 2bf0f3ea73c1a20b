"""Cold scans: a generation streamed as checksummed frames, straight from the remote store.

Invariants: I10: a frame leaves only after its content was checked; what fails once the stream has
begun is told by an error frame, and a stream without its end frame is broken. I11: a scan holds
some MiB. A reader that left, or takes too long over a piece, is cut off, and its reads and pins go
at once (I8).
Concurrency: reads run ahead of what is being sent. Cancellation: as for a reader that left.
Crash: nothing is held.
"""

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from starlette.types import Message, Receive, Scope, Send

from app.core.base.errors import (
    BopError,
    CorruptBlob,
    DatabaseNotFound,
    FeatureDisabled,
    GenerationExpired,
    InternalError,
    InvalidRequest,
    LsnTruncated,
    NoGeneration,
    NotReady,
    SnapshotNotFound,
    WrongEngine,
)
from app.core.formats.cold_scan import MEDIA_TYPE, Frame, FrameType, note_frame
from app.core.reads.scan_plan import ScanRange
from app.core.services.cold_scans import ColdScan, Throttle
from app.routers.auth import needs, require_tenant
from app.routers.deps import Desk, desk_of
from app.routers.exchange import ClientGone, Exchange, exchange_of, principal_of
from app.routers.openapi import problems
from app.routers.problems import STATUS, problem_members
from app.routers.route import ScopedRoute
from app.routers.schemas import NAME_PATTERN
from app.routers.selectors import GENERATION_PARAMETER, SNAPSHOT_PARAMETER, selector_of
from app.routers.waiting import while_connected

router = APIRouter(route_class=ScopedRoute, tags=["cold scan"])
PIECE_BYTES = 1024 * 1024
NUMBER_MAX = 2**63 - 1

Name = Annotated[str, Query(pattern=NAME_PATTERN)]
Chunk = Annotated[int | None, Query(ge=0, le=NUMBER_MAX, description="Inclusive.")]
Bound = Annotated[int | None, Query(ge=1, le=NUMBER_MAX, description="Inclusive.")]
Rate = Annotated[
    int | None,
    Query(ge=1, le=NUMBER_MAX, description="Of bytes read from the remote store."),
]

_SELECTORS: dict[str, Any] = {
    "parameters": [
        {**GENERATION_PARAMETER, "description": "That generation; by default the newest."},
        SNAPSHOT_PARAMETER,
    ]
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": 'Frames back to back: `"BOPF"`, u8 type, 3 zero bytes, u32 chunk_id, u64 '
        "first, u32 count, u32 payload length, u64 CRC-64/NVME of the payload (little-endian), "
        "payload. Types: 0 start, 1 pages, 2 records, 3 end, 4 error. A stream without type 3 "
        "is broken.",
        "headers": {
            "Bop-Generation": {
                "description": "The one that is scanned.",
                "schema": {"type": "integer"},
            }
        },
        "content": {
            MEDIA_TYPE: {
                "schema": {"type": "string", "format": "binary"},
                "example": 'BOPF…{"tenant":"acme","database":"orders","engine":"libsql",…}',
            }
        },
    },
    **problems(
        DatabaseNotFound,
        SnapshotNotFound,
        WrongEngine,
        NoGeneration,
        FeatureDisabled,
        GenerationExpired,
        LsnTruncated,
    ),
}


@router.get("/cold-scan", response_class=Response, openapi_extra=_SELECTORS, responses=_RESPONSES)
@needs("read")
async def scan_cold(
    request: Request,
    tenant: Name,
    database: Name,
    first_chunk: Chunk = None,
    last_chunk: Chunk = None,
    first_page: Bound = None,
    last_page: Bound = None,
    from_lsn: Bound = None,
    to_lsn: Bound = None,
    max_bytes_per_second: Rate = None,
    priority: Literal["low", "normal"] = "normal",
) -> Response:
    """Reads a generation, or a range of it, past the caches: for analysis beside the service's
    other work. Ask again behind the last frame that came to go on with a broken scan.
    """
    require_tenant(principal_of(request), tenant)
    selector = selector_of(request, takes_time=False)
    for name, first, last in (
        ("last_chunk", first_chunk, last_chunk),
        ("last_page", first_page, last_page),
        ("to_lsn", from_lsn, to_lsn),
    ):
        if first is not None and last is not None and last < first:
            raise InvalidRequest(
                f"{name}: the range ends before it begins.",
                errors=[{"loc": ["query", name], "msg": "ends before it begins",
                         "type": "value_error"}],
            )  # fmt: skip
    desk = desk_of(request)
    scan = await desk.services.cold_scans.open(
        tenant,
        database,
        selector,
        wanted=ScanRange(
            first_chunk=first_chunk, last_chunk=last_chunk, first_page=first_page,
            last_page=last_page, from_lsn=from_lsn, to_lsn=to_lsn,
        ),
        throttle=Throttle(bytes_per_second=max_bytes_per_second, priority=priority),
    )  # fmt: skip
    return ColdScanResponse(scan, desk, exchange_of(request))


class ColdScanResponse(Response):
    """Sends a scan's frames and closes the scan, however the sending ends."""

    media_type = MEDIA_TYPE

    def __init__(self, scan: ColdScan, desk: Desk, exchange: Exchange) -> None:
        super().__init__(headers={"Bop-Generation": str(scan.start.generation)})
        del self.headers["content-length"]
        self._scan = scan
        self._desk = desk
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        stall_seconds = self._desk.settings.body_idle_timeout_seconds

        async def send_in_time(message: Message) -> None:
            """A client that does not read must not hold a generation for ever."""
            try:
                async with asyncio.timeout(stall_seconds):
                    await send(message)
            except TimeoutError as error:
                raise ClientGone(f"nothing was read for {stall_seconds:g} s") from error

        start: Message = {
            "type": "http.response.start", "status": self.status_code, "headers": self.raw_headers
        }  # fmt: skip
        try:
            await send_in_time(start)
            try:
                await while_connected(
                    self._send_frames(send_in_time),
                    receive=self._exchange.receive,
                    stopping=self._desk.stopping,
                )
            except NotReady as error:  # the service stops
                await _send_frame(self._failure(error), send_in_time)
            await send_in_time({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._scan.aclose()

    async def _send_frames(self, send: Send) -> None:
        async with aclosing(self._scan.frames()) as frames:
            try:
                async for frame in frames:
                    await _send_frame(frame, send)
            except BopError as error:
                self._exchange.note(error)
                await _send_frame(self._failure(error), send)

    def _failure(self, error: BopError) -> Frame:
        told = error if STATUS[error.kind] != 500 or isinstance(error, CorruptBlob) else (
            InternalError("See the log by request_id.")
        )  # fmt: skip
        return note_frame(
            FrameType.ERROR,
            problem_members(
                code=told.code,
                title=told.title,
                status=int(STATUS[told.kind]),
                detail=told.advice,
                extras={"request_id": self._exchange.request_id, **told.fields},
            ),
        )


async def _send_frame(frame: Frame, send: Send) -> None:
    for piece in _pieces(frame):
        await send({"type": "http.response.body", "body": piece, "more_body": True})


def _pieces(frame: Frame) -> Iterator[bytes | memoryview]:
    yield frame.header()
    payload = memoryview(frame.payload)
    for start in range(0, len(payload), PIECE_BYTES):
        yield payload[start : start + PIECE_BYTES]
