"""The one layer every request passes: identity, access, the log line, and errors nobody caught.

Invariants: I12: 401 comes before path, query and body are looked at. I13: an answer that breaks
in the middle ends the connection, so that no client takes a part for the whole.

Concurrency: nothing shared between requests. Cancellation: passes through. Crash: nothing is
durable here.

It is plain ASGI and one class on purpose: every further layer costs small requests throughput.
"""

from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from app.core.base.clock import Clock, Randomness
from app.core.base.errors import NotFound, NotReady, Unauthenticated
from app.core.base.events import Events, event_context
from app.routers.auth import LOCAL, OPEN_PATHS, Authenticator
from app.routers.exchange import SCOPE_KEY, ClientGone, Exchange, ResponseBroken, Trace
from app.routers.problems import internal_problem, problem_response

PROBED_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})
"""Asked every few seconds for ever; logged only when they fail."""
OPERATORS_PATHS = ("/admin/", "/debug/")


class Edge:
    def __init__(
        self,
        app: ASGIApp,
        *,
        authenticator: Authenticator,
        events: Events,
        clock: Clock,
        randomness: Randomness,
        admin_port: int | None = None,
        current_span: Callable[[], Trace | None] | None = None,
    ) -> None:
        self._app = app
        self._authenticator = authenticator
        self._events = events
        self._clock = clock
        self._randomness = randomness
        self._admin_port = admin_port
        self._current_span = current_span

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = self._clock.monotonic()
        exchange = Exchange(scope, receive, send, self._randomness)
        scope[SCOPE_KEY] = exchange
        context: dict[str, object] = {"request_id": exchange.request_id}
        if (trace := self._trace_of(exchange)) is not None:
            exchange.trace = trace
            context["trace_id"], context["span_id"] = trace.trace_id, trace.span_id
        event_context.set(context)
        try:
            await self._serve(scope, exchange)
        finally:
            seconds = self._clock.monotonic() - began
            self._log(scope, exchange, seconds)

    async def _serve(self, scope: Scope, exchange: Exchange) -> None:
        try:
            if scope["path"] in OPEN_PATHS:
                exchange.principal = LOCAL
            else:
                exchange.principal = await self._authenticator.authenticate(exchange.authorization)
            if self._admin_port is not None and self._is_hidden(scope):
                raise NotFound("No such path.")
            await self._app(scope, exchange.receive, exchange.send)
        except (Unauthenticated, NotReady, NotFound) as error:
            answer = problem_response(error, request_id=exchange.request_id)
            await answer(scope, exchange.receive, exchange.send)
        except ClientGone as error:
            exchange.note(error)
            if exchange.started:
                raise ResponseBroken("the client left") from error
        except Exception as error:
            exchange.note(error)
            self._events.error(
                "http.failed",
                method=scope["method"],
                path=scope["path"],
                error=repr(error),
                exception=error,
            )
            if exchange.started:
                raise ResponseBroken(repr(error)) from error
            await internal_problem(exchange)(scope, exchange.receive, exchange.send)

    def _trace_of(self, exchange: Exchange) -> Trace | None:
        """Where spans are exported, the one that FastAPI has begun; otherwise the caller's."""
        if self._current_span is None:
            return exchange.trace
        return self._current_span() or exchange.trace

    def _is_hidden(self, scope: Scope) -> bool:
        """Operators' paths exist on their own port alone."""
        server = scope.get("server")
        return scope["path"].startswith(OPERATORS_PATHS) and (
            server is None or server[1] != self._admin_port
        )

    def _log(self, scope: Scope, exchange: Exchange, seconds: float) -> None:
        """One line a request. Small successful writes and reads of single pages that nobody named
        are left out: at thousands a second nobody could look for them.
        """
        status, path = exchange.status, scope["path"]
        if status < 400 and exchange.error is None:
            if path in PROBED_PATHS:
                return
            is_small = status == 201 or (status in {200, 304} and "/pages/" in path)
            if is_small and not exchange.named_by_client and exchange.trace is None:
                return
        fields: dict[str, object] = {
            "method": scope["method"],
            "path": path,
            "status": status or None,
            "seconds": round(seconds, 6),
            "client": client[0] if (client := scope.get("client")) else None,
            "principal": None if exchange.principal is None else exchange.principal.name,
            "body_bytes": exchange.body_received,
        }
        if exchange.error is not None:
            fields["error"] = str(exchange.error) or type(exchange.error).__name__
        if status >= 500:
            self._events.warning("http.answered", **fields)
        else:
            self._events.info("http.answered", **fields)
