"""What endpoints are given: the open service, the edge's own parts, names from the path."""

from typing import Annotated, Any

from fastapi import Path, Query, Request

from app.container import Container, Readiness, Services
from app.core.base.clock import Clock
from app.core.base.errors import BopError, FatalError, InvalidRequest, NotReady
from app.core.base.events import Events
from app.core.base.ids import is_name
from app.observability.metrics import Metrics
from app.routers.bodies import BodyLimits, BodyMemory, Spool
from app.routers.schemas import NAME_PATTERN
from app.routers.waiting import Stopping
from app.settings import Settings

WAIT_SECONDS_MAX = 60

TenantName = Annotated[str, Path(pattern=NAME_PATTERN, examples=["acme"])]
DatabaseName = Annotated[str, Path(pattern=NAME_PATTERN, examples=["events"])]
NAME_PARAMETERS: list[dict[str, Any]] = [
    {
        "name": name,
        "in": "path",
        "required": True,
        "schema": {"type": "string", "pattern": NAME_PATTERN},
        "example": example,
    }
    for name, example in (("tenant", "acme"), ("database", "events"))
]
"""For endpoints that take the bare request."""
WaitQuery = Annotated[
    float,
    Query(
        ge=0,
        le=WAIT_SECONDS_MAX,
        allow_inf_nan=False,
        description="How many seconds to wait for what is asked.",
    ),
]


class Desk:
    """What all endpoints of one app share. The service behind it opens and closes with the app."""

    def __init__(
        self, *, settings: Settings, clock: Clock, events: Events, metrics: Metrics
    ) -> None:
        self.settings = settings
        self.clock = clock
        self.events = events
        self.metrics = metrics
        self.memory = BodyMemory(settings.body_memory_bytes)
        self.stopping = Stopping()
        self.append_limits = self.body_limits(settings.max_append_bytes, "max_append_bytes")
        self.wal_limits = self.body_limits(settings.max_wal_bytes, "max_wal_bytes")
        self.image_limits = self.body_limits(settings.max_image_bytes, "max_image_bytes")
        self.json_limits = self.body_limits(settings.max_json_bytes, "max_json_bytes")
        self._container: Container | None = None
        self._spool: Spool | None = None
        self._failure: str | None = None

    @property
    def services(self) -> Services:
        """Raises NotReady while the service is not open."""
        if self._container is None:
            raise NotReady("The service is not open.")
        return self._container.services

    @property
    def spool(self) -> Spool:
        """Raises NotReady while the service is not open."""
        if self._spool is None:
            raise NotReady("The service is not open.")
        return self._spool

    def readiness(self) -> Readiness:
        if self._failure is not None:
            return Readiness(status="failed", reasons=[self._failure], degraded=[])
        if self._container is None:
            return Readiness(status="starting", reasons=["the service is opening"], degraded=[])
        return self._container.readiness()

    async def look_at_freshness(self) -> None:
        """For the next scrape. One that cannot be had leaves the last: a scrape always answers."""
        if self._container is None:
            return
        try:
            self.metrics.freshness.show(await self._container.services.freshness.look())
        except (BopError, FatalError) as error:
            self.events.warning("metrics.freshness_unknown", detail=str(error))

    def open(self, container: Container, spool: Spool) -> None:
        self._container, self._spool = container, spool

    def begin_shutdown(self) -> None:
        """Readiness goes down; long polls and event streams end. May be called again."""
        self.stopping.set()
        if self._container is not None:
            self._container.begin_shutdown()

    def fail(self, error: BaseException) -> None:
        """The process must end (I16): from now on it says so, and starts nothing."""
        self._failure = f"{type(error).__name__}: {error}"
        self.events.error("service.failed", detail=str(error), exception=error)
        if self._container is not None:
            self._container.fail(self._failure)

    def close(self) -> None:
        self._container = self._spool = None

    def body_limits(self, bytes_max: int, limit_name: str) -> BodyLimits:
        return BodyLimits(
            bytes_max=bytes_max,
            limit_name=limit_name,
            idle_timeout_seconds=self.settings.body_idle_timeout_seconds,
            bytes_per_second_min=self.settings.body_bytes_per_second_min,
        )


def desk_of(request: Request) -> Desk:
    desk: Desk = request.app.state.desk
    return desk


def services_of(request: Request) -> Services:
    return desk_of(request).services


def names_of(request: Request) -> tuple[str, str]:
    """Tenant and database of the path, for endpoints that take the bare request.
    Raises InvalidRequest.
    """
    tenant, database = request.path_params["tenant"], request.path_params["database"]
    errors = [
        {
            "loc": ["path", name],
            "msg": f"String should match pattern '{NAME_PATTERN}'",
            "type": "string_pattern_mismatch",
        }
        for name, value in (("tenant", tenant), ("database", database))
        if not is_name(value)
    ]
    if errors:
        raise InvalidRequest("A name in the path is not valid.", errors=errors)
    return tenant, database
