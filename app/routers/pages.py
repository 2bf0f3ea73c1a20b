"""Single pages of a libsql database.

Invariants: I10: a page is checked before it is sent. I12: see route.py.
Concurrency: a request holds its state only while it reads. Cancellation, crash: nothing is held.
"""

from typing import Any

from fastapi import APIRouter, Request, Response

from app.core.base.errors import (
    CorruptBlob,
    CorruptWal,
    DatabaseNotFound,
    GenerationExpired,
    PageNotFound,
    PreconditionFailed,
    RangeNotSatisfiable,
    RemoteUnavailable,
    SnapshotNotFound,
    WrongEngine,
)
from app.core.services.states import Newest
from app.routers.auth import needs
from app.routers.bodies import OCTETS
from app.routers.databases import DATABASE_PATH
from app.routers.deps import NAME_PARAMETERS, desk_of, names_of, services_of
from app.routers.openapi import problems
from app.routers.prepared import PreparedResponse
from app.routers.ranges import CONDITION_PARAMETERS, ByteRange, answer_to
from app.routers.route import ScopedRoute
from app.routers.selectors import (
    GENERATION_PARAMETER,
    SNAPSHOT_PARAMETER,
    checked_number,
    selector_of,
)

router = APIRouter(route_class=ScopedRoute, tags=["pages"])
PAGE_NO_MAX = 2**32 - 2
"""SQLite's. What lies beyond it lies beyond every page count."""
_NUMBER_MAX = 10**18
_FIXED_HEADERS = ((b"cache-control", b"no-cache"), (b"accept-ranges", b"bytes"))
_OCTETS_HEADER = (b"content-type", OCTETS.encode())

_HEADERS: dict[str, Any] = {
    "Bop-Tier": {
        "description": "Where the page was found.",
        "schema": {"type": "string", "enum": ["wal", "page_cache", "local", "remote"]},
    },
    "Bop-Generation": {
        "description": "The newest generation of the state that was read; 0: none is published.",
        "schema": {"type": "integer"},
    },
    "Bop-Lsn": {
        "description": "The last LSN of the state that was read.",
        "schema": {"type": "integer"},
    },
    "ETag": {"description": "Names the page's content.", "schema": {"type": "string"}},
}
_PAGE: dict[str, Any] = {
    "parameters": [
        *NAME_PARAMETERS,
        {
            "name": "page_no",
            "in": "path",
            "required": True,
            "schema": {"type": "integer", "minimum": 1, "maximum": PAGE_NO_MAX},
            "example": 1,
        },
        GENERATION_PARAMETER,
        SNAPSHOT_PARAMETER,
        *CONDITION_PARAMETERS,
    ]
}
_CONTENT = {
    OCTETS: {"schema": {"type": "string", "format": "binary"}, "example": "SQLite format 3\x00…"}
}


@router.head(f"{DATABASE_PATH}/pages/{{page_no}}", include_in_schema=False)
@router.get(
    f"{DATABASE_PATH}/pages/{{page_no}}",
    response_class=Response,
    openapi_extra=_PAGE,
    responses={
        200: {
            "description": "The page's bytes.",
            "headers": _HEADERS,
            "content": _CONTENT,
        },
        206: {
            "description": "The range of it.",
            "headers": {**_HEADERS, "Content-Range": {"schema": {"type": "string"}}},
            "content": _CONTENT,
        },
        304: {"description": "The page is what `If-None-Match` names."},
        **problems(
            DatabaseNotFound,
            SnapshotNotFound,
            PageNotFound,
            WrongEngine,
            GenerationExpired,
            PreconditionFailed,
            RangeNotSatisfiable,
            CorruptBlob,
            CorruptWal,
            RemoteUnavailable,
        ),
    },
)
@needs("read")
async def read_page(request: Request) -> Response:
    """One page, at the newest committed state or at a generation. A page that was never written
    is zeros.
    """
    tenant, database = names_of(request)
    page_no = _page_no_of(request)
    selector = selector_of(request, takes_time=False)
    desk, pages = desk_of(request), services_of(request).pages
    started = desk.clock.monotonic()
    page = pages.get(tenant, database, page_no) if isinstance(selector, Newest) else None
    if page is None:
        page = await pages.read(tenant, database, page_no, selector)
    if page.tier == "page_cache":
        seconds = desk.clock.monotonic() - started
        desk.metrics.on_cached_page(seconds=seconds, size_bytes=len(page.data))
    etag = f'"{page.tag}"'
    answer = answer_to(request, etag=etag, size=len(page.data))
    headers = [
        (b"etag", etag.encode()),
        (b"bop-tier", page.tier.encode()),
        (b"bop-generation", b"%d" % page.generation),
        (b"bop-lsn", b"%d" % page.lsn),
        *_FIXED_HEADERS,
    ]
    if answer == "not_modified":
        return PreparedResponse(b"", headers, status_code=304)
    headers.append(_OCTETS_HEADER)
    if isinstance(answer, ByteRange):
        headers.append((b"content-range", answer.content_range.encode()))
        headers.append((b"content-length", b"%d" % answer.length))
        return PreparedResponse(page.data[answer.first : answer.stop], headers, status_code=206)
    headers.append((b"content-length", b"%d" % len(page.data)))
    return PreparedResponse(b"" if request.method == "HEAD" else page.data, headers)


def _page_no_of(request: Request) -> int:
    """One beyond all there can be for a number beyond that. Raises InvalidRequest."""
    text = request.path_params["page_no"]
    page_no = checked_number(text, name="page_no", maximum=_NUMBER_MAX, place="path")
    return min(page_no, PAGE_NO_MAX + 1)
