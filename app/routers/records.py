"""Records of append_only databases: append them, stream them.

Invariants: I1: an append is answered once its records are durable. I13: a body that is refused
or breaks off stores nothing. A stream that fails after it began ends the connection.

Concurrency: a body is read whole before the database is asked to take it, so a slow client holds
up nobody. Cancellation: what a stream pins is let go. Crash: the answer may be lost; an
Idempotency-Key makes the retry safe.
"""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from app.core.base.errors import (
    Backpressure,
    BodyTooLarge,
    CorruptBlob,
    CorruptWal,
    DatabaseNotFound,
    DiskFull,
    IdempotencyKeyReused,
    LsnMismatch,
    LsnTruncated,
    MalformedRecords,
    NotAcceptable,
    NotLineRecords,
    QuotaExhausted,
    RecordTooLarge,
    RemoteUnavailable,
    UnsupportedMediaType,
    WalLost,
    WrongEngine,
)
from app.core.formats.record_framing import LENGTH_BYTES
from app.core.reads.record_reader import RecordStream
from app.routers.auth import needs
from app.routers.bodies import LINES, OCTETS, RECORDS, BodyReader, RecordBody, framer_for
from app.routers.databases import DATABASE_PATH
from app.routers.deps import NAME_PARAMETERS, DatabaseName, TenantName, WaitQuery, desk_of, names_of
from app.routers.exchange import exchange_of, principal_of
from app.routers.headers import (
    checked_idempotency_key,
    expected_next_lsn,
    media_type_of,
    negotiated,
    scope_hash,
)
from app.routers.openapi import problems
from app.routers.route import ScopedRoute
from app.routers.schemas import AppendedView
from app.routers.waiting import while_connected

router = APIRouter(route_class=ScopedRoute, tags=["records"])
RECORDS_PATH = f"{DATABASE_PATH}/records"
OFFERED = (RECORDS, LINES)
LSN_MAX = 2**63 - 1

_BINARY = {"type": "string", "format": "binary"}
_FRAMED_EXAMPLE = "\x05\x00\x00\x00hello"
_LINES_EXAMPLE = '{"n":1}\n{"n":2}\n'
_APPEND: dict[str, Any] = {
    "parameters": [
        *NAME_PARAMETERS,
        {
            "name": "If-Match",
            "in": "header",
            "description": '`"<next_lsn>"`: append only if that is the next LSN.',
            "schema": {"type": "string", "pattern": '^"[0-9]{1,19}"$'},
            "example": '"1"',
        },
        {
            "name": "Idempotency-Key",
            "in": "header",
            "description": "Remembered for the database's last 10,000 appends of 24 h.",
            "schema": {"type": "string", "minLength": 1, "maxLength": 255},
        },
    ],
    "requestBody": {
        "required": True,
        "content": {
            OCTETS: {"schema": _BINARY, "example": "one record"},
            LINES: {"schema": {"type": "string"}, "example": _LINES_EXAMPLE},
            RECORDS: {"schema": _BINARY, "example": _FRAMED_EXAMPLE},
        },
    },
}
_STREAM_HEADERS: dict[str, Any] = {
    "Bop-First-Lsn": {
        "description": "Of the first record sent; missing if there is none.",
        "schema": {"type": "integer"},
    },
    "Bop-Last-Lsn": {
        "description": "Of the last record sent; missing if there is none.",
        "schema": {"type": "integer"},
    },
    "Bop-Next-Lsn": {"description": "Where to go on.", "schema": {"type": "integer"}},
}


@router.post(
    RECORDS_PATH,
    status_code=201,
    response_model=AppendedView,
    openapi_extra=_APPEND,
    responses=problems(
        MalformedRecords,
        DatabaseNotFound,
        WrongEngine,
        WalLost,
        LsnMismatch,
        RecordTooLarge,
        BodyTooLarge,
        UnsupportedMediaType,
        IdempotencyKeyReused,
        Backpressure,
        CorruptWal,
        QuotaExhausted,
        DiskFull,
    ),
)
@needs("write")
async def append_records(request: Request) -> Response:
    """Appends the body's records, all of them or none. 201 says that they are durable."""
    desk, exchange, headers = desk_of(request), exchange_of(request), request.headers
    tenant, database = names_of(request)
    next_lsn = expected_next_lsn(headers.get("if-match"))
    key_hash = None
    if (key := checked_idempotency_key(headers.get("idempotency-key"))) is not None:
        route = f"POST /tenants/{tenant}/databases/{database}/records"
        key_hash = scope_hash(principal_of(request), route=route, key=key)
    records = desk.services.records
    limits = records.check_appendable(tenant, database)
    framer = framer_for(
        media_type_of(headers.get("content-type")),
        record_bytes_max=limits.record_bytes_max,
    )
    reader = BodyReader(exchange, desk.append_limits, clock=desk.clock)
    hashed = key_hash is not None
    async with RecordBody(
        reader, framer, memory=desk.memory, spool=desk.spool, hashed=hashed
    ) as body:
        await body.read()
        appended = await records.append(
            tenant,
            database,
            body.entries,
            expected_next_lsn=next_lsn,
            key_hash=key_hash,
            body_hash=body.body_hash,
        )
    answer = b'{"first_lsn":%d,"last_lsn":%d,"count":%d,"bytes":%d}' % (
        appended.first_lsn,
        appended.last_lsn,
        appended.count,
        appended.payload_bytes - LENGTH_BYTES * appended.count,
    )
    return Response(answer, status_code=201, media_type="application/json")


@router.head(RECORDS_PATH, include_in_schema=False)
@router.get(
    RECORDS_PATH,
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "The records in LSN order, up to a gap.",
            "headers": _STREAM_HEADERS,
            "content": {
                RECORDS: {"schema": _BINARY, "example": _FRAMED_EXAMPLE},
                LINES: {"schema": {"type": "string"}, "example": _LINES_EXAMPLE},
            },
        },
        **problems(
            DatabaseNotFound,
            WrongEngine,
            NotAcceptable,
            NotLineRecords,
            LsnTruncated,
            CorruptBlob,
            CorruptWal,
            RemoteUnavailable,
        ),
    },
)
@needs("read")
async def read_records(
    tenant: TenantName,
    database: DatabaseName,
    request: Request,
    from_lsn: Annotated[
        int | None,
        Query(ge=1, le=LSN_MAX, description="Default: the oldest readable LSN."),
    ] = None,
    to_lsn: Annotated[
        int | None, Query(ge=0, le=LSN_MAX, description="Inclusive. Default: the newest one.")
    ] = None,
    limit: Annotated[
        int | None, Query(ge=1, le=LSN_MAX, description="How many records at most.")
    ] = None,
    wait: WaitQuery = 0,
) -> Response:
    """Streams records. From `next_lsn` on it is empty; with `?wait=` it waits for the next one."""
    desk, exchange = desk_of(request), exchange_of(request)
    media_type = negotiated(request.headers.get("accept"), OFFERED)
    services = desk.services
    if from_lsn is None:
        from_lsn = services.databases.get(tenant, database).first_lsn
    opening = services.records.open_read(
        tenant,
        database,
        from_lsn=from_lsn,
        to_lsn=to_lsn,
        limit=limit,
        wait_seconds=wait,
        as_lines=media_type == LINES,
    )
    if wait > 0:
        stream = await while_connected(opening, receive=exchange.receive, stopping=desk.stopping)
    else:
        stream = await opening
    stall = desk.settings.body_idle_timeout_seconds
    return RecordsResponse(stream, media_type=media_type, stall_seconds=stall)


class RecordsResponse(StreamingResponse):
    """Sends a RecordStream and closes it, however the sending ends."""

    def __init__(self, stream: RecordStream, *, media_type: str, stall_seconds: float) -> None:
        headers = {"Bop-Next-Lsn": str(stream.next_lsn), "Cache-Control": "no-store"}
        if stream.first_lsn is not None:
            headers["Bop-First-Lsn"] = str(stream.first_lsn)
            headers["Bop-Last-Lsn"] = str(stream.last_lsn)
        super().__init__(stream.content, headers=headers, media_type=media_type)
        self._stream = stream
        self._stall_seconds = stall_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            """A client that does not read must not pin WAL and blobs for ever."""
            async with asyncio.timeout(self._stall_seconds):
                await send(message)

        try:
            if scope["method"] == "HEAD":
                start = {"type": "http.response.start", "status": self.status_code}
                await send({**start, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            else:
                await super().__call__(scope, receive, send_in_time)
        finally:
            await self._stream.aclose()
