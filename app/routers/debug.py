"""What an on-call engineer looks at. A token bound to tenants sees their things only (I12)."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from app.core.base.errors import NotReady, RemoteUnavailable
from app.core.services.debugging import NamedLease
from app.routers.auth import needs, require_unbound
from app.routers.deps import services_of
from app.routers.exchange import principal_of
from app.routers.jobs import view_of
from app.routers.openapi import problems
from app.routers.operations_schemas import (
    CacheView,
    ChangePage,
    ChangeView,
    FsckView,
    LeasePage,
    LeaseView,
    ManifestStatsView,
    QuotaView,
)
from app.routers.paging import NUMBER_MAX, PageQuery, seen_only
from app.routers.route import ScopedRoute
from app.routers.schemas import JobPage, plain

router = APIRouter(route_class=ScopedRoute, prefix="/debug", tags=["debug"])


@router.get("/checkpoint/leases")
@needs("debug")
async def list_leases(page: PageQuery, request: Request, response: Response) -> LeasePage:
    """Leases on chunks that live now."""
    debugging, principal = services_of(request).debugging, principal_of(request)
    found = seen_only(
        lambda limit, after: debugging.leases(limit=limit, after=after),
        key=_place_of,
        sees=lambda named: principal.sees(named.tenant),
        limit=page.limit + 1,
        after=page.after(tuple[int, int]),
    )
    shown, cursor = page.cut(found, _place_of, request=request, response=response)
    return LeasePage(items=[LeaseView.of(named) for named in shown], next_cursor=cursor)


@router.get("/checkpoint/active_jobs")
@needs("debug")
async def list_active_jobs(page: PageQuery, request: Request, response: Response) -> JobPage:
    """Jobs that wait or run."""
    debugging, principal = services_of(request).debugging, principal_of(request)
    found = seen_only(
        lambda limit, after: debugging.active_jobs(limit=limit, after=after),
        key=lambda job: job.job_id,
        sees=lambda job: principal.sees(job.tenant),
        limit=page.limit + 1,
        after=page.after(str),
    )
    shown, cursor = page.cut(found, lambda job: job.job_id, request=request, response=response)
    return JobPage(items=[view_of(job, principal) for job in shown], next_cursor=cursor)


@router.get("/manifest/change_log")
@needs("debug")
async def list_changes(
    page: PageQuery,
    request: Request,
    response: Response,
    after: Annotated[
        int, Query(ge=0, lt=NUMBER_MAX, description="The last sequence already seen.")
    ] = 0,
) -> ChangePage:
    """Committed changes of the catalogue, oldest first."""
    debugging, principal = services_of(request).debugging, principal_of(request)
    cursor_after = page.after(int)
    found = seen_only(
        lambda limit, behind: debugging.change_log(limit=limit, after=behind or 0),
        key=lambda change: change.sequence,
        sees=lambda change: principal.sees(change.tenant),
        limit=page.limit + 1,
        after=after if cursor_after is None else cursor_after,
    )
    shown, cursor = page.cut(
        found, lambda change: change.sequence, request=request, response=response
    )
    return ChangePage(items=[ChangeView.of(change) for change in shown], next_cursor=cursor)


@router.get("/manifest/stats")
@needs("debug")
async def show_manifest_stats(request: Request) -> ManifestStatsView:
    """Sizes, rows per table, readers."""
    require_unbound(principal_of(request))
    stats = await services_of(request).debugging.manifest_stats()
    return ManifestStatsView.model_validate(plain(stats))


@router.get("/manifest/fsck", responses=problems(RemoteUnavailable, NotReady))
@needs("debug")
async def check_everything(request: Request) -> FsckView:
    """Walks manifest, remote store, WAL, scratch, quota and change log, and says what does not
    agree. It changes nothing, and reads every sealed WAL segment: it may take a while.
    """
    require_unbound(principal_of(request))
    return FsckView.of(await services_of(request).debugging.fsck())


@router.get("/storage/quota")
@needs("debug")
async def show_quota(request: Request) -> QuotaView:
    """Limits and use: in all, by tenant, by job."""
    require_unbound(principal_of(request))
    return QuotaView.of(services_of(request).debugging.quota())


@router.get("/cache")
@needs("debug")
async def show_caches(request: Request) -> CacheView:
    """The page cache (memory) and the hot cache (files): sizes, hits and misses since the start."""
    require_unbound(principal_of(request))
    return CacheView.of(services_of(request).debugging.caches())


def _place_of(named: NamedLease) -> tuple[int, int]:
    return named.lease.db_id, named.lease.chunk_id
