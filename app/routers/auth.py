"""Who may do what: principals from tokens, scopes by route, tenants by token.

Invariants: I12: a token bound to tenants meets 404 wherever another tenant is named, before the
request is looked at further. Denied by default: `route.py` makes no route without a scope.

Concurrency, cancellation, crash: see `tokens.py` and `oidc.py`; nothing is kept here.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import Request

from app.core.base.errors import DatabaseNotFound, Forbidden, NotFound, Unauthenticated
from app.routers.exchange import Principal, exchange_of
from app.routers.oidc import OidcTokens, looks_like_jwt
from app.routers.tokens import SCOPES, FileTokens, Scope

LOCAL = Principal(name="local", scopes=SCOPES)
OPEN_PATHS: frozenset[str] = frozenset(
    {
        "/healthz",
        "/readyz",
        "/metrics",
        "/openapi.json",
        "/docs",
        "/docs/favicon.png",
        "/docs/start.js",
        "/docs/swagger-ui.css",
        "/docs/swagger-ui.js",
    }
)
_SCOPES_ATTRIBUTE = "__bop_scopes__"

F = TypeVar("F", bound=Callable[..., Any])


def needs(*scopes: Scope) -> Callable[[F], F]:
    """The endpoint takes a principal that has one of these scopes."""
    if not scopes:
        raise ValueError("name at least one scope")
    return _marked(frozenset(scopes))


def open_to_all(endpoint: F) -> F:
    """The endpoint needs no token; its path is one of OPEN_PATHS."""
    return _marked(frozenset())(endpoint)


def _marked(scopes: frozenset[str]) -> Callable[[F], F]:
    def mark(endpoint: F) -> F:
        setattr(endpoint, _SCOPES_ATTRIBUTE, scopes)
        return endpoint

    return mark


def scopes_of(endpoint: Callable[..., Any]) -> frozenset[str] | None:
    """What `needs` or `open_to_all` said; None: nothing was said."""
    scopes: frozenset[str] | None = getattr(endpoint, _SCOPES_ATTRIBUTE, None)
    return scopes


def require_scope(principal: Principal, scopes: frozenset[str]) -> None:
    """Raises Forbidden."""
    if scopes.isdisjoint(principal.scopes):
        raise Forbidden(f"This needs the scope {' or '.join(sorted(scopes))}.")


def require_path_tenant(principal: Principal, tenant: str | None, *, names_database: bool) -> None:
    """Raises DatabaseNotFound or NotFound, as for a tenant that does not exist."""
    if tenant is not None and not principal.sees(tenant):
        raise DatabaseNotFound() if names_database else NotFound("No such tenant.")


def require_tenant(principal: Principal, tenant: str) -> None:
    """For a tenant that the body names. Raises DatabaseNotFound."""
    if not principal.sees(tenant):
        raise DatabaseNotFound


def require_unbound(principal: Principal) -> None:
    """For what concerns all tenants at once. Raises Forbidden."""
    if principal.tenants is not None:
        raise Forbidden("This concerns all tenants; a token bound to tenants does not reach it.")


async def check_again(request: Request) -> None:
    """For answers without an end: a token may be withdrawn, changed, or expire meanwhile. Raises
    Unauthenticated, NotReady.
    """
    authenticator: Authenticator = request.app.state.authenticator
    exchange = exchange_of(request)
    if await authenticator.authenticate(exchange.authorization) != exchange.principal:
        raise Unauthenticated("The token is not what it was.")


class Authenticator:
    """Gives a principal for an Authorization header: by the tokens file, by the identity provider.
    With neither, everyone is `local`.
    """

    def __init__(self, *, file: FileTokens | None, oidc: OidcTokens | None) -> None:
        self._file = file
        self._oidc = oidc

    def open_blocking(self) -> None:
        """Raises StartRefused if the tokens file cannot be used."""
        if self._file is not None:
            self._file.open_blocking()

    def look_now(self) -> None:
        """The next request looks whether the tokens file has changed."""
        if self._file is not None:
            self._file.look_now()

    async def authenticate(self, authorization: bytes | None) -> Principal:
        """Raises Unauthenticated; NotReady while the identity provider's keys cannot be had."""
        if self._file is None and self._oidc is None:
            return LOCAL
        if authorization is None:
            raise Unauthenticated
        scheme, _, rest = authorization.partition(b" ")
        token = rest.strip()
        if scheme.lower() != b"bearer" or not token:
            raise Unauthenticated("The token is not known.")
        principal = None if self._file is None else await self._file.find(token)
        if principal is None and self._oidc is not None and looks_like_jwt(token):
            principal = await self._oidc.find(token)
        if principal is None:
            raise Unauthenticated("The token is not known.")
        return principal
