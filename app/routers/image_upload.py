"""`PUT …/image`: a whole SQLite file becomes a database's content.

Invariants: I1: an answer says that all of it is durable. I13: refused, it leaves nothing; its
header is looked at as soon as that has arrived. Concurrency: see services/pages_in.py.
Cancellation: a body that breaks off is thrown away. Crash: the whole image is there, or none of
it; sent again, it differs in nothing.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from app.core.base.errors import (
    Backpressure,
    BodyTooLarge,
    CorruptBlob,
    CorruptWal,
    DatabaseNotFound,
    DiskFull,
    ImageInvalid,
    InvalidRequest,
    PageSizeMismatch,
    PreconditionFailed,
    QuotaExhausted,
    RemoteUnavailable,
    TransactionTooLarge,
    UnsupportedMediaType,
    WalLost,
    WrongEngine,
)
from app.core.formats.sqlite_image import IMAGE_HEADER_BYTES
from app.core.services.image_draft import ImageDraft
from app.core.services.pages_in import ContentState, LogPlace
from app.routers.auth import needs
from app.routers.bodies import BodyReader
from app.routers.databases import DATABASE_PATH
from app.routers.deps import DatabaseName, TenantName, desk_of
from app.routers.exchange import exchange_of
from app.routers.openapi import problems
from app.routers.ranges import REPLACING_PARAMETERS, check_replacing
from app.routers.raw_bodies import RawBody
from app.routers.route import ScopedRoute
from app.routers.schemas import ImageStoredView
from app.routers.wal import BYTES_MAX, RAW_BODY

router = APIRouter(route_class=ScopedRoute, tags=["libsql"])
_WORD: dict[str, Any] = {"ge": 0, "le": 2**32 - 1}


@router.put(
    f"{DATABASE_PATH}/image",
    openapi_extra={**RAW_BODY, "parameters": list(REPLACING_PARAMETERS)},
    responses=problems(
        ImageInvalid,
        DatabaseNotFound,
        WrongEngine,
        PageSizeMismatch,
        PreconditionFailed,
        WalLost,
        BodyTooLarge,
        UnsupportedMediaType,
        TransactionTooLarge,
        Backpressure,
        CorruptBlob,
        CorruptWal,
        RemoteUnavailable,
        QuotaExhausted,
        DiskFull,
    ),
)
@needs("write")
async def put_image(
    tenant: TenantName,
    database: DatabaseName,
    request: Request,
    salt1: Annotated[int | None, Query(**_WORD)] = None,
    salt2: Annotated[int | None, Query(**_WORD)] = None,
    offset: Annotated[
        int | None,
        Query(ge=0, le=BYTES_MAX, description="How far in the log the image's state is."),
    ] = None,
    checksum1: Annotated[int | None, Query(**_WORD)] = None,
    checksum2: Annotated[int | None, Query(**_WORD)] = None,
) -> ImageStoredView:
    """Makes the file the content, in one commit. The five parameters, all or none, state the
    position in the application's WAL that it includes; `POST …/wal` goes on there. `If-Match` with
    the image's ETag, or `If-None-Match: *`, make sure of what it replaces.
    """
    desk = desk_of(request)
    pages_in = desk.services.pages_in
    place = _place(offset, salt1, salt2, checksum1, checksum2)
    page_size = pages_in.check_writable(tenant, database)
    exchange = exchange_of(request)

    def condition(replaced: ContentState) -> None:
        check_replacing(request, etag=f'"{replaced.tag}"', exists=not replaced.is_empty)

    condition(pages_in.content_state(tenant, database))  # before the body comes, and again after

    async def draft(head: bytes) -> ImageDraft | None:
        if exchange.body_declared is None:
            return None
        return await pages_in.draft_image(
            tenant, database, head, size_bytes=exchange.body_declared, place=place
        )

    reader = BodyReader(exchange, desk.image_limits, clock=desk.clock)
    async with RawBody(
        reader,
        memory=desk.memory,
        spool=desk.spool,
        head_bytes=IMAGE_HEADER_BYTES,
        check_head=lambda head: pages_in.check_image_head(head, page_size=page_size),
        draft=draft,
    ) as body:
        stored = await pages_in.put_image(
            tenant, database, await body.read(), place=place, condition=condition
        )
    return ImageStoredView.of(stored)


def _place(
    offset: int | None,
    salt1: int | None,
    salt2: int | None,
    checksum1: int | None,
    checksum2: int | None,
) -> LogPlace | None:
    """Raises InvalidRequest where only some are given."""
    given = {
        "offset": offset, "salt1": salt1, "salt2": salt2, "checksum1": checksum1,
        "checksum2": checksum2,
    }  # fmt: skip
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if (
        offset is None or salt1 is None or salt2 is None or checksum1 is None or checksum2 is None
    ):  # fmt: skip
        raise InvalidRequest(
            "A position in the log takes all of offset, salt1, salt2, checksum1 and checksum2.",
            errors=[
                {"loc": ["query", name], "msg": "Field required", "type": "missing"}
                for name in missing
            ],
        )
    return LogPlace(
        offset=offset, salt1=salt1, salt2=salt2, checksum1=checksum1, checksum2=checksum2
    )
