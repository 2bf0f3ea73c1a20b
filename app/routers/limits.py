"""Storage limits and feature flags, of all tenants and of one."""

from fastapi import APIRouter, Request

from app.core.base.errors import (
    Backpressure,
    DiskFull,
    ManifestFull,
    NotFound,
    UnsupportedMediaType,
)
from app.core.services.tenants import TenantLimits
from app.routers.auth import needs, require_unbound
from app.routers.deps import TenantName, services_of
from app.routers.exchange import principal_of
from app.routers.limits_schemas import (
    ChangeFlagsBody,
    FlagsView,
    GlobalLimitBody,
    GlobalLimitView,
    TenantLimitsBody,
    TenantLimitsView,
)
from app.routers.openapi import problems
from app.routers.route import ScopedRoute

router = APIRouter(route_class=ScopedRoute, prefix="/admin", tags=["limits and flags"])
_CHANGES = (UnsupportedMediaType, Backpressure, DiskFull, ManifestFull)


@router.get("/quota")
@needs("admin")
async def show_global_limit(request: Request) -> GlobalLimitView:
    """How much of the disk WAL, scratch and hot cache may take together."""
    require_unbound(principal_of(request))
    return GlobalLimitView(global_bytes=services_of(request).tenants.global_limit_bytes())


@router.put("/quota", responses=problems(*_CHANGES))
@needs("admin")
async def set_global_limit(body: GlobalLimitBody, request: Request) -> GlobalLimitView:
    """Holds at once and over restarts. A limit below what is used drops cache; further
    reservations are refused until use has fallen.
    """
    require_unbound(principal_of(request))
    held = await services_of(request).tenants.set_global_limit(body.global_bytes)
    return GlobalLimitView(global_bytes=held)


@router.get("/tenants/{tenant}/quota", responses=problems(NotFound))
@needs("admin")
async def show_tenant_limits(tenant: TenantName, request: Request) -> TenantLimitsView:
    """The tenant's limit, and that of each of its jobs."""
    return TenantLimitsView.of(tenant, services_of(request).tenants.limits(tenant))


@router.put("/tenants/{tenant}/quota", responses=problems(NotFound, *_CHANGES))
@needs("admin")
async def set_tenant_limits(
    tenant: TenantName, body: TenantLimitsBody, request: Request
) -> TenantLimitsView:
    """Holds at once and over restarts, also for a tenant that has no database yet."""
    limits = await services_of(request).tenants.set_limits(
        tenant, TenantLimits(limit_bytes=body.limit_bytes, job_limit_bytes=body.job_limit_bytes)
    )
    return TenantLimitsView.of(tenant, limits)


@router.get("/tenants/{tenant}/feature-flags", responses=problems(NotFound))
@needs("admin")
async def show_flags(tenant: TenantName, request: Request) -> FlagsView:
    """What is switched on for the tenant; all of it by default."""
    return FlagsView.of(services_of(request).tenants.flags(tenant))


@router.patch("/tenants/{tenant}/feature-flags", responses=problems(NotFound, *_CHANGES))
@needs("admin")
async def change_flags(tenant: TenantName, body: ChangeFlagsBody, request: Request) -> FlagsView:
    """Holds at once, for new work; what runs goes on to its end."""
    flags = await services_of(request).tenants.set_flags(tenant, body.changes())
    return FlagsView.of(flags)
