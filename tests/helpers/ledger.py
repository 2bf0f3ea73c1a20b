"""The ack ledger: what the outside world was told, against what the service holds in the end.

It lives in the test's process, so that no crash of the service touches it.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

Outcome = Literal["open", "ok", "failed", "unknown"]
FinalRecord = tuple[int, bytes]


class LedgerMismatch(AssertionError):
    pass


@dataclass(slots=True)
class Append:
    """One append of the client, retries included. Until it is settled anything may come of it."""

    ordinal: int
    payloads: tuple[bytes, ...]
    pad_bytes: int
    began: int
    outcome: Outcome = "open"
    first_lsn: int = 0
    last_lsn: int = 0
    settled: int = 0
    _moments: "itertools.count[int]" = field(default_factory=itertools.count, repr=False)

    def ok(self, first_lsn: int, last_lsn: int) -> None:
        """The service said so: from here on it is a promise."""
        if last_lsn - first_lsn + 1 != len(self.payloads):
            raise LedgerMismatch(
                f"append {self.ordinal} of {len(self.payloads)} records was answered with LSNs "
                f"{first_lsn}..{last_lsn}"
            )
        if self.outcome == "ok" and (first_lsn, last_lsn) != (self.first_lsn, self.last_lsn):
            raise LedgerMismatch(
                f"append {self.ordinal} was acknowledged at {self.first_lsn}..{self.last_lsn}, "
                f"then again at {first_lsn}..{last_lsn}"
            )
        if self.outcome == "failed":
            raise LedgerMismatch(f"append {self.ordinal} was refused, then acknowledged")
        if self.outcome != "ok":
            self.settled = next(self._moments)
        self.outcome, self.first_lsn, self.last_lsn = "ok", first_lsn, last_lsn

    def failed(self) -> None:
        """The service refused it: nothing of it may be kept (I13)."""
        self.outcome, self.settled = "failed", next(self._moments)

    def unknown(self) -> None:
        """No answer: wholly there or wholly absent (I1)."""
        if self.outcome == "open":
            self.outcome, self.settled = "unknown", next(self._moments)


class AckLedger:
    """Payloads carry an id of their own, so that every record found tells where it came from."""

    def __init__(self, name: str = "a") -> None:
        self._name = name
        self._ids = itertools.count()
        self._moments = itertools.count(1)
        self.appends: list[Append] = []

    def begin(self, count: int = 1, *, pad_bytes: int = 0) -> Append:
        """A new append of `count` records, of `pad_bytes` and an id each."""
        payloads = []
        for _ in range(count):
            head = json.dumps({"ledger": self._name, "id": next(self._ids)}).encode()
            payloads.append(head + b"." * pad_bytes)
        append = Append(
            ordinal=len(self.appends),
            payloads=tuple(payloads),
            pad_bytes=pad_bytes,
            began=next(self._moments),
            _moments=self._moments,
        )
        self.appends.append(append)
        return append

    @property
    def acknowledged(self) -> list[Append]:
        return [append for append in self.appends if append.outcome == "ok"]

    @property
    def last_acknowledged_lsn(self) -> int:
        return max((append.last_lsn for append in self.acknowledged), default=0)

    def check(self, final: Sequence[FinalRecord], *, gaps: bool = False) -> Self:
        """`final` is every readable record in the order read. Raises LedgerMismatch unless it is
        all that was acknowledged, exactly once, at its LSNs and in order, plus whole appends
        whose outcome is unknown. With `gaps`, LSNs may be missing between appends.
        """
        _check_lsns([lsn for lsn, _ in final], gaps=gaps)
        found = self._spans(final)
        for append in self.appends:
            span = found.get(append.ordinal)
            if append.outcome == "ok" and span != (append.first_lsn, append.last_lsn):
                raise LedgerMismatch(
                    f"acknowledged append {append.ordinal} belongs at LSNs "
                    f"{append.first_lsn}..{append.last_lsn}, found at {span}"
                )
            if append.outcome == "failed" and span is not None:
                raise LedgerMismatch(f"refused append {append.ordinal} was kept at LSNs {span}")
        acknowledged = sorted(self.acknowledged, key=lambda append: append.settled)
        for earlier, later in itertools.pairwise(acknowledged):
            if earlier.settled < later.began and earlier.last_lsn >= later.first_lsn:
                raise LedgerMismatch(
                    f"append {later.ordinal} began after {earlier.ordinal} was acknowledged, "
                    f"and has the lower LSN"
                )
        return self

    def _spans(self, final: Sequence[FinalRecord]) -> dict[int, tuple[int, int]]:
        """First and last LSN of each append found; each must be whole and there once."""
        owner = {
            payload: (append, index)
            for append in self.appends
            for index, payload in enumerate(append.payloads)
        }
        spans: dict[int, tuple[int, int]] = {}
        position = 0
        while position < len(final):
            lsn, payload = final[position]
            if payload not in owner:
                raise LedgerMismatch(f"LSN {lsn} holds what nobody sent: {payload[:80]!r}")
            append, index = owner[payload]
            run = final[position : position + len(append.payloads)]
            whole = (
                index == 0
                and tuple(data for _, data in run) == append.payloads
                and run[-1][0] - lsn == len(run) - 1
            )
            if not whole:
                raise LedgerMismatch(f"part of append {append.ordinal} at LSN {lsn}")
            if append.ordinal in spans:
                raise LedgerMismatch(f"append {append.ordinal} is there twice, again at LSN {lsn}")
            spans[append.ordinal] = (lsn, run[-1][0])
            position += len(run)
        return spans


def _check_lsns(lsns: Sequence[int], *, gaps: bool) -> None:
    for before, after in itertools.pairwise(lsns):
        if after <= before or (not gaps and after != before + 1):
            raise LedgerMismatch(f"LSN {after} follows {before}")
