"""What was published of a database, and when."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from app.core.base.errors import DatabaseNotFound
from app.routers.auth import needs
from app.routers.databases import DATABASE_PATH
from app.routers.deps import DatabaseName, TenantName, services_of
from app.routers.openapi import problems
from app.routers.paging import PageQuery
from app.routers.route import ScopedRoute
from app.routers.schemas import GenerationPage, GenerationView

router = APIRouter(route_class=ScopedRoute, tags=["history"])


@router.get(f"{DATABASE_PATH}/generations", responses=problems(DatabaseNotFound))
@needs("read")
async def list_generations(
    tenant: TenantName,
    database: DatabaseName,
    page: PageQuery,
    request: Request,
    response: Response,
    expiring: Annotated[
        bool, Query(description="Only those that no rule and no snapshot keeps any longer.")
    ] = False,
) -> GenerationPage:
    """Retained generations, oldest first."""
    found = services_of(request).history.generations(
        tenant, database, limit=page.limit + 1, after=page.after(int), expiring=expiring
    )
    shown, cursor = page.cut(
        found, lambda record: record.generation, request=request, response=response
    )
    return GenerationPage(items=[GenerationView.of(one) for one in shown], next_cursor=cursor)
