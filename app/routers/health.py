"""Is it alive, is it ready, what does it count. Open to all: nothing of a tenant is told but the
names of databases, within `BOP_METRICS_DATABASES_MAX`.
"""

from http import HTTPStatus

from fastapi import APIRouter, Request, Response

from app.routers.auth import open_to_all
from app.routers.deps import desk_of
from app.routers.operations_schemas import AliveView, ReadinessView
from app.routers.problems import RETRY_AFTER_SECONDS
from app.routers.route import ScopedRoute

router = APIRouter(route_class=ScopedRoute, tags=["operations"])


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz")
@open_to_all
async def healthz() -> AliveView:
    """The process answers."""
    return AliveView(status="alive")


@router.head("/readyz", include_in_schema=False)
@router.get(
    "/readyz",
    responses={503: {"model": ReadinessView, "description": "Not ready, and why."}},
)
@open_to_all
async def readyz(request: Request, response: Response) -> ReadinessView:
    """Recovered, manifest open, prefix claimed. A remote store that fails later degrades the
    service and leaves it ready.
    """
    readiness = desk_of(request).readiness()
    if readiness.status != "ready":
        response.status_code = HTTPStatus.SERVICE_UNAVAILABLE
        response.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    return ReadinessView(
        status=readiness.status, reasons=readiness.reasons, degraded=readiness.degraded
    )


@router.head("/metrics", include_in_schema=False)
@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {
            "description": "Prometheus text, or OpenMetrics where Accept asks for it.",
            "content": {
                "text/plain": {
                    "schema": {"type": "string"},
                    "example": "checkpoint_queue_depth 0.0\n",
                },
                "application/openmetrics-text": {
                    "schema": {"type": "string"},
                    "example": "checkpoint_queue_depth 0.0\n# EOF\n",
                },
            },
        }
    },
)
@open_to_all
async def metrics(request: Request) -> Response:
    desk = desk_of(request)
    await desk.look_at_freshness()
    body, media_type = desk.metrics.exposition(request.headers.get("accept", ""))
    return Response(body, headers={"Content-Type": media_type})
