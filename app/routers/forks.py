"""Forks: a new database from another one's generation."""

from collections.abc import Callable
from http import HTTPStatus

from fastapi import APIRouter, Request, Response

from app.core.base.errors import (
    Backpressure,
    DatabaseConflict,
    DatabaseNotFound,
    DiskFull,
    GenerationExpired,
    IdempotencyKeyReused,
    ManifestFull,
    NoGeneration,
    NotFound,
    SnapshotNotFound,
    UnsupportedMediaType,
)
from app.core.services.databases import DatabaseStatus
from app.core.services.idempotency import StoredAnswer
from app.core.stores.manifest.ops import Op
from app.routers.auth import needs, require_tenant
from app.routers.databases import DATABASE_PATH
from app.routers.deps import DatabaseName, TenantName, services_of
from app.routers.exchange import principal_of
from app.routers.history_schemas import CreateForkBody
from app.routers.idempotent import IdempotencyKey, made_once
from app.routers.openapi import MADE_HEADERS, problems
from app.routers.route import ScopedRoute
from app.routers.schemas import DatabaseView

router = APIRouter(route_class=ScopedRoute, tags=["history"])


@router.post(
    f"{DATABASE_PATH}/forks",
    status_code=HTTPStatus.CREATED,
    response_model=DatabaseView,
    responses={
        201: {"headers": MADE_HEADERS},
        **problems(
            DatabaseNotFound,
            NotFound,
            SnapshotNotFound,
            NoGeneration,
            DatabaseConflict,
            GenerationExpired,
            IdempotencyKeyReused,
            UnsupportedMediaType,
            Backpressure,
            DiskFull,
            ManifestFull,
        ),
    },
)
@needs("write")
async def create_fork(
    tenant: TenantName,
    database: DatabaseName,
    body: CreateForkBody,
    request: Request,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """A new database that begins as the generation; no blob is copied, and both go on by
    themselves. `checkpointed_lsn` is 0 until the bucket alone can restore the fork.
    """
    principal = principal_of(request)
    fork_tenant = tenant if body.tenant is None else body.tenant

    def answer(status: DatabaseStatus) -> StoredAnswer:
        where = f"/tenants/{fork_tenant}/databases/{body.database}"
        return StoredAnswer(
            status=int(HTTPStatus.CREATED),
            headers={"Content-Type": "application/json", "Location": where},
            body=DatabaseView.of(status).model_dump_json().encode(),
        )

    async def create(remember: Callable[[DatabaseStatus], Op] | None) -> DatabaseStatus:
        require_tenant(principal, fork_tenant)
        return await services_of(request).forks.create(
            tenant,
            database,
            fork_tenant=fork_tenant,
            fork_database=body.database,
            generation=body.generation,
            snapshot=body.snapshot,
            remember=remember,
        )

    return await made_once(
        request,
        create,
        answer=answer,
        route=f"POST /tenants/{tenant}/databases/{database}/forks",
        key=idempotency_key,
    )
