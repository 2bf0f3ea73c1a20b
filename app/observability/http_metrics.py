"""Counts answered requests: the outermost layer, so that refusals count too.

prometheus-fastapi-instrumentator measures; under which route a request was answered the router
has left in the scope by then. POSTs (appends, logs, what asks for jobs) and reads of pages, which
the objects that it makes of each request would cost throughput, are counted directly.
"""

import time

from prometheus_fastapi_instrumentator.metrics import Info
from prometheus_fastapi_instrumentator.middleware import PrometheusInstrumentatorMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.observability.metrics import Metrics

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""Labels of metrics; whatever else a client makes up counts as `other`."""


class HttpMetrics:
    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        self._instrumented = _Instrumented(
            app,
            should_group_status_codes=False,
            instrumentations=[self._count],
            registry=metrics.registry,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif _is_frequent(scope["method"], scope["path"]):
            await self._frequent(scope, receive, send)
        else:
            await self._instrumented(scope, receive, send)

    async def _frequent(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 500
        began = time.perf_counter()

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            self._metrics.on_answer(
                method=scope["method"],
                template=_template_of(scope),
                status=status,
                seconds=time.perf_counter() - began,
            )

    def _count(self, info: Info) -> None:
        self._metrics.on_answer(
            method=info.method if info.method in METHODS else "other",
            template=_template_of(info.request.scope),
            status=int(info.modified_status),
            seconds=info.modified_duration,
        )


class _Instrumented(PrometheusInstrumentatorMiddleware):
    """Without the library's own look-up, which tries all routes a second time."""

    def _get_handler(self, request: Request) -> tuple[str, bool]:
        del request
        return "", True


def _template_of(scope: Scope) -> str:
    template: str = getattr(scope.get("route"), "path", "none")
    return template


def _is_frequent(method: str, path: str) -> bool:
    return method == "POST" or (method == "GET" and "/pages/" in path)
