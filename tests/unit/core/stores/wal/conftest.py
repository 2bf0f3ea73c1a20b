from collections.abc import Callable
from pathlib import Path

import pytest

from app.core.base import failpoints
from tests.unit.core.stores.wal.builders import Hold, Place
from tests.unit.core.stores.wal.disks import FaultyDisk


@pytest.fixture
def disk() -> FaultyDisk:
    return FaultyDisk()


@pytest.fixture
def place(tmp_path: Path, disk: FaultyDisk) -> Place:
    return Place(root=tmp_path / "wal", disk=disk)


@pytest.fixture
def hold_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Hold]:
    def arm(place: str) -> Hold:
        hold = Hold(place)
        monkeypatch.setattr(failpoints, "fp", hold)
        return hold

    return arm
