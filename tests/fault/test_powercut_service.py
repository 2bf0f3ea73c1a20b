"""Fault row 8 for the whole service: the power fails at any instant of WAL, manifest and blob
traffic (I1, I2, I3, I4).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.fault.children.service_recovery import Recovered
from tests.fault.children.wal_recovery import ledger_of
from tests.fault.conftest import Recorder, requires_strace
from tests.helpers.isolated import Isolated
from tests.helpers.powercut import Recording, Survey, survey

pytestmark = requires_strace
CHILD = "tests.fault.children.service_workload"
RECOVERY = "tests.fault.children.service_recovery:recover"


def verify(recovered: Recovered, notes: Sequence[dict[str, Any]]) -> None:
    if recovered.database is not None:
        assert recovered.database["health"]["state"] == "ok", recovered.database["health"]
    assert recovered.findings == [], recovered.findings
    assert recovered.scratch == [], recovered.scratch
    assert recovered.leases == 0, "leases are left"
    if recovered.database is None:
        assert not any("created" in note for note in notes), "the database is gone"
    ledger_of(notes).check(recovered.records)
    for note in notes:
        if "job" in note:
            assert recovered.job_states.get(note["job"]) == "completed", recovered.job_states
            assert recovered.database is not None, "the database is gone"
            assert recovered.database["checkpointed_lsn"] >= note["covered"], recovered.database


def cut_everywhere(recording: Recording, scratch: Path, *, count: int) -> Survey:
    with Isolated(RECOVERY) as recover:
        return survey(
            recording, recover=recover, verify=verify, scratch=scratch, seed=1, count=count
        )


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_power_cut_at_any_instant_keeps_what_was_acknowledged(
    record_child: Recorder, tmp_path: Path, compression: str
) -> None:
    recording = record_child(CHILD, "none", compression)
    result = cut_everywhere(recording, tmp_path / "cuts", count=90)
    assert result.violations == []
    assert result.states >= 60


@pytest.mark.parametrize("protection", ["fdatasync", "directory"])
def test_a_missing_sync_is_seen(record_child: Recorder, tmp_path: Path, protection: str) -> None:
    recording = record_child(CHILD, protection, "none")
    result = cut_everywhere(recording, tmp_path / "cuts", count=20)
    assert result.violations != []
