"""Puts every change that an operator asks for into the audit log: a part of the route itself, so
that no admin endpoint has to think of it.

Invariants: recorded before it is done, with its body and reason; completed with the answer. What
fails validation is recorded too, as refused. Cancellation: the outcome stays unknown.
Concurrency, crash: see `core/services/audit.py`.
"""

from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError

from app.core.base.errors import BopError, ErrorKind, InvalidRequest
from app.core.services.audit import ActionEnd, AdminAction
from app.routers.deps import services_of
from app.routers.exchange import exchange_of, principal_of
from app.routers.problems import STATUS

SHOWN_CHARS = 4096
REASON_CHARS = 1024
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

Handle = Callable[[Request], Coroutine[Any, Any, Response]]


def audited(handle: Handle, *, template: str) -> Handle:
    async def recorded(request: Request) -> Response:
        audit = services_of(request).audit
        action = await _action_of(request, template)
        sequence = await audit.begin(action)
        try:
            response = await handle(request)
        except Exception as error:
            await audit.end(sequence, action, _end_by(error))
            raise
        await audit.end(
            sequence,
            action,
            ActionEnd(outcome="done", status=response.status_code, answer=_text_of(response)),
        )
        return response

    return recorded


async def _action_of(request: Request, template: str) -> AdminAction:
    body = await request.body()
    members = _members(body)
    query = request.url.query
    return AdminAction(
        principal=principal_of(request).name,
        action=f"{request.method} {template}",
        path=_cut(f"{request.url.path}?{query}" if query else request.url.path),
        request_id=exchange_of(request).request_id,
        tenant=_tenant_of(request, members),
        reason=_short(members.get("reason")),
        request=_cut(body.decode(errors="replace")),
    )


def _tenant_of(request: Request, members: dict[str, Any]) -> str | None:
    """Only one's own: who tries another's is nobody's business there (I12)."""
    for found in (
        request.path_params.get("tenant"),
        request.query_params.get("tenant"),
        members.get("tenant"),
    ):
        if isinstance(found, str):
            return found if principal_of(request).sees(found) else None
    return None


def _members(body: bytes) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(body) if body else {}
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return {}  # it will be refused; what came is recorded as text
    return found if isinstance(found, dict) else {}


def _short(reason: object) -> str | None:
    return reason[:REASON_CHARS] if isinstance(reason, str) else None


def _end_by(error: Exception) -> ActionEnd:
    if isinstance(error, RequestValidationError):
        error = InvalidRequest()
    if not isinstance(error, BopError):
        return ActionEnd(outcome="failed", code=BopError.code)
    refused = error.kind not in {ErrorKind.INTERNAL, ErrorKind.CORRUPT}
    return ActionEnd(
        outcome="refused" if refused else "failed",
        status=int(STATUS[error.kind]),
        code=error.code,
    )


def _text_of(response: Response) -> str:
    return _cut(bytes(getattr(response, "body", b"")).decode(errors="replace"))


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"
