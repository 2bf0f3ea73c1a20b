"""Opens manifest and WAL on what a power cut left, goes on appending, and tells what is there."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.core.stores.wal.log import WalLog
from tests.fault.children.wal_stack import read_log, request_of, wal_stack
from tests.helpers.ledger import AckLedger, Append, FinalRecord


@dataclass(slots=True, kw_only=True)
class Recovered:
    exists: bool = False
    health: str = "ok"
    records: list[FinalRecord] = field(default_factory=list)
    replayed: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Every keyed append sent again after the records were read."""
    after: list[FinalRecord] = field(default_factory=list)
    """The records once more, after those replays, an append and another start."""
    after_lsn: int = 0


def ledger_of(notes: Sequence[dict[str, Any]]) -> AckLedger:
    """As the child's own was when it had written these notes: payloads follow from the order."""
    ledger = AckLedger()
    for note in notes:
        match note:
            case {"trying": count, "pad_bytes": pad_bytes}:
                ledger.begin(count, pad_bytes=pad_bytes).unknown()
            case {"acknowledged": ordinal, "first_lsn": first, "last_lsn": last}:
                ledger.appends[ordinal].ok(first, last)
    return ledger


def keyed_of(notes: Sequence[dict[str, Any]]) -> list[int]:
    """Ordinals of the keyed appends."""
    tries = [note for note in notes if "trying" in note]
    return [ordinal for ordinal, note in enumerate(tries) if note["keyed"]]


async def recover(directory: Path, notes: Sequence[dict[str, Any]]) -> Recovered:
    found = Recovered()
    ledger = ledger_of(notes)
    async with wal_stack(directory / "data") as stack:
        log = stack.find_log()
        if log is None:
            return found
        found.exists, found.health = True, log.health
        if log.health != "ok":
            return found
        found.records = read_log(log)
        for ordinal in keyed_of(notes):
            found.replayed[ordinal] = await _send(log, ledger.appends[ordinal], keyed=True)
        found.after_lsn, _ = await _send(log, AckLedger("after").begin(1), keyed=False)
    async with wal_stack(directory / "data") as stack:
        log = stack.find_log()
        assert log is not None
        assert log.health == "ok"
        found.after = read_log(log)
    return found


async def _send(log: WalLog, append: Append, *, keyed: bool) -> tuple[int, int]:
    done = await log.append(request_of(append, keyed=keyed))
    return done.first_lsn, done.last_lsn
