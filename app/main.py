"""Joins HTTP to the core: `create_app` for a server of one's own, `serve` for the process.

The process ends in order: on SIGTERM readiness goes down and no job is claimed, answers in flight
end, then everything is closed; on a fatal error (I16) the same happens at once and the exit code
says so.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig

from app import __version__
from app.container import Container, open_container
from app.core.base.clock import Clock, Randomness, SystemClock, SystemRandomness
from app.core.base.errors import InternalError, StartRefused
from app.core.base.events import Events
from app.observability.http_metrics import HttpMetrics
from app.observability.logging import log_sink, route_library_logs
from app.observability.metrics import Metrics
from app.observability.tracing import Tracing
from app.routers import (
    approvals,
    audit,
    changes,
    checkpoints,
    cold_scans,
    collection,
    databases,
    debug,
    diagnosis,
    docs,
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
from app.routers.exchange import current_span
from app.routers.index import RouteIndex
from app.routers.middleware import PROBED_PATHS, Edge
from app.routers.oidc import OidcRules, OidcTokens
from app.routers.tokens import FileTokens
from app.serving.server import OrderlyServer, raise_descriptor_limit
from app.settings import Settings, unknown_variables

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
    diagnosis,
    approvals,
    audit,
    limits,
    upkeep,
    health,
    docs,
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
    metrics = Metrics(databases_max=settings.metrics_databases_max, clock=clock)
    events.subscribe(metrics.sink)
    desk = Desk(settings=settings, clock=clock, events=events, metrics=metrics)
    authenticator = _authenticator(settings, clock=clock, events=events)
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
        except InternalError as error:  # a format of another version, a row that is damaged
            events.error("service.start_refused", detail=error.advice)
            raise StartRefused(error.advice) from error
        finally:
            desk.close()
            await asyncio.to_thread(spool.close_blocking)
            if tracing is not None:
                await asyncio.to_thread(tracing.close_blocking)

    tracing = None
    if settings.otlp_endpoint:
        tracing = Tracing.open(
            settings.otlp_endpoint, ratio=settings.trace_ratio, version=__version__
        )
    app = FastAPI(
        title="bop-checkpoint",
        version=__version__,
        summary="Durable, incremental, provably restorable checkpoints on S3.",
        lifespan=lifespan,
        docs_url=None,  # routers/docs.py
        redoc_url=None,
        redirect_slashes=False,
        telemetry=_telemetry(tracing),
    )
    app.state.desk = desk
    app.state.authenticator = authenticator
    for module in ROUTERS:
        # Not include_router: appends are matched first and in one step.
        app.router.routes.extend(module.router.routes)
    app.router.middleware_stack = RouteIndex(app.router.routes, otherwise=app.router.app)
    problems.install(app)
    openapi.install(app)
    app.add_middleware(
        Edge,
        authenticator=authenticator,
        events=events,
        clock=clock,
        randomness=randomness or SystemRandomness(),
        admin_port=settings.admin_port,
        current_span=None if tracing is None else current_span,
    )
    app.add_middleware(HttpMetrics, metrics=metrics)
    return app


def _telemetry(tracing: Tracing | None) -> TelemetryConfig:
    """FastAPI's own: spans of requests, probes apart, and nothing else."""
    config: TelemetryConfig = {
        "tracing": tracing is not None,
        "metrics": False,
        "logs": False,
        "operation_spans": False,
        "auto_configure": False,
        "exclude": lambda scope: scope.get("path") in PROBED_PATHS,
    }
    if tracing is not None:
        config["tracer_provider"] = tracing.provider
    return config


def _authenticator(settings: Settings, *, clock: Clock, events: Events) -> Authenticator:
    path = settings.auth_tokens_file
    oidc = None
    if settings.oidc_issuer:
        rules = OidcRules(
            issuer=settings.oidc_issuer,
            audience=settings.oidc_audience,
            jwks=settings.oidc_jwks,
            algorithms=frozenset(settings.oidc_algorithms),
            name_claim=settings.oidc_name_claim,
            scopes_claim=settings.oidc_scopes_claim,
            tenants_claim=settings.oidc_tenants_claim,
            leeway_seconds=settings.oidc_leeway_seconds,
        )
        oidc = OidcTokens(rules, clock=clock, events=events)
    file = None if path is None else FileTokens(path, clock=clock, events=events)
    return Authenticator(file=file, oidc=oidc)


def gauges_of(container: Container, desk: Desk) -> dict[str, Callable[[], float]]:
    """Called on the loop whose tasks are counted."""
    gauges, loop = container.gauges, asyncio.get_running_loop()
    return {
        "checkpoint_queue_depth": gauges.queue_depth,
        "wal_bytes": gauges.wal_bytes,
        "wal_budget_bytes": gauges.wal_budget_bytes,
        "storage_quota_used_bytes": gauges.quota_used_bytes,
        "storage_quota_limit_bytes": gauges.quota_limit_bytes,
        "hot_cache_bytes": gauges.hot_cache_bytes,
        "page_cache_bytes": gauges.page_cache_bytes,
        "cold_scans_active": gauges.cold_scans,
        "gc_queue_blobs": gauges.gc_queue,
        "gc_lag_seconds": gauges.gc_lag_seconds,
        "gc_paused": gauges.gc_paused,
        "body_memory_bytes": lambda: desk.memory.used_bytes,
        "event_loop_tasks": lambda: len(asyncio.all_tasks(loop)),
        "service_ready": lambda: desk.readiness().status == "ready",
        "service_degraded.remote": lambda: "remote" in desk.readiness().degraded,
        "service_degraded.manifest": lambda: "manifest" in desk.readiness().degraded,
    }


def serve(settings: Settings) -> int:
    """Runs the service until a signal or a fatal error. Returns the process's exit code."""
    sink = log_sink(log_format=settings.log_format, level=settings.log_level)
    route_library_logs(sink, level=settings.log_level)
    events = Events(sink)
    if unknown := unknown_variables():
        events.warning("settings.unknown", detail="No settings are called so.", names=unknown)

    def end(error: BaseException) -> None:
        server.fail(error)

    try:
        app = create_app(settings, events=events, on_fatal=end)
    except StartRefused as refusal:
        events.error("service.start_refused", detail=str(refusal))
        return EXIT_FAILED
    raise_descriptor_limit()
    server = OrderlyServer(app, settings, events=events)
    try:
        server.run()
    except SystemExit:
        return EXIT_FAILED  # uvicorn could not start; why is in the log
    return EXIT_FAILED if server.failed else EXIT_DONE
