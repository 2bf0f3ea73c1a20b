"""Fault row 8 for WAL and manifest together: the power fails at any instant (I1, I3, I14)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.fault.children.wal_recovery import Recovered, ledger_of
from tests.fault.conftest import Recorder, requires_strace
from tests.helpers.isolated import Isolated
from tests.helpers.powercut import Recording, Survey, survey

pytestmark = requires_strace
CHILD = "tests.fault.children.wal_appends"
RECOVERY = "tests.fault.children.wal_recovery:recover"


def verify(recovered: Recovered, notes: Sequence[dict[str, Any]]) -> None:
    if not recovered.exists:
        assert not any("created" in note for note in notes), "the database is lost"
        return
    assert recovered.health == "ok", recovered.health
    ledger = ledger_of(notes)
    ledger.check(recovered.records)
    for ordinal, (first, last) in recovered.replayed.items():
        ledger.appends[ordinal].ok(first, last)
    assert recovered.after[-1][0] == recovered.after_lsn
    ledger.check(recovered.after[:-1])


def cut_everywhere(recording: Recording, scratch: Path, *, count: int) -> Survey:
    with Isolated(RECOVERY) as recover:
        return survey(
            recording, recover=recover, verify=verify, scratch=scratch, seed=1, count=count
        )


def test_power_cut_at_any_instant_keeps_what_was_acknowledged(
    record_child: Recorder, tmp_path: Path
) -> None:
    recording = record_child(CHILD, "none")
    result = cut_everywhere(recording, tmp_path / "cuts", count=250)
    assert result.violations == []
    assert result.states >= 180


@pytest.mark.parametrize("protection", ["fdatasync", "directory", "sync"])
def test_a_missing_sync_is_seen(record_child: Recorder, tmp_path: Path, protection: str) -> None:
    recording = record_child(CHILD, protection)
    result = cut_everywhere(recording, tmp_path / "cuts", count=40)
    assert result.violations != []
