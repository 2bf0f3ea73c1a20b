"""Finds a request's route without trying all of them: by its first segment and its slashes.

What is not found here, or is traced, goes the framework's own way, which also answers 404 and 405.
"""

from collections import defaultdict
from collections.abc import Sequence

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from app.routers.route import ScopedRoute

Shape = tuple[str, int]


class RouteIndex:
    """Stands before the router's own loop; `routes` keeps its order among those of one shape."""

    def __init__(self, routes: Sequence[BaseRoute], *, otherwise: ASGIApp) -> None:
        self._routes = routes
        self._otherwise = otherwise
        self._known: dict[Shape, list[ScopedRoute]] = {}
        self._count = -1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and "fastapi.telemetry" not in scope:
            if len(self._routes) != self._count:
                self._build()
            path: str = scope["path"]
            for route in self._known.get(_shape_of(path), ()):
                match, child_scope = route.matches(scope)
                if match is Match.FULL:
                    scope.update(child_scope)
                    await route.handle(scope, receive, send)
                    return
        await self._otherwise(scope, receive, send)

    def _build(self) -> None:
        known: dict[Shape, list[ScopedRoute]] = defaultdict(list)
        for route in self._routes:
            if isinstance(route, ScopedRoute):
                known[_shape_of(route.path)].append(route)
        self._known, self._count = dict(known), len(self._routes)


def _shape_of(path: str) -> Shape:
    """No route begins with a parameter, and no parameter takes a slash."""
    return path[: path.find("/", 1) + 1 or None], path.count("/")
