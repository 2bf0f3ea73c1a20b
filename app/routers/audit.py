"""The audit log. A token bound to tenants sees what concerns them only (I12)."""

from fastapi import APIRouter, Request, Response

from app.core.stores.manifest.admin_records import AuditRecord
from app.routers.admin_schemas import AuditPage, AuditView
from app.routers.auth import needs
from app.routers.deps import services_of
from app.routers.exchange import principal_of
from app.routers.paging import PageQuery, seen_only
from app.routers.route import ScopedRoute

router = APIRouter(route_class=ScopedRoute, prefix="/admin", tags=["admin"])


@router.get("/audit")
@needs("admin")
async def list_audit(page: PageQuery, request: Request, response: Response) -> AuditPage:
    """Who did what, when, why, and how it ended; newest first."""
    audit, principal = services_of(request).audit, principal_of(request)

    def sees(entry: AuditRecord) -> bool:
        return principal.tenants is None or (
            entry.tenant is not None and principal.sees(entry.tenant)
        )

    found = seen_only(
        lambda limit, after: audit.list(limit=limit, after=after),
        key=lambda entry: entry.sequence,
        sees=sees,
        limit=page.limit + 1,
        after=page.after(int),
    )
    shown, cursor = page.cut(
        found, lambda entry: entry.sequence, request=request, response=response
    )
    return AuditPage(items=[AuditView.of(entry) for entry in shown], next_cursor=cursor)
