"""Jobs of every kind: list, look, wait, cancel."""

from collections.abc import Collection
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response

from app.core.base.errors import JobAlreadyEnded, JobNotFound, NotReady
from app.core.services.idempotency import StoredAnswer
from app.core.stores.manifest.records import JobKind, JobRecord, JobState
from app.routers.auth import needs, require_scope
from app.routers.deps import WaitQuery, desk_of, services_of
from app.routers.exchange import Principal, exchange_of, principal_of
from app.routers.openapi import ACCEPTED_HEADERS, problems
from app.routers.paging import Page, PageQuery
from app.routers.route import ScopedRoute
from app.routers.schemas import EXAMPLE_JOB_ID, NAME_PATTERN, JobPage, JobView
from app.routers.waiting import while_connected

router = APIRouter(route_class=ScopedRoute, tags=["jobs"])
RETRY_AFTER_SECONDS = 1

JobPath = Annotated[str, Path(max_length=64, examples=[EXAMPLE_JOB_ID])]
TenantQuery = Annotated[str | None, Query(pattern=NAME_PATTERN)]
DatabaseQuery = Annotated[str | None, Query(pattern=NAME_PATTERN)]
StateQuery = Annotated[list[JobState] | None, Query(description="May be given more than once.")]
KindQuery = Annotated[list[JobKind] | None, Query(description="May be given more than once.")]


@router.get("/jobs")
@needs("read", "checkpoint")
async def list_jobs(
    page: PageQuery,
    request: Request,
    response: Response,
    kind: KindQuery = None,
    tenant: TenantQuery = None,
    database: DatabaseQuery = None,
    state: StateQuery = None,
) -> JobPage:
    """Jobs of all kinds, newest first."""
    return page_of_jobs(
        page,
        request,
        response,
        kinds=kind or None,
        tenant=tenant,
        database=database,
        states=state or None,
    )


@router.get("/jobs/{id}", responses=problems(JobNotFound, NotReady))
@needs("read", "checkpoint")
async def show_job(
    id: JobPath,  # noqa: A002 - the path's name for it
    request: Request,
    wait: WaitQuery = 0,
) -> JobView:
    """The job; with `?wait=`, when it has ended or the time is over."""
    return await shown_job(request, id, kinds=None, wait_seconds=wait)


@router.post(
    "/jobs/{id}/cancel",
    status_code=HTTPStatus.ACCEPTED,
    responses={202: {"headers": ACCEPTED_HEADERS}, **problems(JobNotFound, JobAlreadyEnded)},
)
@needs("checkpoint", "write")
async def cancel_job(
    id: JobPath,  # noqa: A002 - the path's name for it
    request: Request,
    response: Response,
) -> JobView:
    """Asks the job to end. One that never ran has ended in the answer; one in flight is
    interrupted, and cleans up first. The scope `write` reaches truncations only, which it can
    ask for too.
    """
    if visible_job(request, id, kinds=None).kind != "truncate_append_only":
        require_scope(principal_of(request), frozenset({"checkpoint"}))
    return await cancelled_job(request, response, id, kinds=None, base="/jobs")


def page_of_jobs(
    page: Page,
    request: Request,
    response: Response,
    *,
    kinds: Collection[JobKind] | None,
    tenant: str | None,
    database: str | None,
    states: Collection[JobState] | None,
) -> JobPage:
    principal = principal_of(request)
    found = services_of(request).jobs.list(
        kinds=kinds,
        tenant=tenant,
        database=database,
        states=states,
        tenants=principal.tenants,
        limit=page.limit + 1,
        after=page.after(str),
    )
    shown, cursor = page.cut(found, lambda job: job.job_id, request=request, response=response)
    return JobPage(items=[view_of(job, principal) for job in shown], next_cursor=cursor)


def visible_job(request: Request, job_id: str, *, kinds: Collection[JobKind] | None) -> JobRecord:
    """Raises JobNotFound, also for another tenant's job (I12)."""
    job = services_of(request).jobs.get(job_id, kinds=kinds)
    if not principal_of(request).sees(job.tenant):
        raise JobNotFound(f"There is no job {job_id}.", job_id=job_id)
    return job


def view_of(job: JobRecord, principal: Principal) -> JobView:
    """Forks of another tenant that a job met are not named to who does not see that one (I12)."""
    view = JobView.of(job)
    if principal.tenants is None:
        return view
    if view.error is not None and "names" in view.error:
        seen = _seen(view.error["names"], principal)
        if len(seen) < len(view.error["names"]):
            told = ", ".join([*seen, "forks of other tenants"])
            view.error |= {"names": seen, "detail": f"It is still needed by: {told}."}
    if view.result is not None and "kept_for_forks" in view.result:
        view.result |= {"kept_for_forks": _seen(view.result["kept_for_forks"], principal)}
    return view


def _seen(names: list[str], principal: Principal) -> list[str]:
    """Of snapshots, and of forks as `tenant/database`."""
    return [name for name in names if "/" not in name or principal.sees(name.partition("/")[0])]


async def shown_job(
    request: Request, job_id: str, *, kinds: Collection[JobKind] | None, wait_seconds: float
) -> JobView:
    job = visible_job(request, job_id, kinds=kinds)
    if wait_seconds > 0:
        job = await while_connected(
            services_of(request).jobs.wait(job_id, seconds=wait_seconds),
            receive=exchange_of(request).receive,
            stopping=desk_of(request).stopping,
        )
    return view_of(job, principal_of(request))


async def cancelled_job(
    request: Request,
    response: Response,
    job_id: str,
    *,
    kinds: Collection[JobKind] | None,
    base: str,
) -> JobView:
    visible_job(request, job_id, kinds=kinds)
    job = await services_of(request).jobs.cancel(job_id)
    response.headers.update(accepted_headers(job, base=base))
    return view_of(job, principal_of(request))


def accepted_headers(job: JobRecord, *, base: str) -> dict[str, str]:
    return {"Location": f"{base}/{job.job_id}", "Retry-After": str(RETRY_AFTER_SECONDS)}


def accepted_answer(job: JobRecord, *, base: str) -> StoredAnswer:
    """202 with the Job."""
    return StoredAnswer(
        status=int(HTTPStatus.ACCEPTED),
        headers={**accepted_headers(job, base=base), "Content-Type": "application/json"},
        body=JobView.of(job).model_dump_json().encode(),
    )
