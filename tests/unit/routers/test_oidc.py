"""Tokens signed by an identity provider: which count, as whom, and how keys change."""

import json
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from app.core.base.errors import NotReady, Unauthenticated
from app.core.base.events import Events
from app.routers import oidc
from app.routers.oidc import OidcRules, OidcTokens
from tests.helpers.fake_clock import FakeClock

ISSUER, AUDIENCE = "https://id.example", "bop"
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER = ec.generate_private_key(ec.SECP256R1())


def jwk(private: Any, key_id: str, algorithm: str, **extra: Any) -> dict[str, Any]:
    kind = jwt.algorithms.RSAAlgorithm if algorithm.startswith("RS") else jwt.algorithms.ECAlgorithm
    return {**kind.to_jwk(private.public_key(), as_dict=True), "kid": key_id, "alg": algorithm,
            "use": "sig", **extra}  # fmt: skip


class Provider:
    """A key set on disk, and the tokens that are signed with its keys."""

    def __init__(self, path: Path, clock: FakeClock) -> None:
        self.path, self.clock = path, clock
        self.told: list[str] = []
        self.publish(jwk(RSA, "one", "RS256"))
        self.tokens = OidcTokens(
            OidcRules(
                issuer=ISSUER, audience=AUDIENCE, jwks=str(path),
                algorithms=frozenset({"RS256", "ES256"}), name_claim="sub", scopes_claim="scope",
                tenants_claim="tenants", leeway_seconds=30.0,
            ),
            clock=clock, events=Events(lambda name, level, fields: self.told.append(name)),
        )  # fmt: skip

    def publish(self, *keys: dict[str, Any]) -> None:
        self.path.write_text(json.dumps({"keys": list(keys)}), encoding="utf-8")

    def claims(self, **changes: Any) -> dict[str, Any]:
        claims = {
            "iss": ISSUER, "aud": AUDIENCE, "sub": "ann", "exp": int(time.time()) + 600,
            "scope": "read write unknown", "tenants": ["acme"], **changes,
        }  # fmt: skip
        return {name: value for name, value in claims.items() if value is not None}

    def token(
        self, key: Any = RSA, algorithm: str = "RS256", key_id: str | None = "one", **changes: Any
    ) -> bytes:
        headers = {} if key_id is None else {"kid": key_id}
        return jwt.encode(self.claims(**changes), key, algorithm, headers=headers).encode()


@pytest.fixture
def provider(tmp_path):
    return Provider(tmp_path / "jwks.json", FakeClock(wall_ns=time.time_ns()))


async def test_claims_become_scopes_and_tenants(provider):
    principal = await provider.tokens.find(provider.token())
    assert principal.name == "oidc:ann"
    assert principal.scopes == {"read", "write"}
    assert principal.tenants == {"acme"}
    listed = await provider.tokens.find(provider.token(scope=["admin"], tenants="a b"))
    assert (listed.scopes, listed.tenants) == ({"admin"}, {"a", "b"})


async def test_who_names_no_tenant_sees_none(provider):
    bound = await provider.tokens.find(provider.token(tenants=None, scope=None))
    assert (bound.scopes, bound.tenants) == (set(), set())
    assert not bound.sees("acme")
    assert (await provider.tokens.find(provider.token(tenants=["*"]))).tenants is None


@pytest.mark.parametrize(
    "changes",
    [
        {"aud": "another"},
        {"aud": None},
        {"iss": "https://evil.example"},
        {"iss": None},
        {"exp": 1},
        {"exp": None},
        {"nbf": 2**33},
        {"sub": None},
        {"sub": ""},
    ],
)
async def test_claims_that_prove_nothing(provider, changes):
    with pytest.raises(Unauthenticated):
        await provider.tokens.find(provider.token(**changes))


async def test_only_the_providers_asymmetric_signatures_count(provider):
    public = RSA.public_key()
    unsigned = jwt.encode(provider.claims(), None, "none", headers={"kid": "one"})
    shared = jwt.encode(provider.claims(), "x" * 64, "HS256", headers={"kid": "one"})
    forged = provider.token(rsa.generate_private_key(public_exponent=65537, key_size=2048))
    other_kind = provider.token(OTHER, "ES256")
    header, body, _ = provider.token().split(b".")
    cut = b".".join([header, body, b""])
    critical = jwt.encode(
        provider.claims(), RSA, "RS256", headers={"kid": "one", "crit": ["x"], "x": 1}
    )
    for token in (unsigned.encode(), shared.encode(), forged, other_kind, cut, critical.encode(),
                  b"a.b.c", b"..", b"\xff.\x00.\xfe", b"x" * 20_000):  # fmt: skip
        with pytest.raises(Unauthenticated):
            await provider.tokens.find(token)
    assert public is not None


async def test_keys_for_something_else_are_of_no_use(provider):
    provider.publish(
        jwk(RSA, "one", "RS256", use="enc"), jwk(OTHER, "two", "ES256"),
        {"kty": "oct", "k": "c2VjcmV0", "kid": "three"}, {"kty": "new", "kid": "four"},
    )  # fmt: skip
    with pytest.raises(Unauthenticated):
        await provider.tokens.find(provider.token())
    assert (await provider.tokens.find(provider.token(OTHER, "ES256", "two"))).name == "oidc:ann"


async def test_a_new_key_is_fetched_but_not_more_often_than_every_few_seconds(provider):
    await provider.tokens.find(provider.token())
    provider.publish(jwk(RSA, "one", "RS256"), jwk(OTHER, "two", "ES256"))
    for _ in range(5):
        with pytest.raises(Unauthenticated):
            await provider.tokens.find(provider.token(OTHER, "ES256", "two"))
    assert provider.told == ["auth.keys_fetched"]
    provider.clock.advance(oidc.REFETCH_SECONDS_MIN)
    assert (await provider.tokens.find(provider.token(OTHER, "ES256", "two"))).name == "oidc:ann"
    assert provider.told == ["auth.keys_fetched"] * 2


async def test_a_key_that_was_withdrawn_counts_no_longer(provider):
    token = provider.token()
    await provider.tokens.find(token)
    provider.publish(jwk(OTHER, "two", "ES256"))
    await provider.tokens.find(token)  # the set is fresh enough
    provider.clock.advance(oidc.KEYS_FRESH_SECONDS + 1)
    with pytest.raises(Unauthenticated):
        await provider.tokens.find(token)


async def test_a_remembered_token_expires_all_the_same(provider):
    token = provider.token(exp=int(time.time()) + 60)
    await provider.tokens.find(token)
    provider.clock.advance(89)
    await provider.tokens.find(token)
    provider.clock.advance(2)
    with pytest.raises(Unauthenticated):
        await provider.tokens.find(token)


async def test_without_its_keys_the_provider_is_not_ready(provider):
    provider.path.unlink()
    with pytest.raises(NotReady):
        await provider.tokens.find(provider.token())
    provider.publish(jwk(RSA, "one", "RS256"))
    provider.clock.advance(oidc.REFETCH_SECONDS_MIN)
    await provider.tokens.find(provider.token())
    provider.path.write_text("{", encoding="utf-8")  # a provider that breaks later
    provider.clock.advance(oidc.KEYS_FRESH_SECONDS + 1)
    assert (await provider.tokens.find(provider.token())).name == "oidc:ann"
    assert provider.told == ["auth.keys_unreadable", "auth.keys_fetched", "auth.keys_unreadable"]


async def test_a_set_of_one_key_needs_no_id(provider):
    assert (await provider.tokens.find(provider.token(key_id=None))).name == "oidc:ann"


async def test_what_is_remembered_is_bounded(provider, monkeypatch):
    monkeypatch.setattr(oidc, "REMEMBERED_MAX", 3)
    for number in range(5):
        await provider.tokens.find(provider.token(sub=f"user-{number}"))
    assert len(provider.tokens._remembered) == 3
