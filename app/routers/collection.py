"""Deletion of databases, collection on demand, and why a blob is kept."""

from http import HTTPStatus
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response

from app.core.base.errors import (
    Backpressure,
    DatabaseNotFound,
    DiskFull,
    ManifestFull,
    NotReady,
    QueueDrained,
    RemoteUnavailable,
    UnsupportedMediaType,
)
from app.core.stores.manifest.errors import RowPinned
from app.core.workers.collector import RoundRequest
from app.routers.auth import needs, require_unbound
from app.routers.collection_schemas import (
    EXAMPLE_KEY,
    BlobExplanationView,
    CollectionView,
    RunCollectionBody,
)
from app.routers.databases import DATABASE_PATH
from app.routers.deps import DatabaseName, TenantName, services_of
from app.routers.exchange import principal_of
from app.routers.jobs import accepted_headers
from app.routers.openapi import ACCEPTED_HEADERS, problems
from app.routers.route import ScopedRoute
from app.routers.schemas import JobView

router = APIRouter(route_class=ScopedRoute)
_WRITES = (Backpressure, DiskFull, ManifestFull)
_NO_MORE = RunCollectionBody()


@router.delete(
    DATABASE_PATH,
    tags=["databases"],
    status_code=HTTPStatus.ACCEPTED,
    responses={
        202: {"headers": ACCEPTED_HEADERS},
        **problems(DatabaseNotFound, RowPinned, QueueDrained, *_WRITES),
    },
)
@needs("write")
async def delete_database(
    tenant: TenantName,
    database: DatabaseName,
    request: Request,
    response: Response,
    snapshots: Annotated[
        Literal["delete"] | None, Query(description="`delete`: its snapshots go with it.")
    ] = None,
) -> JobView:
    """Deletes the database: at once its name is free and it answers 404. Its blobs go when nothing
    needs them, as a fork or a running scan may.
    """
    job = await services_of(request).deletion.delete(
        tenant,
        database,
        with_snapshots=snapshots == "delete",
        principal=principal_of(request).name,
    )
    response.headers.update(accepted_headers(job, base="/jobs"))
    return JobView.of(job)


@router.post(
    "/admin/gc/run",
    tags=["operations"],
    responses=problems(NotReady, RemoteUnavailable, UnsupportedMediaType, DiskFull, ManifestFull),
)
@needs("admin")
async def run_collection(request: Request, body: RunCollectionBody = _NO_MORE) -> CollectionView:
    """Applies retention now, collects what is due, and says what it did."""
    require_unbound(principal_of(request))
    report = await services_of(request).collection.run(
        RoundRequest(everything=True, accept_clock=body.accept_clock, orphans=body.orphans)
    )
    return CollectionView.of(report)


@router.get("/debug/blobs/explain", tags=["debug"])
@needs("debug")
async def explain_blob(
    request: Request,
    key: Annotated[str, Query(min_length=1, max_length=1024, examples=[EXAMPLE_KEY])],
) -> BlobExplanationView:
    """Why an object on the remote store is kept, or that it is going, or that it is not known."""
    principal = principal_of(request)
    explanation = await services_of(request).collection.explain(key, sees=principal.sees)
    return BlobExplanationView.of(explanation)
