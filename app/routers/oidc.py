"""Tokens that an identity provider signed: OpenID Connect, OAuth 2.0 access tokens as JWTs.

Invariants: a token counts only with an asymmetric signature by a key of the provider's set, this
issuer, this audience, and a time to expire that has not come. I12: one that names no tenants sees
none; only `*` is unbound. Keys are fetched from what the settings name, never from what a token
names.

Concurrency: loop-confined; one fetch at a time, and not more often than every few seconds, however
many tokens name unknown keys. Cancellation: a fetch that is cancelled changes nothing. Crash:
nothing is durable here.
"""

import asyncio
import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from app.core.base.clock import Clock
from app.core.base.errors import NotReady, Unauthenticated
from app.core.base.events import Events
from app.routers.exchange import Principal
from app.routers.tokens import SCOPES

if TYPE_CHECKING:
    from jwt import PyJWK

REFETCH_SECONDS_MIN = 10.0
"""A key that is not known makes the set be fetched again, at most this often."""
KEYS_FRESH_SECONDS = 300.0
"""A key that the provider withdrew counts no longer than this."""
FETCH_TIMEOUT_SECONDS = 10.0
JWKS_BYTES_MAX = 1024 * 1024
TOKEN_BYTES_MAX = 16 * 1024
REMEMBERED_MAX = 1024
NAME_PREFIX = "oidc:"
"""No entry of the tokens file is called so: principals of the two never meet."""
EVERY_TENANT = "*"


@dataclass(frozen=True, slots=True, kw_only=True)
class OidcRules:
    issuer: str
    audience: str
    jwks: str
    """URL or path of the provider's key set."""
    algorithms: frozenset[str]
    name_claim: str
    scopes_claim: str
    tenants_claim: str
    leeway_seconds: float


class KeySet:
    """The provider's keys, by id, fetched when they are needed."""

    def __init__(self, source: str, *, clock: Clock, events: Events) -> None:
        self._source = source
        self._clock = clock
        self._events = events
        self._keys: dict[str, PyJWK] = {}
        self._fetched_at: float | None = None
        self._tried_at: float | None = None
        self._fetching = asyncio.Lock()
        self.version = 0
        """Grows with every set that was fetched."""

    async def find(self, key_id: str | None) -> "PyJWK | None":
        """Without an id, the only key of a set of one. Raises NotReady while no set was fetched."""
        if self.is_old() or self._look_up(key_id) is None:
            await self._refetch(key_id)
        if self._fetched_at is None:
            raise NotReady("The identity provider's keys cannot be had just now.")
        return self._look_up(key_id)

    def _look_up(self, key_id: str | None) -> "PyJWK | None":
        if key_id is not None:
            return self._keys.get(key_id)
        return next(iter(self._keys.values())) if len(self._keys) == 1 else None

    def is_old(self) -> bool:
        return self._fetched_at is None or (
            self._clock.monotonic() - self._fetched_at > KEYS_FRESH_SECONDS
        )

    async def _refetch(self, key_id: str | None) -> None:
        """The last good set stays where the provider does not answer."""
        async with self._fetching:
            if not self.is_old() and self._look_up(key_id) is not None:
                return  # another request has fetched it meanwhile
            now = self._clock.monotonic()
            if self._tried_at is not None and now - self._tried_at < REFETCH_SECONDS_MIN:
                return
            self._tried_at = now
            try:
                self._keys = _parsed(await self._fetch())
            except Exception as error:  # noqa: BLE001 - whatever a provider sends, it is told here
                self._events.error("auth.keys_unreadable", source=self._source, error=repr(error))
                return
            self._fetched_at = self._clock.monotonic()
            self.version += 1
            self._events.info("auth.keys_fetched", source=self._source, keys=len(self._keys))

    async def _fetch(self) -> bytes:
        if not is_url(self._source):
            return await asyncio.to_thread(Path(self._source).read_bytes)
        import httpx  # noqa: PLC0415 - 0.2 s at start that only this needs

        async with (
            httpx.AsyncClient(timeout=FETCH_TIMEOUT_SECONDS, follow_redirects=False) as client,
            client.stream("GET", self._source) as response,
        ):
            response.raise_for_status()
            body = b""
            async for piece in response.aiter_bytes():
                body += piece
                if len(body) > JWKS_BYTES_MAX:
                    raise ValueError(f"the key set is larger than {JWKS_BYTES_MAX} bytes")
            return body


class OidcTokens:
    def __init__(self, rules: OidcRules, *, clock: Clock, events: Events) -> None:
        self._rules = rules
        self._clock = clock
        self._keys = KeySet(rules.jwks, clock=clock, events=events)
        self._remembered: OrderedDict[bytes, tuple[int, float, Principal]] = OrderedDict()

    async def find(self, token: bytes) -> Principal:
        """Raises Unauthenticated, NotReady."""
        if len(token) > TOKEN_BYTES_MAX:
            raise Unauthenticated("The token is too long.")
        digest = hashlib.sha256(token).digest()
        if (known := self._recall(digest)) is not None:
            return known
        claims = await self._verified(token)
        principal = self._principal(claims)
        self._remember(digest, float(claims["exp"]), principal)
        return principal

    def _recall(self, digest: bytes) -> Principal | None:
        """A signature is looked at once; the time to expire, and whether its keys are still those
        of the set, each time.
        """
        known = self._remembered.get(digest)
        if known is None:
            return None
        version, expires, principal = known
        if version != self._keys.version or self._is_past(expires) or self._keys.is_old():
            del self._remembered[digest]
            return None
        return principal

    def _remember(self, digest: bytes, expires: float, principal: Principal) -> None:
        self._remembered[digest] = (self._keys.version, expires, principal)
        while len(self._remembered) > REMEMBERED_MAX:
            self._remembered.popitem(last=False)

    def _is_past(self, expires: float) -> bool:
        return self._clock.wall_ns() / 1e9 >= expires + self._rules.leeway_seconds

    async def _verified(self, token: bytes) -> dict[str, Any]:
        import jwt  # noqa: PLC0415 - 0.1 s at start that only this needs

        rules = self._rules
        try:
            header = jwt.get_unverified_header(token)
            algorithm, key_id = header.get("alg"), header.get("kid")
            if algorithm not in rules.algorithms or "crit" in header:
                raise Unauthenticated("The token is signed in a way that is not taken here.")
            key = await self._keys.find(key_id if isinstance(key_id, str) else None)
            if key is None or not _is_for(key, algorithm):
                raise Unauthenticated("The token's key is not known.")
            claims: dict[str, Any] = jwt.decode(
                token,
                key.key,
                algorithms=[algorithm],
                audience=rules.audience,
                issuer=rules.issuer,
                leeway=rules.leeway_seconds,
                options={"require": ["exp", "iss", "aud", rules.name_claim]},
            )
        except (jwt.PyJWTError, ValueError, TypeError) as error:
            raise Unauthenticated("The token is not valid.") from error
        if self._is_past(float(claims["exp"])):  # by our own clock, too
            raise Unauthenticated("The token has expired.")
        return claims

    def _principal(self, claims: dict[str, Any]) -> Principal:
        rules = self._rules
        name = claims.get(rules.name_claim)
        if not isinstance(name, str) or not name:
            raise Unauthenticated(f"The token's {rules.name_claim} is not a name.")
        tenants = frozenset(_words(claims.get(rules.tenants_claim)))
        return Principal(
            name=f"{NAME_PREFIX}{name}",
            scopes=frozenset(_words(claims.get(rules.scopes_claim))) & SCOPES,
            tenants=None if EVERY_TENANT in tenants else tenants,
        )


def looks_like_jwt(token: bytes) -> bool:
    return token.count(b".") == 2


def is_url(source: str) -> bool:
    return source.startswith(("https://", "http://"))


def _words(claim: object) -> list[str]:
    """A list of strings, or one string of words, as OAuth writes scopes (RFC 8693, section 4.2)."""
    if isinstance(claim, str):
        return claim.split()
    if isinstance(claim, list):
        return [one for one in claim if isinstance(one, str)]
    return []


def _is_for(key: "PyJWK", algorithm: str) -> bool:
    """The key's own words on what it is for, where it has any, count (RFC 7517, section 4)."""
    return key.public_key_use in {None, "sig"} and key.algorithm_name == algorithm


def _parsed(raw: bytes) -> "dict[str, PyJWK]":
    """Keys that are of no use here are passed over, so that one does not take the others along."""
    import jwt  # noqa: PLC0415 - see OidcTokens

    found: dict[str, PyJWK] = {}
    for number, entry in enumerate(msgspec.json.decode(raw)["keys"]):
        if entry.get("kty") == "oct":
            continue  # a shared secret signs nothing here
        try:
            key = jwt.PyJWK(entry)
        except jwt.PyJWTError:
            continue
        found[str(entry.get("kid", f"#{number}"))] = key
    if not found:
        raise ValueError("the key set holds no key that can be used")
    return found
