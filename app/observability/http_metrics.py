"""Counts answered requests: the outermost layer, so that refusals count too.

Under the route that answered them, which the router leaves in the scope. A library would match
routes a second time to find it, and small requests would pay for that with throughput.
"""

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.observability.metrics import Metrics

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""Labels of metrics; whatever else a client makes up counts as `other`."""


class HttpMetrics:
    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
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
            method = scope["method"]
            self._metrics.on_answer(
                method=method if method in METHODS else "other",
                template=getattr(scope.get("route"), "path", "none"),
                status=status,
                seconds=time.perf_counter() - began,
            )
