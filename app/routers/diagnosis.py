"""Why a job waits, what the write-ahead logs hold, and copies of the manifest."""

from fastapi import APIRouter, Request, Response

from app.core.base.errors import DiskFull, JobNotFound
from app.core.services.wal_overview import LogOverview
from app.routers.admin_schemas import NO_REASON, WhyBody
from app.routers.auth import needs, require_unbound
from app.routers.deps import services_of
from app.routers.diagnosis_schemas import BackupView, ExplanationView, LogPage, LogView
from app.routers.exchange import principal_of
from app.routers.jobs import JobPath, visible_job
from app.routers.openapi import problems
from app.routers.paging import PageQuery, seen_only
from app.routers.route import ScopedRoute

router = APIRouter(route_class=ScopedRoute)


@router.get("/debug/jobs/{id}/explain", responses=problems(JobNotFound), tags=["debug"])
@needs("debug")
async def explain_job(
    id: JobPath,  # noqa: A002 - the path's name for it
    request: Request,
) -> ExplanationView:
    """What the job waits for, lease and holder, quota, limiter, backoff, and who has that."""
    visible_job(request, id, kinds=None)
    services, principal = services_of(request), principal_of(request)
    return ExplanationView.of(
        services.explaining.explain(id), shows_others=principal.tenants is None
    )


@router.get("/debug/wal", tags=["debug"])
@needs("debug")
async def list_logs(page: PageQuery, request: Request, response: Response) -> LogPage:
    """Every database's write-ahead log on this disk: how much, how far, how far ahead of the
    remote store.
    """
    overview, principal = services_of(request).wal_overview, principal_of(request)
    found = seen_only(
        lambda limit, after: overview.list(limit=limit, after=after),
        key=lambda log: log.db_id,
        sees=lambda log: principal.sees(log.tenant),
        limit=page.limit + 1,
        after=page.after(int),
    )
    shown, cursor = page.cut(found, _db_id_of, request=request, response=response)
    return LogPage(items=[LogView.of(log) for log in shown], next_cursor=cursor)


@router.post("/admin/manifest/backup", responses=problems(DiskFull), tags=["admin"])
@needs("admin")
async def back_manifest_up(request: Request, body: WhyBody = NO_REASON) -> BackupView:
    """A compacted copy of the manifest under `backups/` of the data directory, made while the
    service goes on. The newest `BOP_MANIFEST_BACKUPS_COUNT` are kept.
    """
    del body
    require_unbound(principal_of(request))
    return BackupView.of(await services_of(request).backups.make())


def _db_id_of(log: LogOverview) -> int:
    return log.db_id
