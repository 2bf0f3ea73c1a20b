"""Databases: create, show, list, wait for durability, accept a loss."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from app.core.base.errors import (
    Backpressure,
    DatabaseConflict,
    DatabaseNotFound,
    DiskFull,
    ManifestFull,
    NotFound,
    NotReady,
    UnsupportedMediaType,
)
from app.core.services.databases import DatabaseSpec
from app.routers.auth import needs
from app.routers.deps import DatabaseName, TenantName, WaitQuery, desk_of, services_of
from app.routers.exchange import exchange_of
from app.routers.history_schemas import ChangeDatabaseBody
from app.routers.openapi import MADE_HEADERS, problems
from app.routers.paging import PageQuery
from app.routers.route import ScopedRoute
from app.routers.schemas import CreateDatabaseBody, DatabasePage, DatabaseView, DurableView
from app.routers.waiting import while_connected

router = APIRouter(route_class=ScopedRoute, tags=["databases"])
DATABASE_PATH = "/tenants/{tenant}/databases/{database}"
_WRITES = (Backpressure, DiskFull, ManifestFull)


@router.put(
    DATABASE_PATH,
    response_model=DatabaseView,
    responses={
        201: {"model": DatabaseView, "description": "Made.", "headers": MADE_HEADERS},
        200: {"description": "The same exists already.", "headers": MADE_HEADERS},
        **problems(DatabaseNotFound, DatabaseConflict, UnsupportedMediaType, *_WRITES),
    },
)
@needs("write")
async def create_database(
    tenant: TenantName,
    database: DatabaseName,
    body: CreateDatabaseBody,
    request: Request,
    response: Response,
) -> DatabaseView:
    """Creates a database. The same again changes nothing; only fields that are given must agree
    with what exists.
    """
    status, is_new = await services_of(request).databases.create(
        tenant,
        database,
        DatabaseSpec(
            engine=body.engine,
            page_size=body.page_size,
            chunk_bytes=body.chunk_bytes,
            compression=body.compression,
        ),
    )
    response.status_code = 201 if is_new else 200
    response.headers["Location"] = f"/tenants/{tenant}/databases/{database}"
    return DatabaseView.of(status)


@router.get("/tenants/{tenant}/databases", responses=problems(NotFound))
@needs("read")
async def list_databases(
    tenant: TenantName, page: PageQuery, request: Request, response: Response
) -> DatabasePage:
    """The tenant's databases, in order of their names."""
    found = services_of(request).databases.list(tenant, limit=page.limit + 1, after=page.after(str))
    shown, cursor = page.cut(
        found, lambda status: status.record.name, request=request, response=response
    )
    return DatabasePage(items=[DatabaseView.of(status) for status in shown], next_cursor=cursor)


@router.get(DATABASE_PATH, responses=problems(DatabaseNotFound))
@needs("read")
async def show_database(
    tenant: TenantName, database: DatabaseName, request: Request
) -> DatabaseView:
    return DatabaseView.of(services_of(request).databases.get(tenant, database))


@router.patch(
    DATABASE_PATH,
    responses=problems(DatabaseNotFound, UnsupportedMediaType, *_WRITES),
)
@needs("write")
async def change_database(
    tenant: TenantName, database: DatabaseName, body: ChangeDatabaseBody, request: Request
) -> DatabaseView:
    """Sets how long generations are kept. What that lets go is listed by
    `GET …/generations?expiring=true`.
    """
    services = services_of(request)
    await services.history.set_retention(tenant, database, body.retention.applied_to)
    return DatabaseView.of(services.databases.get(tenant, database))


@router.get(f"{DATABASE_PATH}/durable", responses=problems(DatabaseNotFound, NotReady))
@needs("read")
async def wait_durable(
    tenant: TenantName,
    database: DatabaseName,
    request: Request,
    min_lsn: Annotated[int, Query(ge=0, description="The LSN that a checkpoint must cover.")] = 0,
    wait: WaitQuery = 0,
) -> DurableView:
    """Answers as soon as a checkpoint covers `min_lsn`, or when the time is over; forces none."""
    work = services_of(request).databases.wait_durable(
        tenant, database, min_lsn=min_lsn, wait_seconds=wait
    )
    if wait == 0:
        return DurableView.of(await work)
    stopping = desk_of(request).stopping
    receive = exchange_of(request).receive
    return DurableView.of(await while_connected(work, receive=receive, stopping=stopping))


@router.post(
    f"{DATABASE_PATH}/acknowledge-loss",
    responses=problems(DatabaseNotFound, *_WRITES),
)
@needs("write")
async def acknowledge_loss(
    tenant: TenantName, database: DatabaseName, request: Request
) -> DatabaseView:
    """Accepts that unpublished WAL was lost. LSNs go on above all that was ever given out."""
    return DatabaseView.of(await services_of(request).databases.acknowledge_loss(tenant, database))
