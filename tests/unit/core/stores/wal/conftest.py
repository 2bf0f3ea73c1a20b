from collections.abc import Callable

import pytest

from app.core.base import failpoints
from tests.unit.core.stores.wal.builders import Hold


@pytest.fixture
def hold_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Hold]:
    def arm(place: str) -> Hold:
        hold = Hold(place)
        monkeypatch.setattr(failpoints, "fp", hold)
        return hold

    return arm
