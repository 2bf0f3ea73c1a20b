"""Answers that an Idempotency-Key brings back: which are kept, and how they look on the wire.

Invariants: I7: a refusal that would be the same tomorrow is an answer like any other and is given
again; one that may pass (401, 429, 5xx, 507) is not kept. Concurrency, cancellation, crash: see
`core/services/idempotency.py`.
"""

from http import HTTPStatus

from fastapi import Request, Response

from app.core.base.errors import BopError
from app.core.services.idempotency import Action, Remember, StoredAnswer
from app.routers.exchange import exchange_of
from app.routers.problems import STATUS, problem_response

_PASSING = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.TOO_MANY_REQUESTS})


def remembering(request: Request, action: Action) -> Action:
    """The action, with a lasting refusal as its answer instead of an exception."""

    async def act(remember: Remember) -> StoredAnswer:
        try:
            return await action(remember)
        except BopError as error:
            status = STATUS[error.kind]
            if status in _PASSING or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                raise
            exchange = exchange_of(request)
            exchange.note(error)
            problem = problem_response(error, request_id=exchange.request_id)
            return StoredAnswer(
                status=int(status),
                headers={"Content-Type": problem.headers["content-type"]},
                body=bytes(problem.body),
            )

    return act


def response_of(answer: StoredAnswer) -> Response:
    return Response(answer.body, status_code=answer.status, headers=answer.headers)
