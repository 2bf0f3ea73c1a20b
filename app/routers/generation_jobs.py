"""Verifications and downloads: jobs about a published generation, for operators."""

from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request, Response

from app.core.base.errors import (
    Backpressure,
    DatabaseNotFound,
    DiskFull,
    GenerationExpired,
    IdempotencyKeyReused,
    ManifestFull,
    NoGeneration,
    NotFound,
    QueueDrained,
    UnsupportedMediaType,
)
from app.core.jobs.generation_jobs import GenerationJobKind
from app.core.stores.manifest.ops import Op
from app.core.stores.manifest.records import JobRecord
from app.routers.auth import needs, require_tenant
from app.routers.deps import services_of
from app.routers.exchange import principal_of
from app.routers.generation_jobs_schemas import GenerationJobBody
from app.routers.idempotent import IdempotencyKey, made_once
from app.routers.jobs import accepted_answer
from app.routers.openapi import ACCEPTED_HEADERS, problems
from app.routers.route import ScopedRoute
from app.routers.schemas import JobView

router = APIRouter(route_class=ScopedRoute, tags=["operations"])

_RESPONSES: dict[int | str, dict[str, Any]] = {
    202: {"headers": ACCEPTED_HEADERS},
    **problems(
        DatabaseNotFound,
        NotFound,
        NoGeneration,
        GenerationExpired,
        IdempotencyKeyReused,
        QueueDrained,
        UnsupportedMediaType,
        Backpressure,
        DiskFull,
        ManifestFull,
    ),
}


@router.post(
    "/admin/verifications",
    status_code=HTTPStatus.ACCEPTED,
    response_model=JobView,
    responses=_RESPONSES,
)
@needs("admin")
async def verify_generation(
    body: GenerationJobBody, request: Request, idempotency_key: IdempotencyKey = None
) -> Response:
    """Reads every blob of a generation again, all of its bytes, at the pace that
    `BOP_VERIFY_BYTES_PER_SECOND` allows, and mends what is damaged where a local copy is right. The
    job fails with `corrupt_blob` where something stays damaged; its result says what was found.
    """
    return await _requested("verify_manifest", body, request, idempotency_key)


@router.post(
    "/admin/downloads",
    status_code=HTTPStatus.ACCEPTED,
    response_model=JobView,
    responses=_RESPONSES,
)
@needs("admin")
async def download_generation(
    body: GenerationJobBody, request: Request, idempotency_key: IdempotencyKey = None
) -> Response:
    """Brings a generation's blobs into the hot cache, each checked, as far as there is room."""
    return await _requested("download_checkpoint", body, request, idempotency_key)


async def _requested(
    kind: GenerationJobKind, body: GenerationJobBody, request: Request, header: str | None
) -> Response:
    principal = principal_of(request)

    async def ask(remember: Callable[[JobRecord], Op] | None) -> JobRecord:
        require_tenant(principal, body.tenant)
        return await services_of(request).generation_jobs.request(
            kind,
            body.tenant,
            body.database,
            generation=body.generation,
            principal=principal.name,
            remember=remember,
        )

    return await made_once(
        request,
        ask,
        answer=partial(accepted_answer, base="/jobs"),
        route=f"POST {request.url.path}",
        key=header,
    )
