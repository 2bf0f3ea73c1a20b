import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from app.core.base import failpoints
from app.core.stores.manifest.store import ManifestStore
from tests.unit.core.stores.manifest.builders import FakeClock, open_store


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def store(tmp_path: Path, clock: FakeClock) -> AsyncIterator[ManifestStore]:
    store = await open_store(tmp_path / "manifest", clock=clock)
    yield store
    await store.aclose()


class WriterHold:
    """Keeps the writer before its next transactions until released."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.released = threading.Event()
        self.groups = 0

    def __call__(self, name: str) -> None:
        if name == "manifest.before_apply":
            self.groups += 1
            self.reached.set()
            assert self.released.wait(30)

    async def until_reached(self) -> None:
        import asyncio

        assert await asyncio.to_thread(self.reached.wait, 30)


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> Iterator[WriterHold]:
    hold = WriterHold()
    monkeypatch.setattr(failpoints, "fp", hold)
    yield hold
    hold.released.set()


@pytest.fixture
def fail_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, BaseException], None]:
    def arm(place: str, error: BaseException) -> None:
        def hit(name: str) -> None:
            if name == place:
                raise error

        monkeypatch.setattr(failpoints, "fp", hit)

    return arm
