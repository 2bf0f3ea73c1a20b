"""A page blob's file is closed by whoever opened it, cancelled or not, on a full disk or not."""

import asyncio
import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from app.core.base.errors import DiskFull
from app.core.checkpoint.page_staging import _Writer
from app.core.formats.container import ContainerKind, LogIdentity
from app.core.formats.page_blob_writer import PageBlobSpec, PageBlobWriter

SPEC = PageBlobSpec(
    kind=ContainerKind.PAGES, codec="none", page_size=512,
    identity=LogIdentity(db_id=1, chunk_id=1, generation=1),
)  # fmt: skip


async def test_a_writer_that_is_opened_as_its_job_is_cancelled_is_closed(tmp_path: Path):
    opened: list[PageBlobWriter] = []

    async def and_cancelled(step: Callable[[], PageBlobWriter]) -> PageBlobWriter:
        opened.append(step())
        raise asyncio.CancelledError

    writer = _Writer(lambda: PageBlobWriter(tmp_path / "blob", SPEC), on_disk=and_cancelled)
    with pytest.raises(asyncio.CancelledError):
        await writer.__aenter__()
    assert [one._file.closed for one in opened] == [True]


async def test_a_disk_that_is_full_at_the_closing_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The unfinished file's buffer does not fit either: why it is unfinished is what is told."""

    async def at_once(step: Callable[[], PageBlobWriter]) -> PageBlobWriter:
        return step()

    def close(writer: PageBlobWriter) -> None:
        writer._file.close()
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(PageBlobWriter, "close", close)
    with pytest.raises(DiskFull):
        async with _Writer(lambda: PageBlobWriter(tmp_path / "blob", SPEC), on_disk=at_once):
            raise DiskFull
