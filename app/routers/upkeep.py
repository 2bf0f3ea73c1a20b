"""The job queue as a whole, and the janitor on demand."""

from fastapi import APIRouter, Request

from app.core.base.errors import Backpressure, DiskFull, ManifestFull, UnsupportedMediaType
from app.routers.admin_schemas import NO_REASON, WhyBody
from app.routers.auth import needs, require_unbound
from app.routers.deps import services_of
from app.routers.exchange import principal_of
from app.routers.openapi import problems
from app.routers.route import ScopedRoute
from app.routers.upkeep_schemas import JanitorView, QueueView, RunJanitorBody

router = APIRouter(route_class=ScopedRoute, prefix="/admin", tags=["upkeep"])
_CHANGES = (Backpressure, DiskFull, ManifestFull)
_ALL_DEAD = RunJanitorBody()


@router.get("/queue")
@needs("admin")
async def show_queue(request: Request) -> QueueView:
    """Whether new jobs are taken, and how many wait and run."""
    require_unbound(principal_of(request))
    return QueueView.of(services_of(request).upkeep.queue())


@router.post("/queue/drain", responses=problems(*_CHANGES))
@needs("admin")
async def drain_queue(request: Request, body: WhyBody = NO_REASON) -> QueueView:
    """Refuses new jobs with `queue_drained`, restarts included; those that are there go on to
    their end.
    """
    del body
    require_unbound(principal_of(request))
    return QueueView.of(await services_of(request).upkeep.drain_queue())


@router.post("/queue/resume", responses=problems(*_CHANGES))
@needs("admin")
async def resume_queue(request: Request, body: WhyBody = NO_REASON) -> QueueView:
    """Takes new jobs again."""
    del body
    require_unbound(principal_of(request))
    return QueueView.of(await services_of(request).upkeep.resume_queue())


@router.post("/janitor/run", responses=problems(UnsupportedMediaType))
@needs("admin")
async def run_janitor(request: Request, body: RunJanitorBody = _ALL_DEAD) -> JanitorView:
    """Removes scratch directories of no live job, and makes the quota's books agree with the
    files that are there.
    """
    require_unbound(principal_of(request))
    report = await services_of(request).upkeep.run_janitor(max_age_seconds=body.max_age_seconds)
    return JanitorView.of(report)
