"""Files that are uploaded."""

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.core.base.errors import CorruptBlob
from app.core.base.tasks import BlockingPool
from app.core.stores.remote.s3_body import OpenedFile
from tests.helpers.open_files import open_files_below


@pytest.fixture
def pool() -> Iterator[BlockingPool]:
    made = BlockingPool("test", threads=1)
    yield made
    made.close_blocking()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "staged"
    path.write_bytes(b"content")
    return path


async def test_a_file_of_another_length_than_recorded_is_not_uploaded(
    path: Path, pool: BlockingPool
) -> None:
    with pytest.raises(CorruptBlob):
        async with OpenedFile(path, length=8, pool=pool):
            pass
    assert open_files_below(path.parent) == []


async def test_an_upload_given_up_while_its_file_is_opened_leaves_nothing_open(
    path: Path, pool: BlockingPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening, go_on = threading.Event(), threading.Event()
    open_file = os.open

    def slowly(*args: object) -> int:
        opened = open_file(*args)  # type: ignore[arg-type]
        opening.set()
        assert go_on.wait(30)
        return opened

    monkeypatch.setattr(os, "open", slowly)
    entering = asyncio.ensure_future(OpenedFile(path, length=7, pool=pool).__aenter__())
    assert await asyncio.to_thread(opening.wait, 30)
    entering.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await entering
    await pool.run(lambda: None)  # behind what was under way
    assert open_files_below(path.parent) == []
