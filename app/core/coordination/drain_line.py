"""Who waits for the drain reserve: those with the oldest WAL go first. Pure.

A job that was refused tries again by itself; until then its claim stands, so that a younger one
does not take what it waits for. A claim lapses when its job has not come back for longer than any
backoff takes: it was cancelled, or has ended.
"""

from dataclasses import dataclass

CLAIM_SECONDS = 90.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Claim:
    since: float
    size_bytes: int
    asked_at: float


class DrainLine:
    def __init__(self) -> None:
        self._claims: dict[str | None, _Claim] = {}

    def before(self, job_id: str | None, *, since: float, now: float) -> int:
        """Bytes that others with older WAL wait for."""
        self._claims = {
            other: claim
            for other, claim in self._claims.items()
            if now - claim.asked_at <= CLAIM_SECONDS
        }
        return sum(
            claim.size_bytes
            for other, claim in self._claims.items()
            if other != job_id and claim.since < since
        )

    def join(self, job_id: str | None, *, since: float, size_bytes: int, now: float) -> None:
        self._claims[job_id] = _Claim(since=since, size_bytes=size_bytes, asked_at=now)

    def leave(self, job_id: str | None) -> None:
        self._claims.pop(job_id, None)
