"""Appends with an idempotency key: one effect, one answer. Loop-confined."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from app.core.base.clock import Clock, wall_us
from app.core.base.errors import IdempotencyKeyReused
from app.core.stores.wal.remembered import RememberedAppend, RememberedAppends, SegmentAppend
from app.core.stores.wal.requests import Appended, AppendRequest


class KeyedAppends:
    def __init__(
        self,
        clock: Clock,
        *,
        kept: Sequence[RememberedAppend],
        recovered: Sequence[SegmentAppend],
    ) -> None:
        self._clock = clock
        self._remembered = RememberedAppends(clock)
        self._remembered.restore(
            (*(SegmentAppend(append=append, segment_id=None) for append in kept), *recovered)
        )
        self._in_flight: dict[bytes, tuple[bytes | None, asyncio.Future[Appended]]] = {}

    def of_segment(self, segment_id: int) -> tuple[RememberedAppend, ...]:
        return self._remembered.of_segment(segment_id)

    async def replay(self, request: AppendRequest) -> Appended | None:
        """The first answer again, waiting for it if need be; None if this is the first. Raises
        IdempotencyKeyReused, or what the first failed with.
        """
        assert request.key_hash is not None
        flying = self._in_flight.get(request.key_hash)
        if flying is not None:
            body_hash, answer = flying
            _check_same_body(body_hash, request)
            return replace(await asyncio.shield(answer), replayed=True)
        known = self._remembered.get(request.key_hash)
        if known is None:
            return None
        _check_same_body(known.body_hash, request)
        return Appended(
            first_lsn=known.first_lsn, last_lsn=known.last_lsn,
            count=known.last_lsn - known.first_lsn + 1, payload_bytes=known.payload_bytes,
            replayed=True,
        )  # fmt: skip

    def begin(self, request: AppendRequest, answer: asyncio.Future[Appended]) -> None:
        assert request.key_hash is not None
        self._in_flight[request.key_hash] = (request.body_hash, answer)

    def end(self, request: AppendRequest) -> None:
        """It failed, or `remember` follows."""
        if request.key_hash is not None:
            self._in_flight.pop(request.key_hash, None)

    def remember(self, request: AppendRequest, appended: Appended, *, segment_id: int) -> None:
        if request.key_hash is None or request.body_hash is None:
            return
        append = RememberedAppend(
            key_hash=request.key_hash, body_hash=request.body_hash, first_lsn=appended.first_lsn,
            last_lsn=appended.last_lsn, payload_bytes=appended.payload_bytes,
            appended_at_us=wall_us(self._clock),
        )  # fmt: skip
        self._remembered.add(append, segment_id=segment_id)


def _check_same_body(body_hash: bytes | None, request: AppendRequest) -> None:
    if body_hash != request.body_hash:
        raise IdempotencyKeyReused
