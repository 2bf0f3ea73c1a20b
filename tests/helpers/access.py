"""Principals for tests of access: a tokens file, an identity provider on disk, the route table."""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec

from app.main import create_app
from app.routers.auth import OPEN_PATHS, SCOPES
from app.routers.route import ScopedRoute
from app.settings import Settings

ISSUER, AUDIENCE = "https://id.example", "bop"


@dataclass(frozen=True)
class Route:
    method: str
    path: str
    scopes: frozenset[str]

    @property
    def operation(self) -> tuple[str, str]:
        return self.method, self.path


def guarded_routes(tmp_path: Path) -> list[Route]:
    """Every route that needs a token, as the application has it: a new one is walked by itself."""
    app = create_app(Settings(data_dir=tmp_path / "nowhere"))
    return [
        Route(method, route.path, route.scopes)
        for route in app.routes
        if isinstance(route, ScopedRoute) and route.path not in OPEN_PATHS
        for method in sorted(route.methods or ())
    ]


class Principals:
    """`settings` makes a service take these tokens."""

    def __init__(self, directory: Path) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        public = jwt.algorithms.ECAlgorithm.to_jwk(self._key.public_key(), as_dict=True)
        jwks = directory / "jwks.json"
        jwks.write_text(json.dumps({"keys": [{**public, "kid": "one", "alg": "ES256"}]}))
        everything = sorted(SCOPES)
        entries: list[dict[str, Any]] = [
            self._entry("all", everything, None),
            self._entry("acme", everything, ["acme"]),
            self._entry("zeta", everything, ["zeta"]),
        ]
        for number in range(2 ** len(everything)):
            scopes = [one for at, one in enumerate(everything) if number >> at & 1]
            entries.append(self._entry(self._name_of(frozenset(scopes)), scopes, None))
        tokens = directory / "tokens.json"
        tokens.write_text(json.dumps({"tokens": entries}))
        self.settings = {
            "BOP_AUTH_TOKENS_FILE": str(tokens),
            "BOP_OIDC_ISSUER": ISSUER,
            "BOP_OIDC_AUDIENCE": AUDIENCE,
            "BOP_OIDC_JWKS": str(jwks),
            "BOP_OIDC_LEEWAY_SECONDS": "0",
        }

    def bearer(self, token: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {token}"}

    def without(self, scopes: frozenset[str]) -> dict[str, str]:
        """Every scope but these."""
        return self.bearer(self._name_of(SCOPES - scopes))

    def jwt(self, *, seconds: int) -> dict[str, str]:
        claims = {
            "iss": ISSUER, "aud": AUDIENCE, "sub": "ann", "exp": int(time.time()) + seconds,
            "scope": " ".join(sorted(SCOPES)), "tenants": ["*"],
        }  # fmt: skip
        return self.bearer(jwt.encode(claims, self._key, "ES256", headers={"kid": "one"}))

    @staticmethod
    def _name_of(scopes: frozenset[str]) -> str:
        return "scopes-" + "-".join(sorted(scopes))

    @staticmethod
    def _entry(name: str, scopes: list[str], tenants: list[str] | None) -> dict[str, Any]:
        digest = hashlib.sha256(name.encode()).hexdigest()
        return {"name": name, "sha256": digest, "scopes": scopes, "tenants": tenants}
