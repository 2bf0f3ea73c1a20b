"""Snapshots: make, list, look, delete."""

from collections.abc import Callable
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from app.core.base.errors import (
    Backpressure,
    DatabaseNotFound,
    DiskFull,
    GenerationExpired,
    IdempotencyKeyReused,
    ManifestFull,
    NoGeneration,
    NotFound,
    SnapshotExists,
    SnapshotNotFound,
    UnsupportedMediaType,
)
from app.core.services.idempotency import StoredAnswer
from app.core.stores.manifest.ops import Op
from app.core.stores.manifest.records import SnapshotRecord
from app.routers.auth import needs
from app.routers.databases import DATABASE_PATH
from app.routers.deps import DatabaseName, TenantName, services_of
from app.routers.history_schemas import CreateSnapshotBody, SnapshotPage, SnapshotView
from app.routers.idempotent import IdempotencyKey, made_once
from app.routers.openapi import MADE_HEADERS, problems
from app.routers.paging import PageQuery
from app.routers.route import ScopedRoute
from app.routers.schemas import NAME_PATTERN

router = APIRouter(route_class=ScopedRoute, tags=["history"])
SNAPSHOTS_PATH = f"{DATABASE_PATH}/snapshots"
SnapshotName = Annotated[str, Path(pattern=NAME_PATTERN, examples=["before-migration"])]
_WRITES = (Backpressure, DiskFull, ManifestFull)


@router.post(
    SNAPSHOTS_PATH,
    status_code=HTTPStatus.CREATED,
    response_model=SnapshotView,
    responses={
        201: {"headers": MADE_HEADERS},
        **problems(
            DatabaseNotFound,
            NotFound,
            NoGeneration,
            SnapshotExists,
            GenerationExpired,
            IdempotencyKeyReused,
            UnsupportedMediaType,
            *_WRITES,
        ),
    },
)
@needs("write")
async def create_snapshot(
    tenant: TenantName,
    database: DatabaseName,
    body: CreateSnapshotBody,
    request: Request,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Pins a generation under a name: it stays readable until the snapshot is deleted."""
    where = f"/tenants/{tenant}/databases/{database}/snapshots"

    def answer(row: SnapshotRecord) -> StoredAnswer:
        return StoredAnswer(
            status=int(HTTPStatus.CREATED),
            headers={"Content-Type": "application/json", "Location": f"{where}/{row.name}"},
            body=SnapshotView.of(row).model_dump_json().encode(),
        )

    async def create(remember: Callable[[SnapshotRecord], Op] | None) -> SnapshotRecord:
        return await services_of(request).snapshots.create(
            tenant, database, body.name, generation=body.generation, remember=remember
        )

    return await made_once(
        request, create, answer=answer, route=f"POST {where}", key=idempotency_key
    )


@router.get(SNAPSHOTS_PATH, responses=problems(DatabaseNotFound))
@needs("read")
async def list_snapshots(
    tenant: TenantName,
    database: DatabaseName,
    page: PageQuery,
    request: Request,
    response: Response,
) -> SnapshotPage:
    """By name."""
    found = services_of(request).snapshots.list(
        tenant, database, limit=page.limit + 1, after=page.after(str)
    )
    shown, cursor = page.cut(found, lambda row: row.name, request=request, response=response)
    return SnapshotPage(items=[SnapshotView.of(row) for row in shown], next_cursor=cursor)


@router.get(f"{SNAPSHOTS_PATH}/{{name}}", responses=problems(DatabaseNotFound, SnapshotNotFound))
@needs("read")
async def show_snapshot(
    tenant: TenantName, database: DatabaseName, name: SnapshotName, request: Request
) -> SnapshotView:
    return SnapshotView.of(services_of(request).snapshots.get(tenant, database, name))


@router.delete(
    f"{SNAPSHOTS_PATH}/{{name}}",
    status_code=HTTPStatus.NO_CONTENT,
    response_class=Response,
    responses=problems(DatabaseNotFound, SnapshotNotFound, *_WRITES),
)
@needs("write")
async def delete_snapshot(
    tenant: TenantName, database: DatabaseName, name: SnapshotName, request: Request
) -> Response:
    """Takes the pin away: its generation goes when no rule keeps it."""
    await services_of(request).snapshots.delete(tenant, database, name)
    return Response(status_code=HTTPStatus.NO_CONTENT)
