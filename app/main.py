"""Joins HTTP to the core: `create_app` for a server of one's own, `serve` for the process.

The process ends in order: on SIGTERM readiness goes down and no job is claimed, answers in flight
end, then everything is closed; on a fatal error (I16) the same happens at once and the exit code
says so.
"""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import FrameType
from typing import Protocol

import uvicorn
from fastapi import FastAPI

from app.container import Container, open_container
from app.core.base.clock import Clock, Randomness, SystemClock, SystemRandomness
from app.core.base.errors import StartRefused
from app.core.base.events import Events
from app.observability.http_metrics import HttpMetrics
from app.observability.logging import log_sink, route_library_logs
from app.observability.metrics import Metrics
from app.routers import (
    approvals,
    audit,
    changes,
    checkpoints,
    cold_scans,
    collection,
    databases,
    debug,
    forks,
    generation_jobs,
    health,
    history,
    image_upload,
    images,
    jobs,
    limits,
    openapi,
    pages,
    problems,
    records,
    snapshots,
    truncations,
    upkeep,
    wal,
)
from app.routers.auth import Authenticator
from app.routers.bodies import Spool
from app.routers.deps import Desk
from app.routers.middleware import Edge
from app.settings import Settings

VERSION = "0.1.0"
EXIT_DONE, EXIT_FAILED = 0, 1

ROUTERS = (
    records,
    pages,
    wal,
    images,
    image_upload,
    databases,
    checkpoints,
    cold_scans,
    truncations,
    jobs,
    generation_jobs,
    history,
    snapshots,
    forks,
    changes,
    collection,
    debug,
    approvals,
    audit,
    limits,
    upkeep,
    health,
)
"""In the order they are matched: the busiest first."""


class OpenContainer(Protocol):
    def __call__(
        self, settings: Settings, *, events: Events, on_fatal: Callable[[BaseException], None]
    ) -> AbstractAsyncContextManager[Container]: ...


def create_app(
    settings: Settings,
    *,
    events: Events | None = None,
    clock: Clock | None = None,
    randomness: Randomness | None = None,
    open_container: OpenContainer = open_container,
    on_fatal: Callable[[BaseException], None] | None = None,
) -> FastAPI:
    """The application. Its lifespan opens the container and closes it; `on_fatal` is told when
    the process must end. Raises StartRefused where the tokens file cannot be used.
    """
    events, clock = events or Events(), clock or SystemClock()
    metrics = Metrics()
    events.subscribe(metrics.sink)
    desk = Desk(settings=settings, clock=clock, events=events, metrics=metrics)
    authenticator = Authenticator(settings.auth_tokens_file, clock=clock, events=events)
    authenticator.open_blocking()

    def fail(error: BaseException) -> None:
        desk.fail(error)
        if on_fatal is not None:
            on_fatal(error)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        spool = Spool(settings.data_dir / "spool")
        try:
            async with open_container(settings, events=events, on_fatal=fail) as container:
                metrics.watch(gauges_of(container, desk))
                desk.open(container, spool)
                try:
                    yield
                finally:
                    desk.begin_shutdown()
                    metrics.unwatch()
        except StartRefused as refusal:
            events.error("service.start_refused", detail=str(refusal))
            raise
        finally:
            desk.close()
            await asyncio.to_thread(spool.close_blocking)

    app = FastAPI(
        title="bop-checkpoint",
        version=VERSION,
        summary="Durable, incremental, provably restorable checkpoints on S3.",
        lifespan=lifespan,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,
    )
    app.state.desk = desk
    app.state.authenticator = authenticator
    for module in ROUTERS:
        # Not include_router: appends are matched first and in one step.
        app.router.routes.extend(module.router.routes)
    problems.install(app)
    openapi.install(app)
    app.add_middleware(
        Edge,
        authenticator=authenticator,
        events=events,
        clock=clock,
        randomness=randomness or SystemRandomness(),
    )
    app.add_middleware(HttpMetrics, metrics=metrics)
    return app


def gauges_of(container: Container, desk: Desk) -> dict[str, Callable[[], float]]:
    gauges = container.gauges
    return {
        "checkpoint_queue_depth": gauges.queue_depth,
        "wal_bytes": gauges.wal_bytes,
        "storage_quota_used_bytes": gauges.quota_used_bytes,
        "hot_cache_bytes": gauges.hot_cache_bytes,
        "page_cache_bytes": gauges.page_cache_bytes,
        "cold_scans_active": gauges.cold_scans,
        "body_memory_bytes": lambda: desk.memory.used_bytes,
        "service_ready": lambda: desk.readiness().status == "ready",
        "service_degraded": lambda: len(desk.readiness().degraded),
    }


def serve(settings: Settings) -> int:
    """Runs the service until a signal or a fatal error. Returns the process's exit code."""
    sink = log_sink(log_format=settings.log_format, level=settings.log_level)
    route_library_logs(sink, level=settings.log_level)
    events = Events(sink)

    def end(error: BaseException) -> None:
        server.fail(error)

    try:
        app = create_app(settings, events=events, on_fatal=end)
    except StartRefused as refusal:
        events.error("service.start_refused", detail=str(refusal))
        return EXIT_FAILED
    server = OrderlyServer(app, settings)
    try:
        server.run()
    except SystemExit:
        return EXIT_FAILED  # uvicorn could not start; why is in the log
    return EXIT_FAILED if server.failed else EXIT_DONE


class OrderlyServer(uvicorn.Server):
    """Ends in order on a signal or a fatal error, and returns instead of re-raising the signal."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                loop="uvloop",
                http="httptools",
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=max(1, round(settings.shutdown_seconds)),
            )
        )
        self.failed = False
        self._desk: Desk = app.state.desk

    def fail(self, error: BaseException) -> None:
        del error
        self.failed = True
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal that was asked for is no failure, so it is not raised again at the end."""
        del frame
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Readiness goes down and long polls end before connections are waited for."""
        self._desk.begin_shutdown()
        await super().shutdown(sockets)
