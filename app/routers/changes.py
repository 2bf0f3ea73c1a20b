"""The change feed: named cursors, changes behind them as pages or as events, acknowledgements.

A cursor belongs to its principal: another one's of the same name is another cursor. A token bound
to tenants is given their changes only (I12).
"""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from functools import partial
from http import HTTPStatus
from typing import Annotated, cast

import msgspec
from fastapi import APIRouter, Header, Path, Query, Request, Response

from app.core.base.errors import (
    CursorExpired,
    CursorNotFound,
    DiskFull,
    ManifestFull,
    NotAcceptable,
    UnsupportedMediaType,
)
from app.core.stores.manifest.records import ChangeRecord
from app.routers.auth import check_again, needs
from app.routers.changes_schemas import (
    AckBody,
    ChangePage,
    CursorPage,
    CursorView,
    PutCursorBody,
)
from app.routers.deps import desk_of, services_of
from app.routers.exchange import principal_of
from app.routers.headers import invalid_header, negotiated
from app.routers.openapi import MADE_HEADERS, problems
from app.routers.operations_schemas import ChangeView
from app.routers.paging import LIMIT_DEFAULT, LIMIT_MAX, PageQuery
from app.routers.route import JSON, ScopedRoute
from app.routers.schemas import NAME_PATTERN
from app.routers.sse import EventStream, ServerEvent

router = APIRouter(route_class=ScopedRoute, tags=["change feed"])
EVENT_STREAM = "text/event-stream"
PLACE_PATTERN = r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?(@[0-9]{1,19})?$"

CursorName = Annotated[str, Path(pattern=NAME_PATTERN, examples=["billing"])]
_WRITES = (DiskFull, ManifestFull)


@router.get("/change-cursors")
@needs("read")
async def list_cursors(page: PageQuery, request: Request, response: Response) -> CursorPage:
    """The principal's cursors, in order of their names."""
    found = services_of(request).change_feed.cursors(
        principal_of(request).name, limit=page.limit + 1, after=page.after(str)
    )
    shown, cursor = page.cut(
        found, lambda status: status.record.name, request=request, response=response
    )
    return CursorPage(items=[CursorView.of(status) for status in shown], next_cursor=cursor)


@router.put(
    "/change-cursors/{name}",
    response_model=CursorView,
    responses={
        201: {"model": CursorView, "description": "Made.", "headers": MADE_HEADERS},
        200: {"description": "There was one; it is set anew.", "headers": MADE_HEADERS},
        **problems(CursorExpired, UnsupportedMediaType, *_WRITES),
    },
)
@needs("read")
async def put_cursor(
    name: CursorName, body: PutCursorBody, request: Request, response: Response
) -> CursorView:
    """Makes a cursor, or sets it anew. Changes behind it are retained up to a limit."""
    status, is_new = await services_of(request).change_feed.put(
        principal_of(request).name, name, body.start
    )
    response.status_code = HTTPStatus.CREATED if is_new else HTTPStatus.OK
    response.headers["Location"] = f"/change-cursors/{name}"
    return CursorView.of(status)


@router.get("/change-cursors/{name}", responses=problems(CursorNotFound))
@needs("read")
async def show_cursor(name: CursorName, request: Request) -> CursorView:
    """Where the cursor stands, and whether it was left behind."""
    return CursorView.of(services_of(request).change_feed.get(principal_of(request).name, name))


@router.post(
    "/change-cursors/{name}/ack",
    responses=problems(CursorNotFound, CursorExpired, UnsupportedMediaType, *_WRITES),
)
@needs("read")
async def ack_cursor(name: CursorName, body: AckBody, request: Request) -> CursorView:
    """All changes up to `sequence` are done with. Acknowledging less than before changes
    nothing.
    """
    status = await services_of(request).change_feed.ack(
        principal_of(request).name, name, body.sequence
    )
    return CursorView.of(status)


@router.delete(
    "/change-cursors/{name}",
    status_code=HTTPStatus.NO_CONTENT,
    response_class=Response,
    responses=problems(CursorNotFound, *_WRITES),
)
@needs("read")
async def delete_cursor(name: CursorName, request: Request) -> Response:
    """Changes are no longer retained for it."""
    await services_of(request).change_feed.delete(principal_of(request).name, name)
    return Response(status_code=HTTPStatus.NO_CONTENT)


@router.get(
    "/changes",
    response_model=ChangePage,
    responses={
        200: {
            "content": {
                EVENT_STREAM: {
                    "schema": {"type": "string"},
                    "example": 'id: 7\nevent: change\ndata: {"sequence": 7, …}\n\n',
                }
            }
        },
        **problems(CursorNotFound, CursorExpired, NotAcceptable),
    },
)
@needs("read")
async def read_changes(
    request: Request,
    response: Response,
    cursor: Annotated[
        str,
        Query(
            pattern=PLACE_PATTERN,
            description="The cursor's name; or the `next_cursor` of the page before.",
            examples=["billing"],
        ),
    ],
    limit: Annotated[
        int, Query(ge=1, le=LIMIT_MAX, description="How many items at most.")
    ] = LIMIT_DEFAULT,
    accept: Annotated[str | None, Header()] = None,
    last_event_id: Annotated[str | None, Header(alias="Last-Event-ID")] = None,
) -> ChangePage | Response:
    """Changes behind what the cursor has acknowledged, oldest first; as an event stream, those
    to come as well. Reading moves nothing: acknowledge what is done with.
    """
    feed, principal = services_of(request).change_feed, principal_of(request)
    name, _, behind = cursor.partition("@")
    after = int(behind) if behind else None

    def sees(tenant: str) -> bool:
        return principal.sees(tenant)

    if negotiated(accept, (JSON, EVENT_STREAM)) == EVENT_STREAM:
        after = _last_seen(last_event_id, after)
        await feed.read(principal.name, name, limit=1, after=after, sees=sees)
        desk = desk_of(request)
        changes = feed.follow(principal.name, name, after=after, sees=sees)
        return EventStream(
            _events(changes),
            clock=desk.clock,
            stopping=desk.stopping,
            check=partial(check_again, request),
        )
    found = await feed.read(principal.name, name, limit=limit + 1, after=after, sees=sees)
    next_cursor = None
    if len(found) > limit:
        next_cursor = f"{name}@{found[limit - 1].sequence}"
        url = request.url.include_query_params(cursor=next_cursor)
        response.headers["Link"] = f'<{url.path}?{url.query}>; rel="next"'
    return ChangePage(
        items=[ChangeView.of(change) for change in found[:limit]], next_cursor=next_cursor
    )


def _last_seen(last_event_id: str | None, after: int | None) -> int | None:
    """Where a stream that broke off goes on. Raises InvalidRequest."""
    if last_event_id is None:
        return after
    if not (last_event_id.isascii() and last_event_id.isdecimal() and len(last_event_id) < 20):
        raise invalid_header("Last-Event-ID", "is the `id` of an event of this stream.")
    return int(last_event_id)


async def _events(changes: AsyncIterator[ChangeRecord]) -> AsyncGenerator[ServerEvent, None]:
    """The last one, `ended`, tells why there is no more: the cursor is gone or left behind."""
    async with aclosing(cast("AsyncGenerator[ChangeRecord, None]", changes)) as source:
        try:
            async for change in source:
                yield ServerEvent(
                    name="change",
                    data=ChangeView.of(change).model_dump_json().encode(),
                    number=change.sequence,
                )
        except (CursorNotFound, CursorExpired) as error:
            told = {"code": error.code, "title": error.title, "detail": error.advice}
            yield ServerEvent(name="ended", data=msgspec.json.encode(told))
