"""Is a history of appends to one log linearizable? Exact, in the time that sorting takes.

An append is a compare-and-swap of `next_lsn` (or an add, without `If-Match`), and the log itself
tells their order. What is left to decide is whether each can be given a moment within its call,
one after the other in that order, so that whoever was told a `next_lsn` (by a refusal, or by
asking) was told it while it was true. Narrowing each call by its neighbours' tellings and walking
once in order, as early as possible, decides that: no search is needed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal

Outcome = Literal["ok", "unknown", "refused"]


class NotLinearizable(AssertionError):
    pass


@dataclass(slots=True, kw_only=True)
class Attempt:
    """`payloads` are like no others. `ended`: when the answer came, or, of an unknown outcome, when
    it had taken effect at the latest (the process was dead, say); inf: it may yet.
    """

    payloads: tuple[bytes, ...]
    began: float
    ended: float = inf
    expected: int | None = None
    outcome: Outcome = "unknown"
    first_lsn: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """Somebody asked between `began` and `ended`, and was told `next_lsn`."""

    began: float
    ended: float
    next_lsn: int


@dataclass(slots=True)
class _Placed:
    attempt: Attempt
    first_lsn: int
    after: int
    earliest: float
    latest: float


def check_history(
    attempts: Sequence[Attempt],
    told: Iterable[Told],
    log: Sequence[tuple[int, bytes]],
    *,
    start: int = 1,
) -> int:
    """Appends in the log. `log` is all of it from LSN `start` on. Raises NotLinearizable."""
    placed = _place(attempts, log, start=start)
    _check_answers(attempts, placed)
    _narrow(placed, told, start=start)
    now = -inf
    for one in placed:
        now = max(now, one.earliest)
        if now > one.latest:
            raise NotLinearizable(
                f"the append at LSN {one.first_lsn} cannot have been after those before it: "
                f"{one.attempt}"
            )
    return len(placed)


def _place(
    attempts: Sequence[Attempt], log: Sequence[tuple[int, bytes]], *, start: int
) -> list[_Placed]:
    """In the order of the log: each whole, once, without a hole."""
    owners = {payload: attempt for attempt in attempts for payload in attempt.payloads}
    placed: list[_Placed] = []
    seen: set[int] = set()
    at, lsn = 0, start
    while at < len(log):
        found, payload = log[at]
        if found != lsn:
            raise NotLinearizable(f"LSN {found} follows {lsn - 1}")
        if (attempt := owners.get(payload)) is None:
            raise NotLinearizable(f"LSN {lsn} holds what nobody sent: {payload[:60]!r}")
        count = len(attempt.payloads)
        if id(attempt) in seen:
            raise NotLinearizable(f"an append is there twice, again at LSN {lsn}: {attempt}")
        if tuple(data for _, data in log[at : at + count]) != attempt.payloads:
            raise NotLinearizable(f"an append is not whole at LSN {lsn}: {attempt}")
        seen.add(id(attempt))
        placed.append(_Placed(attempt, lsn, lsn + count, attempt.began, attempt.ended))
        at, lsn = at + count, lsn + count
    return placed


def _check_answers(attempts: Sequence[Attempt], placed: Sequence[_Placed]) -> None:
    lsn_of = {id(one.attempt): one.first_lsn for one in placed}
    for attempt in attempts:
        lsn = lsn_of.get(id(attempt))
        if attempt.outcome == "ok" and lsn != attempt.first_lsn:
            raise NotLinearizable(f"acknowledged, and found at LSN {lsn}: {attempt}")
        if attempt.outcome == "refused" and lsn is not None:
            raise NotLinearizable(f"refused, and found at LSN {lsn}: {attempt}")
        if lsn is not None and attempt.expected not in {None, lsn}:
            raise NotLinearizable(f"done at LSN {lsn} in spite of its If-Match: {attempt}")


def _narrow(placed: Sequence[_Placed], told: Iterable[Told], *, start: int) -> None:
    """Who was told `n` was told it behind the append that made it so, and before the next."""
    index = {start: 0} | {one.after: number for number, one in enumerate(placed, start=1)}
    for each in told:
        if (number := index.get(each.next_lsn)) is None:
            raise NotLinearizable(f"next_lsn never was what was told: {each}")
        if number > 0:
            placed[number - 1].latest = min(placed[number - 1].latest, each.ended)
        if number < len(placed):
            placed[number].earliest = max(placed[number].earliest, each.began)
