"""Checkpoints: trigger, list, look, cancel, follow."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from http import HTTPStatus
from typing import cast

from fastapi import APIRouter, Request, Response

from app.core.base.errors import (
    Backpressure,
    DatabaseNotFound,
    DiskFull,
    FeatureDisabled,
    IdempotencyKeyReused,
    JobAlreadyEnded,
    JobNotFound,
    ManifestFull,
    NotReady,
    QueueDrained,
    UnsupportedMediaType,
)
from app.core.stores.manifest.ops import Op
from app.core.stores.manifest.records import ENDED_STATES, JobKind, JobRecord
from app.routers.auth import check_again, needs, require_tenant
from app.routers.deps import WaitQuery, desk_of, services_of
from app.routers.exchange import Principal, principal_of
from app.routers.idempotent import IdempotencyKey, made_once
from app.routers.jobs import (
    DatabaseQuery,
    JobPath,
    StateQuery,
    TenantQuery,
    accepted_answer,
    cancelled_job,
    page_of_jobs,
    shown_job,
    view_of,
    visible_job,
)
from app.routers.openapi import ACCEPTED_HEADERS, problems
from app.routers.paging import PageQuery
from app.routers.route import ScopedRoute
from app.routers.schemas import EXAMPLE_JOB_ID, JobPage, JobView, TriggerCheckpointBody
from app.routers.sse import EventStream, ServerEvent

router = APIRouter(route_class=ScopedRoute, tags=["checkpoints"])
KINDS: frozenset[JobKind] = frozenset({"create_checkpoint"})


@router.post(
    "/checkpoints",
    status_code=HTTPStatus.ACCEPTED,
    response_model=JobView,
    responses={
        202: {"headers": ACCEPTED_HEADERS},
        **problems(
            DatabaseNotFound,
            FeatureDisabled,
            IdempotencyKeyReused,
            QueueDrained,
            UnsupportedMediaType,
            Backpressure,
            DiskFull,
            ManifestFull,
        ),
    },
)
@needs("checkpoint")
async def trigger_checkpoint(
    body: TriggerCheckpointBody,
    request: Request,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Asks for a checkpoint. While one for the database is pending and has not planned yet, that
    one is answered: a completed checkpoint covers all that was acknowledged before its POST.
    """
    principal = principal_of(request)

    async def trigger(remember: Callable[[JobRecord], Op] | None) -> JobRecord:
        require_tenant(principal, body.tenant)
        return await services_of(request).checkpoints.trigger(
            body.tenant,
            body.database,
            reason=body.reason,
            principal=principal.name,
            remember=remember,
        )

    return await made_once(
        request,
        trigger,
        answer=partial(accepted_answer, base="/checkpoints"),
        route="POST /checkpoints",
        key=idempotency_key,
    )


@router.get("/checkpoints")
@needs("read", "checkpoint")
async def list_checkpoints(
    page: PageQuery,
    request: Request,
    response: Response,
    tenant: TenantQuery = None,
    database: DatabaseQuery = None,
    state: StateQuery = None,
) -> JobPage:
    """Checkpoint jobs, newest first."""
    return page_of_jobs(
        page,
        request,
        response,
        kinds=KINDS,
        tenant=tenant,
        database=database,
        states=state or None,
    )


@router.get("/checkpoints/{id}", responses=problems(JobNotFound, NotReady))
@needs("read", "checkpoint")
async def show_checkpoint(
    id: JobPath,  # noqa: A002 - the path's name for it
    request: Request,
    wait: WaitQuery = 0,
) -> JobView:
    """The job; with `?wait=`, when it has ended or the time is over."""
    return await shown_job(request, id, kinds=KINDS, wait_seconds=wait)


@router.post(
    "/checkpoints/{id}/cancel",
    status_code=HTTPStatus.ACCEPTED,
    responses={202: {"headers": ACCEPTED_HEADERS}, **problems(JobNotFound, JobAlreadyEnded)},
)
@needs("checkpoint")
async def cancel_checkpoint(
    id: JobPath,  # noqa: A002 - the path's name for it
    request: Request,
    response: Response,
) -> JobView:
    """Asks the checkpoint to end. It is published whole or not at all."""
    return await cancelled_job(request, response, id, kinds=KINDS, base="/checkpoints")


@router.get(
    "/checkpoints/{id}/events",
    response_class=Response,
    responses={
        200: {
            "description": "An event per change of state or progress; the last one is `ended`. "
            "Each event's data is the Job.",
            "content": {
                "text/event-stream": {
                    "schema": {"type": "string"},
                    "example": f'id: 1\nevent: ended\ndata: {{"id": "{EXAMPLE_JOB_ID}", …}}\n\n',
                }
            },
        },
        **problems(JobNotFound),
    },
)
@needs("read", "checkpoint")
async def follow_checkpoint(
    id: JobPath,  # noqa: A002 - the path's name for it
    request: Request,
) -> Response:
    visible_job(request, id, kinds=KINDS)
    desk = desk_of(request)
    return EventStream(
        _events(services_of(request).jobs.watch(id), principal_of(request)),
        clock=desk.clock,
        stopping=desk.stopping,
        check=partial(check_again, request),
    )


async def _events(
    jobs: AsyncIterator[JobRecord], principal: Principal
) -> AsyncGenerator[ServerEvent, None]:
    async with aclosing(cast("AsyncGenerator[JobRecord, None]", jobs)) as source:
        async for job in source:
            name = "ended" if job.state in ENDED_STATES else "changed"
            yield ServerEvent(name=name, data=view_of(job, principal).model_dump_json().encode())
