"""`POST …/wal`: bytes of a SQLite write-ahead log, as they are on disk.

Invariants: I1: an answer says that what it counts is durable. I13: a body is stored up to its
last commit, or not at all. Concurrency: see services/pages_in.py; nothing is locked while a body
arrives. Cancellation: a body that breaks off is thrown away. Crash: sent again, what is stored is
recognised.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from app.core.base.errors import (
    Backpressure,
    BodyTooLarge,
    CorruptWal,
    DatabaseNotFound,
    DiskFull,
    PageSizeMismatch,
    QuotaExhausted,
    TransactionTooLarge,
    UnsupportedMediaType,
    WalGap,
    WalInvalid,
    WalLost,
    WrongEngine,
)
from app.routers.auth import needs
from app.routers.bodies import OCTETS, BodyReader
from app.routers.databases import DATABASE_PATH
from app.routers.deps import DatabaseName, TenantName, desk_of
from app.routers.exchange import exchange_of
from app.routers.openapi import problems
from app.routers.raw_bodies import RawBody
from app.routers.route import ScopedRoute
from app.routers.schemas import WalStoredView

router = APIRouter(route_class=ScopedRoute, tags=["libsql"])
BYTES_MAX = 2**63 - 1
RAW_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {OCTETS: {"schema": {"type": "string", "format": "binary"}, "example": "…"}},
    }
}


@router.post(
    f"{DATABASE_PATH}/wal",
    openapi_extra=RAW_BODY,
    responses=problems(
        WalInvalid,
        DatabaseNotFound,
        WrongEngine,
        WalGap,
        PageSizeMismatch,
        WalLost,
        BodyTooLarge,
        UnsupportedMediaType,
        TransactionTooLarge,
        Backpressure,
        CorruptWal,
        QuotaExhausted,
        DiskFull,
    ),
)
@needs("write")
async def append_wal(
    tenant: TenantName,
    database: DatabaseName,
    request: Request,
    offset: Annotated[
        int, Query(ge=0, le=BYTES_MAX, description="Where in the log the body begins.")
    ],
    after_lsn: Annotated[
        int | None,
        Query(
            ge=0,
            le=BYTES_MAX,
            description="With offset 0: the log starts from exactly the state of this LSN.",
        ),
    ] = None,
) -> WalStoredView:
    """Stores the body up to its last commit. Bytes after that are left for the next call."""
    desk = desk_of(request)
    pages_in = desk.services.pages_in
    pages_in.check_writable(tenant, database)
    reader = BodyReader(exchange_of(request), desk.wal_limits, clock=desk.clock)
    async with RawBody(reader, memory=desk.memory, spool=desk.spool) as body:
        stored = await pages_in.append_wal(
            tenant, database, await body.read(), offset=offset, after_lsn=after_lsn
        )
    return WalStoredView.of(stored)
