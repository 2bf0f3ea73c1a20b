"""Who may do what: the tokens file, scopes by route, tenants by token.

Invariants: I12: a token bound to tenants meets 404 wherever another tenant is named, before the
request is looked at further. Denied by default: `route.py` makes no route without a scope.

Concurrency: the table of tokens is one immutable value, replaced whole. Cancellation: a reload
that is cancelled leaves the table as it was. Crash: nothing is durable here.
"""

import asyncio
import hashlib
import hmac
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from app.core.base.clock import Clock
from app.core.base.errors import (
    DatabaseNotFound,
    Forbidden,
    NotFound,
    StartRefused,
    Unauthenticated,
)
from app.core.base.events import Events
from app.routers.exchange import Principal

Scope = Literal["read", "write", "checkpoint", "debug", "admin"]
SCOPES: frozenset[str] = frozenset({"read", "write", "checkpoint", "debug", "admin"})
LOCAL = Principal(name="local", scopes=SCOPES)
OPEN_PATHS: frozenset[str] = frozenset(
    {"/healthz", "/readyz", "/metrics", "/openapi.json", "/docs"}
)
RELOAD_SECONDS = 0.5
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


class TokenEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    sha256: str
    scopes: tuple[Scope, ...]
    tenants: tuple[str, ...] | None = None


class TokensFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    tokens: tuple[TokenEntry, ...]


class Tokens:
    """An immutable table of token digests."""

    def __init__(self, file: TokensFile) -> None:
        table: list[tuple[bytes, Principal]] = []
        for entry in file.tokens:
            digest = bytes.fromhex(entry.sha256)
            if len(digest) != hashlib.sha256().digest_size:
                raise ValueError(f"token {entry.name!r}: sha256 is not 64 hex digits")
            tenants = None if entry.tenants is None else frozenset(entry.tenants)
            principal = Principal(name=entry.name, scopes=frozenset(entry.scopes), tenants=tenants)
            table.append((digest, principal))
        self._table = tuple(table)

    def find(self, token: bytes) -> Principal | None:
        """Looks at every entry, each in constant time, whatever was found before."""
        digest = hashlib.sha256(token).digest()
        found: Principal | None = None
        for known, principal in self._table:
            if hmac.compare_digest(known, digest):
                found = principal
        return found


class Authenticator:
    """Gives a principal for an Authorization header. Without a tokens file everyone is `local`."""

    def __init__(self, path: Path | None, *, clock: Clock, events: Events) -> None:
        self._path = path
        self._clock = clock
        self._events = events
        self._tokens: Tokens | None = None
        self._stamp: tuple[int, int, int] | None = None
        self._look_at = 0.0

    def open_blocking(self) -> None:
        """Raises StartRefused if the tokens file cannot be used."""
        if self._path is None:
            return
        try:
            self._tokens, self._stamp = _load_blocking(self._path)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            raise StartRefused(f"BOP_AUTH_TOKENS_FILE={self._path}: {error}") from error
        self._look_at = self._clock.monotonic() + RELOAD_SECONDS

    def look_now(self) -> None:
        """The next request looks whether the file has changed."""
        self._look_at = 0.0

    async def authenticate(self, authorization: bytes | None) -> Principal:
        """Raises Unauthenticated."""
        if self._path is None:
            return LOCAL
        if self._clock.monotonic() >= self._look_at:
            await self._reload(self._path)
        if authorization is None:
            raise Unauthenticated
        scheme, _, token = authorization.partition(b" ")
        principal = None
        if scheme.lower() == b"bearer" and self._tokens is not None:
            principal = self._tokens.find(token.strip())
        if principal is None:
            raise Unauthenticated("The token is not known.")
        return principal

    async def _reload(self, path: Path) -> None:
        """A file that cannot be read or parsed changes nothing: the last good table stays."""
        self._look_at = self._clock.monotonic() + RELOAD_SECONDS
        try:
            stamp = await asyncio.to_thread(_stamp_blocking, path)
            if stamp == self._stamp:
                return
            self._stamp = stamp
            self._tokens, self._stamp = await asyncio.to_thread(_load_blocking, path)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            self._events.error("auth.tokens_unreadable", path=str(path), error=str(error))
        else:
            self._events.info("auth.tokens_reloaded", path=str(path))


def _stamp_blocking(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _load_blocking(path: Path) -> tuple[Tokens, tuple[int, int, int]]:
    stamp = _stamp_blocking(path)
    return Tokens(msgspec.json.decode(path.read_bytes(), type=TokensFile)), stamp
