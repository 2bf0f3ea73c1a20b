"""How every endpoint is reached: scope, tenant, media type and size first, then its parameters.

Invariants: denied by default: a route without a scope cannot be made. I12: a token bound to
tenants meets 404 wherever the path names another, before the request is looked at further.
I11: a JSON body is read within its limit. What an operator changes is audited.

Concurrency: no state but the route's own. Cancellation, crash: nothing is held.
"""

import inspect
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from app.core.base.errors import BodyTooLarge, InvalidRequest, UnsupportedMediaType
from app.core.base.events import event_context
from app.routers.auditing import SAFE_METHODS, audited
from app.routers.auth import OPEN_PATHS, require_path_tenant, require_scope, scopes_of
from app.routers.bodies import BodyReader
from app.routers.deps import desk_of
from app.routers.exchange import exchange_of, principal_of
from app.routers.headers import media_type_of
from app.routers.openapi import common_problems, merged, problems
from app.routers.schemas import Body

JSON = "application/json"
BODILESS_METHODS = SAFE_METHODS | {"DELETE"}
Handle = Callable[[Request], Coroutine[Any, Any, Response]]


class ScopedRoute(APIRoute):
    scopes: frozenset[str]

    def __init__(self, path: str, endpoint: Callable[..., Any], **kwargs: Any) -> None:
        scopes = scopes_of(endpoint)
        if scopes is None:
            raise TypeError(f"{path}: {endpoint.__qualname__} names no scope; use @needs")
        if not scopes and path not in OPEN_PATHS:
            raise TypeError(f"{path} is not one of the open paths")
        self.scopes = scopes
        self.is_audited = "admin" in scopes and not SAFE_METHODS.issuperset(kwargs["methods"] or ())
        self.refuses_body = not (
            BODILESS_METHODS.issuperset(kwargs["methods"] or ())
            or _takes_json(endpoint)
            or "requestBody" in (kwargs.get("openapi_extra") or {})
        )
        said = merged(kwargs.get("responses") or {}, common_problems(guarded=bool(scopes)))
        if self.refuses_body:
            said = merged(said, problems(BodyTooLarge))
        if _takes_json(endpoint):
            said = merged(said, problems(BodyTooLarge, UnsupportedMediaType))
        kwargs["responses"] = said
        if scopes:
            extra = kwargs.get("openapi_extra") or {}
            security = [{"bearer": [scope]} for scope in sorted(scopes)]
            kwargs["openapi_extra"] = {**extra, "security": security}
        self._head, self._tail, self._slashes = _outline(path)
        kwargs["strict_content_type"] = False  # none given is JSON; another one is 415, below
        super().__init__(path, endpoint, **kwargs)
        if _takes_bare_request(endpoint):
            self.app = _straight(self.get_route_handler())

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Most routes are ruled out by a look at both ends of the path: with a hundred of them,
        trying each one's pattern costs a small request more than all else.
        """
        path: str = scope["path"]
        if (
            not path.startswith(self._head)
            or not path.endswith(self._tail)
            or path.count("/") != self._slashes
        ):
            return Match.NONE, {}
        return super().matches(scope)

    def get_route_handler(self) -> Handle:
        handle = super().get_route_handler()
        if _takes_bare_request(self.endpoint):
            handle = self.endpoint  # FastAPI has nothing to resolve: a third of a small append
        if self.is_audited:
            handle = audited(handle, template=self.path)
        if self.body_field is not None:
            needed = self.body_field.field_info.is_required()
            handle = _of_json(_with_body(handle), needed=needed)
        elif self.refuses_body:
            handle = _with_body(_without_fields(handle))
        if not self.scopes:
            return handle
        scopes, names_database = self.scopes, "{database}" in self.path

        async def guarded(request: Request) -> Response:
            principal = principal_of(request)
            tenant = request.path_params.get("tenant")
            context = event_context.get()
            if tenant is not None and context is not None:
                context["tenant"] = tenant
            require_scope(principal, scopes)
            if principal.tenants is not None:
                require_path_tenant(principal, tenant, names_database=names_database)
            return await handle(request)

        return guarded


def _straight(handle: Handle) -> ASGIApp:
    """Without what FastAPI puts around an endpoint for its dependencies and files, of which there
    are none here. Errors are answered by the handlers outside of the router, the same ones.
    """

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        response = await handle(Request(scope, receive, send))
        await response(scope, receive, send)

    return answer


def _outline(path: str) -> tuple[str, str, int]:
    """What comes before the first parameter and behind the last one, and how many slashes there
    are. A parameter takes no slash.
    """
    if ":path}" in path:
        raise TypeError(f"{path}: a parameter that takes slashes is not foreseen")
    return path.partition("{")[0], path.rpartition("}")[2], path.count("/")


def _takes_bare_request(endpoint: Callable[..., Any]) -> bool:
    signature = inspect.signature(endpoint)
    return list(signature.parameters) == ["request"] and signature.return_annotation is Response


def _takes_json(endpoint: Callable[..., Any]) -> bool:
    parameters = inspect.signature(endpoint).parameters.values()
    return any(
        isinstance(one.annotation, type) and issubclass(one.annotation, Body) for one in parameters
    )


def _of_json(handle: Handle, *, needed: bool) -> Handle:
    """A body that may be left out, and is, has no media type to be wrong."""

    async def check_first(request: Request) -> Response:
        exchange = exchange_of(request)
        if not needed and not exchange.body_declared and not exchange.body_chunked:
            return await handle(request)
        media_type = media_type_of(request.headers.get("content-type"))
        if media_type not in {"", JSON}:
            raise UnsupportedMediaType(
                f"This takes {JSON}.", content_type=media_type, supported=[JSON]
            )
        return await handle(request)

    return check_first


def _without_fields(handle: Handle) -> Handle:
    """The endpoint takes nothing; an empty object is nothing. What else it was meant to say must
    not be taken for heard.
    """

    async def check_first(request: Request) -> Response:
        if (await request.body()).strip() not in {b"", b"{}"}:
            error = {"loc": ["body"], "msg": "Extra inputs are not permitted"}
            raise InvalidRequest(
                "This takes no body.", errors=[{**error, "type": "extra_forbidden"}]
            )
        return await handle(request)

    return check_first


def _with_body(handle: Handle) -> Handle:
    """Reads the body within the limits of JSON bodies before others do so without any."""

    async def read_first(request: Request) -> Response:
        desk = desk_of(request)
        reader = BodyReader(exchange_of(request), desk.json_limits, clock=desk.clock)
        body = await reader.read_whole()
        messages = iter(({"type": "http.request", "body": body, "more_body": False},))
        later = exchange_of(request).receive

        async def receive() -> Any:
            for message in messages:
                return message
            return await later()

        return await handle(Request(request.scope, receive))

    return read_first
