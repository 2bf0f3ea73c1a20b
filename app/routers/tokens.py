"""The tokens file: digests, scopes, tenants, read again when it changes.

Invariants: tokens are kept as digests and compared in constant time, whatever was found before. A
file that cannot be read changes nothing: the last good table stays. Two entries of one name are one
principal, so that a token can be exchanged while the old one still counts.

Concurrency: the table is one immutable value, replaced whole. Cancellation: a reload that is
cancelled leaves the table as it was. Crash: nothing is durable here.
"""

import asyncio
import hashlib
import hmac
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from app.core.base.clock import Clock
from app.core.base.errors import StartRefused
from app.core.base.events import Events
from app.routers.exchange import Principal

Scope = Literal["read", "write", "checkpoint", "debug", "admin"]
SCOPES: frozenset[str] = frozenset({"read", "write", "checkpoint", "debug", "admin"})
RELOAD_SECONDS = 0.5


class TokenEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=255, pattern="^[^:]+$")]
    """Without a colon: `oidc:` begins the names of others."""
    sha256: str
    scopes: tuple[Scope, ...]
    tenants: tuple[str, ...] | None = None
    expires_at: Annotated[datetime, msgspec.Meta(tz=True)] | None = None


class TokensFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    tokens: tuple[TokenEntry, ...]


class TokenTable:
    """Digests to principals, and until when."""

    def __init__(self, file: TokensFile) -> None:
        table: dict[bytes, tuple[Principal, float | None]] = {}
        for entry in file.tokens:
            digest = bytes.fromhex(entry.sha256)
            if len(digest) != hashlib.sha256().digest_size:
                raise ValueError(f"token {entry.name!r}: sha256 is not 64 hex digits")
            if digest in table:
                raise ValueError(f"token {entry.name!r}: its sha256 is there twice")
            tenants = None if entry.tenants is None else frozenset(entry.tenants)
            principal = Principal(name=entry.name, scopes=frozenset(entry.scopes), tenants=tenants)
            expires = None if entry.expires_at is None else entry.expires_at.timestamp()
            table[digest] = (principal, expires)
        self._table = tuple(table.items())

    def find(self, token: bytes, *, now_seconds: float) -> Principal | None:
        """Looks at every entry, each in constant time."""
        digest = hashlib.sha256(token).digest()
        found: tuple[Principal, float | None] | None = None
        for known, entry in self._table:
            if hmac.compare_digest(known, digest):
                found = entry
        if found is None or (found[1] is not None and now_seconds >= found[1]):
            return None
        return found[0]


class FileTokens:
    def __init__(self, path: Path, *, clock: Clock, events: Events) -> None:
        self._path = path
        self._clock = clock
        self._events = events
        self._table: TokenTable | None = None
        self._stamp: tuple[int, int, int] | None = None
        self._look_at = 0.0

    def open_blocking(self) -> None:
        """Raises StartRefused if the file cannot be used."""
        try:
            self._table, self._stamp = _load_blocking(self._path)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            raise StartRefused(f"BOP_AUTH_TOKENS_FILE={self._path}: {error}") from error
        self._look_at = self._clock.monotonic() + RELOAD_SECONDS

    def look_now(self) -> None:
        """The next request looks whether the file has changed."""
        self._look_at = 0.0

    async def find(self, token: bytes) -> Principal | None:
        if self._clock.monotonic() >= self._look_at:
            await self._reload()
        assert self._table is not None, "it was opened"
        return self._table.find(token, now_seconds=self._clock.wall_ns() / 1e9)

    async def _reload(self) -> None:
        self._look_at = self._clock.monotonic() + RELOAD_SECONDS
        try:
            stamp = await asyncio.to_thread(_stamp_blocking, self._path)
            if stamp == self._stamp:
                return
            self._stamp = stamp
            self._table, self._stamp = await asyncio.to_thread(_load_blocking, self._path)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            self._events.error("auth.tokens_unreadable", path=str(self._path), error=str(error))
        else:
            self._events.info("auth.tokens_reloaded", path=str(self._path))


_decode = msgspec.json.Decoder(TokensFile).decode


def _stamp_blocking(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _load_blocking(path: Path) -> tuple[TokenTable, tuple[int, int, int]]:
    stamp = _stamp_blocking(path)
    return TokenTable(_decode(path.read_bytes())), stamp
