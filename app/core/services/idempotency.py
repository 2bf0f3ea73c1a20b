"""The same POST again gives the first answer again.

Invariants: one effect per key (I7): the answer is stored in the commit that has the effect, where
the action hands `Remember` on, so that a crash leaves both or neither. An answer is remembered for
24 h; a replay during the first waits for it. Failures that may pass (401, 429, 5xx, 507) are not
remembered: the action raises and nothing is stored.
Cancellation: a caller that leaves does not undo the first's effect.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from app.core.base.clock import Clock, wall_us
from app.core.base.errors import IdempotencyKeyReused
from app.core.stores.manifest.ops import ManifestBatch, PutIdempotency
from app.core.stores.manifest.records import IdempotencyRecord
from app.core.stores.manifest.store import ManifestStore

REMEMBERED_US = 24 * 3600 * 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAnswer:
    status: int
    headers: dict[str, str]
    body: bytes


class Remember:
    """Turns an answer into the op that stores it, for the action's own commit."""

    def __init__(self, *, scope_hash: bytes, body_hash: bytes, created_at_us: int) -> None:
        self._scope_hash = scope_hash
        self._body_hash = body_hash
        self._created_at_us = created_at_us
        self.used = False

    def __call__(self, answer: StoredAnswer) -> PutIdempotency:
        self.used = True
        return PutIdempotency(
            record=IdempotencyRecord(
                scope_hash=self._scope_hash,
                body_hash=self._body_hash,
                created_at_us=self._created_at_us,
                status=answer.status,
                headers=answer.headers,
                body=answer.body,
            )
        )


Action = Callable[[Remember], Awaitable[StoredAnswer]]


class Idempotency:
    def __init__(self, manifest: ManifestStore, *, clock: Clock) -> None:
        self._manifest = manifest
        self._clock = clock
        self._running: dict[bytes, asyncio.Lock] = {}
        self._waiting: dict[bytes, int] = {}

    async def run(self, *, scope_hash: bytes, body_hash: bytes, action: Action) -> StoredAnswer:
        """`scope_hash` is of principal, route and key. Raises IdempotencyKeyReused."""
        lock = self._running.setdefault(scope_hash, asyncio.Lock())
        self._waiting[scope_hash] = self._waiting.get(scope_hash, 0) + 1
        try:
            async with lock:
                return await self._once(scope_hash, body_hash, action)
        finally:
            self._waiting[scope_hash] -= 1
            if not self._waiting[scope_hash]:
                del self._waiting[scope_hash], self._running[scope_hash]

    async def _once(self, scope_hash: bytes, body_hash: bytes, action: Action) -> StoredAnswer:
        now = wall_us(self._clock)
        with self._manifest.read() as view:
            known = view.idempotency(scope_hash)
        if known is not None and now - known.created_at_us < REMEMBERED_US:
            if known.body_hash != body_hash:
                raise IdempotencyKeyReused
            return StoredAnswer(status=known.status, headers=known.headers, body=known.body)
        remember = Remember(scope_hash=scope_hash, body_hash=body_hash, created_at_us=now)
        answer = await action(remember)
        if not remember.used:
            await self._manifest.commit(
                ManifestBatch(ops=(remember(answer),), reason="idempotency.remembered")
            )
        return answer
