"""Errors as RFC 9457 problems: the only place that joins a kind of error to a status.

An error that is not ours to explain (an invariant, a bug) is logged in full and told without its
inside.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError, ResponseValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match, Route

from app.core.base.errors import BopError, ErrorKind, InvalidRequest, NotFound
from app.core.stores.manifest.records import JobFailure
from app.routers.exchange import Exchange, exchange_of

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 1
SHOWN_ERRORS = 3
"""In the detail; `errors` has all of them."""

STATUS: Mapping[ErrorKind, HTTPStatus] = {
    ErrorKind.MALFORMED: HTTPStatus.BAD_REQUEST,
    ErrorKind.UNAUTHENTICATED: HTTPStatus.UNAUTHORIZED,
    ErrorKind.FORBIDDEN: HTTPStatus.FORBIDDEN,
    ErrorKind.NOT_FOUND: HTTPStatus.NOT_FOUND,
    ErrorKind.METHOD_NOT_ALLOWED: HTTPStatus.METHOD_NOT_ALLOWED,
    ErrorKind.NOT_ACCEPTABLE: HTTPStatus.NOT_ACCEPTABLE,
    ErrorKind.CONFLICT: HTTPStatus.CONFLICT,
    ErrorKind.GONE: HTTPStatus.GONE,
    ErrorKind.PRECONDITION: HTTPStatus.PRECONDITION_FAILED,
    ErrorKind.TOO_LARGE: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    ErrorKind.UNSUPPORTED: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    ErrorKind.RANGE: HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
    ErrorKind.INVALID: HTTPStatus.UNPROCESSABLE_ENTITY,
    ErrorKind.BACKPRESSURE: HTTPStatus.TOO_MANY_REQUESTS,
    ErrorKind.CORRUPT: HTTPStatus.INTERNAL_SERVER_ERROR,
    ErrorKind.INTERNAL: HTTPStatus.INTERNAL_SERVER_ERROR,
    ErrorKind.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    ErrorKind.EXHAUSTED: HTTPStatus.INSUFFICIENT_STORAGE,
}
if missing := set(ErrorKind) - set(STATUS):
    raise ImportError(f"kinds of errors without a status: {sorted(one.name for one in missing)}")

_RETRYABLE = frozenset({ErrorKind.BACKPRESSURE, ErrorKind.UNAVAILABLE, ErrorKind.EXHAUSTED})


class MethodNotAllowed(BopError):
    """The path exists; the method does not. Known to HTTP only, so defined here."""

    kind, code = ErrorKind.METHOD_NOT_ALLOWED, "method_not_allowed"
    title = "The path does not take this method"


def problem_members(
    *, code: str, title: str, status: int, detail: str, extras: Mapping[str, Any]
) -> dict[str, Any]:
    """The problem object; extras never hide the fixed members."""
    fixed = {
        "type": f"urn:bop:problem:{code}",
        "title": title,
        "status": status,
        "detail": detail,
        "code": code,
    }
    return {**fixed, **{name: value for name, value in extras.items() if name not in fixed}}


def failure_members(failure: JobFailure, *, request_id: str) -> dict[str, Any]:
    """A failed job's error as a problem, of the request that asked for the job."""
    return problem_members(
        code=failure.code,
        title=failure.title,
        status=int(STATUS[ErrorKind(failure.kind)]),
        detail=failure.detail,
        extras={"request_id": request_id or None, **failure.fields},
    )


def problem_response(
    error: BopError, *, request_id: str, headers: Mapping[str, str] | None = None
) -> Response:
    status = int(STATUS[error.kind])
    shown = error.kind is not ErrorKind.INTERNAL
    fields = error.fields
    if error.code == InvalidRequest.code and "errors" not in fields:
        fields = {**fields, "errors": [{"loc": [], "msg": error.detail, "type": "value_error"}]}
    members = problem_members(
        code=error.code,
        title=error.title,
        status=status,
        detail=error.advice if shown else f"{error.title}. See the log by request_id.",
        extras={"request_id": request_id, **(fields if shown else {})},
    )
    answer = dict(headers or {})
    if error.retry_after_seconds is not None or error.kind in _RETRYABLE:
        answer["Retry-After"] = str(error.retry_after_seconds or RETRY_AFTER_SECONDS)
    if error.kind is ErrorKind.RANGE and "size" in error.fields:
        answer["Content-Range"] = f"bytes */{error.fields['size']}"
    if error.kind is ErrorKind.UNAUTHENTICATED:
        answer["WWW-Authenticate"] = 'Bearer realm="bop-checkpoint"'
    body = msgspec.json.encode(members, enc_hook=str)
    return Response(body, status_code=status, headers=answer, media_type=MEDIA_TYPE)


def internal_problem(exchange: Exchange) -> Response:
    return problem_response(
        BopError(f"{BopError.title}. See the log by request_id."), request_id=exchange.request_id
    )


async def _on_domain_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, BopError)
    exchange = exchange_of(request)
    exchange.note(error)
    return problem_response(error, request_id=exchange.request_id)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = [
        {
            "loc": list(one["loc"]),
            "msg": str(one["msg"]).removeprefix("Value error, "),
            "type": one["type"],
        }
        for one in error.errors()
    ]
    shown = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in errors[:SHOWN_ERRORS]]
    if len(errors) > len(shown):
        shown.append(f"{len(errors) - len(shown)} more")
    return problem_response(
        InvalidRequest(f"The request is not valid. {'; '.join(shown)}.", errors=errors),
        request_id=exchange_of(request).request_id,
    )


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    domain: BopError
    headers = dict(error.headers or {})
    match error.status_code:
        case HTTPStatus.NOT_FOUND:
            domain = NotFound("No such path.")
        case HTTPStatus.METHOD_NOT_ALLOWED:
            allowed = ", ".join(_methods(request))
            headers = {"Allow": allowed}
            domain = MethodNotAllowed(f"This path takes {allowed}.")
        case _:  # FastAPI's own, for JSON that is nested too deep or holds a number too long
            message = str(error.detail)
            unread = {"loc": ["body"], "msg": message, "type": "json_invalid"}
            domain = InvalidRequest(f"body: {message}.", errors=[unread])
    return problem_response(
        domain, request_id=exchange_of(request).request_id, headers=headers or None
    )


async def _on_bad_answer(request: Request, error: Exception) -> Response:
    exchange = exchange_of(request)
    exchange.note(error)
    return internal_problem(exchange)


def _methods(request: Request) -> list[str]:
    """Every method that some route takes on this path; the router names only the first's."""
    found: set[str] = set()
    for route in request.app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            found |= route.methods or set()
    return sorted(found)


def install(app: FastAPI) -> None:
    app.add_exception_handler(BopError, _on_domain_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ResponseValidationError, _on_bad_answer)
