"""Truncations of append_only databases: ask for one, list, look."""

from collections.abc import Callable
from functools import partial
from http import HTTPStatus

from fastapi import APIRouter, Request, Response

from app.core.base.errors import (
    Backpressure,
    CorruptWal,
    DatabaseNotFound,
    DiskFull,
    FeatureDisabled,
    IdempotencyKeyReused,
    JobNotFound,
    LsnOutOfRange,
    ManifestFull,
    NotReady,
    QueueDrained,
    UnsupportedMediaType,
    WalLost,
    WrongEngine,
)
from app.core.stores.manifest.ops import Op
from app.core.stores.manifest.records import JobKind, JobRecord
from app.routers.auth import needs, require_tenant
from app.routers.deps import WaitQuery, services_of
from app.routers.exchange import principal_of
from app.routers.idempotent import IdempotencyKey, made_once
from app.routers.jobs import (
    DatabaseQuery,
    JobPath,
    StateQuery,
    TenantQuery,
    accepted_answer,
    page_of_jobs,
    shown_job,
)
from app.routers.openapi import ACCEPTED_HEADERS, problems
from app.routers.paging import PageQuery
from app.routers.route import ScopedRoute
from app.routers.schemas import JobPage, JobView
from app.routers.truncations_schemas import TruncateBody

router = APIRouter(route_class=ScopedRoute, tags=["truncations"])
KINDS: frozenset[JobKind] = frozenset({"truncate_append_only"})


@router.post(
    "/truncations",
    status_code=HTTPStatus.ACCEPTED,
    response_model=JobView,
    responses={
        202: {"headers": ACCEPTED_HEADERS},
        **problems(
            DatabaseNotFound,
            WrongEngine,
            FeatureDisabled,
            WalLost,
            QueueDrained,
            UnsupportedMediaType,
            LsnOutOfRange,
            IdempotencyKeyReused,
            Backpressure,
            CorruptWal,
            DiskFull,
            ManifestFull,
        ),
    },
)
@needs("write")
async def truncate(
    body: TruncateBody,
    request: Request,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Drops the oldest records, in whole published chunks, or the newest ones, up to the newest at
    acceptance. Cancel it under `/jobs`.
    """
    principal = principal_of(request)

    async def accept(remember: Callable[[JobRecord], Op] | None) -> JobRecord:
        require_tenant(principal, body.tenant)
        return await services_of(request).truncations.request(
            body.tenant,
            body.database,
            direction=body.direction,
            lsn=body.lsn,
            on_lease=body.on_lease,
            lease_timeout_seconds=body.lease_timeout_seconds,
            principal=principal.name,
            remember=remember,
        )

    return await made_once(
        request,
        accept,
        answer=partial(accepted_answer, base="/truncations"),
        route="POST /truncations",
        key=idempotency_key,
    )


@router.get("/truncations")
@needs("read", "write", "checkpoint")
async def list_truncations(
    page: PageQuery,
    request: Request,
    response: Response,
    tenant: TenantQuery = None,
    database: DatabaseQuery = None,
    state: StateQuery = None,
) -> JobPage:
    """Truncation jobs, newest first."""
    return page_of_jobs(
        page,
        request,
        response,
        kinds=KINDS,
        tenant=tenant,
        database=database,
        states=state or None,
    )


@router.get("/truncations/{id}", responses=problems(JobNotFound, NotReady))
@needs("read", "write", "checkpoint")
async def show_truncation(
    id: JobPath,  # noqa: A002 - the path's name for it
    request: Request,
    wait: WaitQuery = 0,
) -> JobView:
    """The job; with `?wait=`, when it has ended or the time is over."""
    return await shown_job(request, id, kinds=KINDS, wait_seconds=wait)
