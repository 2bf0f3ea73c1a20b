"""Fault rows 8 and 9 for the manifest: the power fails at any instant of its traffic (I1, I3)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.fault.children.manifest_recovery import Recovered
from tests.fault.conftest import Recorder, requires_strace
from tests.helpers.isolated import Isolated
from tests.helpers.powercut import Recording, Survey, survey

pytestmark = requires_strace
CHILD = "tests.fault.children.manifest_commits"
RECOVERY = "tests.fault.children.manifest_recovery:recover"


def verify(recovered: Recovered, notes: Sequence[dict[str, Any]]) -> None:
    """All that was acknowledged, nothing that was not tried, and a prefix of the commits."""
    acknowledged = {note["committed"]: note["sequence"] for note in notes if "committed" in note}
    tried = {note["trying"] for note in notes if "trying" in note}
    opened = [note["opened"] for note in notes if "opened" in note]
    assert not opened or opened == [recovered.node_id], "the manifest started anew"
    assert acknowledged.keys() <= recovered.names, "acknowledged commits are lost"
    assert recovered.names <= tried, "commits out of nowhere"
    assert recovered.fillers == recovered.names, "part of a batch"
    assert recovered.replayed == recovered.catalogue, "the change log is not the catalogue"
    for name, sequence in acknowledged.items():
        assert recovered.by_sequence[sequence] == name, "the order of commits changed"


def cut_everywhere(recording: Recording, scratch: Path, *, count: int) -> Survey:
    with Isolated(RECOVERY) as recover:
        return survey(
            recording, recover=recover, verify=verify, scratch=scratch, seed=1, count=count
        )


def test_power_cut_at_any_instant_leaves_a_prefix_of_the_commits(
    record_child: Recorder, tmp_path: Path
) -> None:
    recording = record_child(CHILD, "none")
    result = cut_everywhere(recording, tmp_path / "cuts", count=600)
    assert result.violations == []
    assert result.states >= 400


def test_power_cut_while_the_environment_is_created_starts_fresh_or_whole(
    record_child: Recorder, tmp_path: Path
) -> None:
    recording = record_child(CHILD, "none").until(lambda note: "trying" in note)
    result = cut_everywhere(recording, tmp_path / "cuts", count=300)
    assert result.violations == []
    assert result.states >= 25


@pytest.mark.parametrize(
    ("protection", "harm"),
    [
        ("metasync", "acknowledged commits are lost"),
        ("sync", "acknowledged commits are lost"),
        ("directory", "the manifest started anew"),
    ],
)
def test_a_missing_sync_is_seen(
    record_child: Recorder, tmp_path: Path, protection: str, harm: str
) -> None:
    recording = record_child(CHILD, protection)
    result = cut_everywhere(recording, tmp_path / "cuts", count=60)
    assert any(harm in violation for violation in result.violations), result.violations[:5]
