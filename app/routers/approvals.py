"""What takes two people: a lease released by force, and the approvals that wait for the second."""

from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response

from app.core.base.errors import (
    ApprovalNotFound,
    DatabaseNotFound,
    DiskFull,
    LeaseNotFound,
    ManifestFull,
    SelfApproval,
    UnsupportedMediaType,
)
from app.core.stores.manifest.admin_records import ApprovalRecord
from app.routers.admin_schemas import (
    EXAMPLE_APPROVAL_ID,
    NO_REASON,
    ApprovalPage,
    ApprovalView,
    ReasonBody,
    WhyBody,
)
from app.routers.auth import needs, require_tenant
from app.routers.deps import services_of
from app.routers.exchange import principal_of
from app.routers.openapi import problems
from app.routers.paging import PageQuery, seen_only
from app.routers.route import ScopedRoute
from app.routers.schemas import NAME_PATTERN

router = APIRouter(route_class=ScopedRoute, prefix="/admin", tags=["admin"])
CHUNK_ID_MAX = 2**63 - 1

ChunkPath = Annotated[int, Path(ge=0, le=CHUNK_ID_MAX, examples=[0])]
TenantNamed = Annotated[str, Query(pattern=NAME_PATTERN, examples=["acme"])]
DatabaseNamed = Annotated[str, Query(pattern=NAME_PATTERN, examples=["events"])]
ApprovalPath = Annotated[str, Path(max_length=64, examples=[EXAMPLE_APPROVAL_ID])]


@router.post(
    "/checkpoint/lease/release/{chunk_id}",
    status_code=HTTPStatus.ACCEPTED,
    responses={
        200: {"model": ApprovalView, "description": "Done: approvals are switched off."},
        202: {"description": "It waits for another principal's approval."},
        **problems(DatabaseNotFound, LeaseNotFound, UnsupportedMediaType, DiskFull, ManifestFull),
    },
)
@needs("admin")
async def release_lease(
    chunk_id: ChunkPath,
    tenant: TenantNamed,
    database: DatabaseNamed,
    body: ReasonBody,
    request: Request,
    response: Response,
) -> ApprovalView:
    """Takes a chunk's lease from its holder, which publishes nothing under it any more."""
    principal = principal_of(request)
    require_tenant(principal, tenant)
    approval = await services_of(request).approvals.release_lease(
        tenant, database, chunk_id, reason=body.reason, principal=principal.name
    )
    if approval.state == "approved":
        response.status_code = HTTPStatus.OK
    else:
        response.headers["Location"] = "/admin/approvals"
    return _shown(request, approval)


@router.get("/approvals")
@needs("admin")
async def list_approvals(page: PageQuery, request: Request, response: Response) -> ApprovalPage:
    """Those that wait and those that were decided, newest first."""
    approvals, principal = services_of(request).approvals, principal_of(request)
    found = seen_only(
        lambda limit, after: approvals.list(limit=limit, after=after),
        key=lambda approval: approval.approval_id,
        sees=lambda approval: principal.sees(approval.tenant),
        limit=page.limit + 1,
        after=page.after(str),
    )
    shown, cursor = page.cut(
        found, lambda approval: approval.approval_id, request=request, response=response
    )
    return ApprovalPage(items=[_shown(request, one) for one in shown], next_cursor=cursor)


@router.post(
    "/approvals/{approval_id}/approve",
    responses=problems(ApprovalNotFound, LeaseNotFound, SelfApproval, DiskFull, ManifestFull),
)
@needs("admin")
async def approve(
    approval_id: ApprovalPath, request: Request, body: WhyBody = NO_REASON
) -> ApprovalView:
    """Does what another principal asked for."""
    del body
    principal = principal_of(request)
    approval = await services_of(request).approvals.approve(
        approval_id, principal=principal.name, sees=principal.sees
    )
    return _shown(request, approval)


@router.post(
    "/approvals/{approval_id}/reject",
    responses=problems(ApprovalNotFound, DiskFull, ManifestFull),
)
@needs("admin")
async def reject(
    approval_id: ApprovalPath, request: Request, body: WhyBody = NO_REASON
) -> ApprovalView:
    """Ends it; nothing is done. Whoever asked takes it back so."""
    del body
    principal = principal_of(request)
    approval = await services_of(request).approvals.reject(
        approval_id, principal=principal.name, sees=principal.sees
    )
    return _shown(request, approval)


def _shown(request: Request, approval: ApprovalRecord) -> ApprovalView:
    return ApprovalView.of(approval, expired=services_of(request).approvals.is_expired(approval))
