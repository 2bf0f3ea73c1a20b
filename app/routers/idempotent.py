"""Answers that an Idempotency-Key brings back: which are kept, and how they look on the wire.

Invariants: I7: a refusal that would be the same tomorrow is an answer like any other and is given
again; one that may pass (401, 429, 5xx, 507) is not kept. Concurrency, cancellation, crash: see
`core/services/idempotency.py`.
"""

from collections.abc import Awaitable, Callable
from hashlib import blake2b
from http import HTTPStatus
from typing import Annotated, TypeVar

from fastapi import Header, Request, Response

from app.core.base.errors import BopError
from app.core.services.idempotency import Action, Remember, StoredAnswer
from app.core.stores.manifest.ops import Op
from app.routers.deps import services_of
from app.routers.exchange import exchange_of, principal_of
from app.routers.headers import checked_idempotency_key, scope_hash
from app.routers.problems import STATUS, problem_response

Made = TypeVar("Made")

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="1 to 255 visible ASCII characters. Within 24 h the same request gives the "
        "first answer again.",
        examples=["2f1c7a52-checkpoint"],
    ),
]

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


async def made_once(
    request: Request,
    make: Callable[[Callable[[Made], Op] | None], Awaitable[Made]],
    *,
    answer: Callable[[Made], StoredAnswer],
    route: str,
    key: str | None,
) -> Response:
    """Makes something, once per Idempotency-Key where the request has one; `route` holds the names
    of its path. `make` is given what remembers the answer in the commit that makes the thing.
    Raises InvalidRequest, IdempotencyKeyReused, and what `make` does.
    """
    key = checked_idempotency_key(key)
    if key is None:
        return response_of(answer(await make(None)))

    async def act(remember: Remember) -> StoredAnswer:
        return answer(await make(lambda made: remember(answer(made))))

    remembered = await services_of(request).idempotency.run(
        scope_hash=scope_hash(principal_of(request), route=route, key=key),
        body_hash=blake2b(await request.body(), digest_size=16).digest(),
        action=remembering(request, act),
    )
    return response_of(remembered)
