"""A database of the service as a file on this machine.

Invariants: the target's name shows a whole, checked file or nothing new: the download goes to a
file beside it, which is verified, made durable and then renamed.
Concurrency: one download, its file used in one pool thread at a time.
Cancellation: the unfinished file is removed.
Crash: before the rename an unfinished `.NAME.….part` is left beside the target; with `replace`, a
crash just before the rename may leave the old database without its WAL: what was to be dropped.
"""

import asyncio
import contextlib
import os
import sqlite3
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import httpx

from app.client import BopClient, StreamBroken
from app.replication.source import MAGIC, SIDE_FILES

WRITE_BYTES = 1024 * 1024
BROKEN_MAX = 6
_HEADER_BYTES = 100

Check = Literal["quick", "full"]
Progress = Callable[[int, int], None]
"""Takes bytes done and bytes in all."""


class TargetExists(Exception):
    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(f"{path} exists")


class RestoreFailed(Exception):
    """What came is not a sound database; nothing was changed."""

    def __init__(self, detail: str, *, code: str = "restore_failed") -> None:
        self.code = code
        super().__init__(detail)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    tenant: str
    database: str
    generation: int | None = None
    snapshot: str | None = None
    at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    path: str
    bytes: int
    page_size: int
    page_count: int
    generation: int | None
    lsn: int | None
    etag: str


@dataclass(slots=True, kw_only=True)
class _Download:
    """What is known of the answer, and how much of it is on disk."""

    etag: str | None = None
    content_bytes: int = 0
    generation: int | None = None
    lsn: int | None = None
    done_bytes: int = 0


async def restore(
    client: BopClient,
    wanted: Wanted,
    target: Path,
    *,
    check: Check = "quick",
    replace: bool = False,
    progress: Progress,
) -> Restored:
    """The file is durable under its name when this returns. With `replace` an existing database
    and its -wal, -shm and -journal go; nothing may have it open. Raises TargetExists,
    RestoreFailed, ClientError, OSError.
    """
    await asyncio.to_thread(_refuse_existing_blocking, target, replace)
    descriptor, name = await asyncio.to_thread(
        tempfile.mkstemp, ".part", f".{target.name}.", target.parent
    )
    part = Path(name)
    try:
        try:
            download = await _downloaded(client, wanted, descriptor, progress)
            await asyncio.to_thread(os.fsync, descriptor)
        finally:
            os.close(descriptor)
        page_size, page_count = await asyncio.to_thread(_verify_blocking, part, download, check)
        await asyncio.to_thread(_put_in_place_blocking, part, target, replace)
    finally:
        _remove_blocking(part)  # short, and also where the task was cancelled
    assert download.etag is not None, "verified"
    return Restored(
        path=str(target),
        bytes=download.content_bytes,
        page_size=page_size,
        page_count=page_count,
        generation=download.generation,
        lsn=download.lsn,
        etag=download.etag,
    )


async def _downloaded(
    client: BopClient, wanted: Wanted, descriptor: int, progress: Progress
) -> _Download:
    """A connection that breaks is taken up where it broke, as long as the state is the same."""
    download = _Download()
    broken_count = 0
    while True:
        before = download.done_bytes
        try:
            async with client.libsql.image(
                wanted.tenant,
                wanted.database,
                generation=wanted.generation,
                snapshot=wanted.snapshot,
                at=wanted.at,
                first_byte=download.done_bytes,
                etag=download.etag,
            ) as response:
                _begin(download, response)
                async for piece in response.aiter_bytes(WRITE_BYTES):
                    await asyncio.to_thread(_write_blocking, descriptor, piece, download.done_bytes)
                    download.done_bytes += len(piece)
                    progress(download.done_bytes, download.content_bytes)
        except httpx.TransportError as error:
            broken_count = 1 if download.done_bytes > before else broken_count + 1
            if broken_count >= BROKEN_MAX:
                raise client.libsql.unreachable(error) from error
            continue
        if download.done_bytes == download.content_bytes:
            await asyncio.to_thread(os.ftruncate, descriptor, download.content_bytes)
            return download
        broken_count = 1 if download.done_bytes > before else broken_count + 1
        if broken_count >= BROKEN_MAX or download.done_bytes > download.content_bytes:
            raise StreamBroken(
                f"{download.done_bytes} bytes came instead of {download.content_bytes}"
            )


def _begin(download: _Download, response: httpx.Response) -> None:
    """A whole answer starts anew; a partial one goes on."""
    etag = response.headers.get("ETag")
    length = response.headers.get("Content-Length", "")
    if etag is None or etag.startswith("W/") or not length.isdecimal():
        raise RestoreFailed(
            "The answer has no strong ETag or no Content-Length.", code="unexpected_answer"
        )
    if response.status_code == 206:
        expected = f"bytes {download.done_bytes}-{download.content_bytes - 1}/"
        if etag != download.etag or not response.headers.get("Content-Range", "").startswith(
            expected
        ):
            raise RestoreFailed("The answer goes on elsewhere.", code="unexpected_answer")
        return
    download.etag = etag
    download.content_bytes = int(length)
    download.generation = _number(response, "Bop-Generation")
    download.lsn = _number(response, "Bop-Lsn")
    download.done_bytes = 0


def _number(response: httpx.Response, name: str) -> int | None:
    value = response.headers.get(name, "")
    return int(value) if value.isdecimal() else None


def existing(target: Path) -> list[Path]:
    """The database and what belongs to it, as far as there is any."""
    paths = [target, *(Path(f"{target}{suffix}") for suffix in SIDE_FILES)]
    return [path for path in paths if path.is_symlink() or path.exists()]


def _refuse_existing_blocking(target: Path, replace: bool) -> None:
    found = existing(target)
    if found and not replace:
        raise TargetExists(found[0])
    if target.is_dir():
        raise TargetExists(target)


def _write_blocking(descriptor: int, piece: bytes, offset: int) -> None:
    while piece:
        written = os.pwrite(descriptor, piece, offset)
        piece, offset = piece[written:], offset + written


def _verify_blocking(part: Path, download: _Download, check: Check) -> tuple[int, int]:
    """Page size and page count. Raises RestoreFailed."""
    with part.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES or not header.startswith(MAGIC):
        raise RestoreFailed("What came is not a SQLite database.", code="corrupt_image")
    page_size = int.from_bytes(header[16:18], "big")
    page_size = 65536 if page_size == 1 else page_size
    if page_size < 512 or page_size & (page_size - 1) or download.content_bytes % page_size:
        raise RestoreFailed("The pages do not make up the file.", code="corrupt_image")
    # immutable: no -wal and -shm come up beside it
    uri = f"{part.resolve().as_uri()}?mode=ro&immutable=1"
    pragma = "integrity_check" if check == "full" else "quick_check"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
            connection.execute(f"PRAGMA mmap_size = {download.content_bytes}")  # twice as fast
            rows = connection.execute(f"PRAGMA {pragma}").fetchmany(3)
    except sqlite3.Error as error:
        raise RestoreFailed(f"SQLite cannot read it: {error}.", code="corrupt_image") from error
    if rows != [("ok",)]:
        said = "; ".join(str(row[0]) for row in rows)
        raise RestoreFailed(f"{pragma} says: {said}", code="corrupt_image")
    return page_size, download.content_bytes // page_size


def _put_in_place_blocking(part: Path, target: Path, replace: bool) -> None:
    """An old -wal would be replayed into the new file: it goes first, and durably."""
    part.chmod(0o666 & ~_umask())
    if replace:
        for suffix in SIDE_FILES:
            Path(f"{target}{suffix}").unlink(missing_ok=True)
        _sync_directory(target.parent)
        part.replace(target)
    else:
        _refuse_existing_blocking(target, replace)
        try:
            os.link(part, target)  # unlike a rename, it does not replace what came meanwhile
        except FileExistsError as error:
            raise TargetExists(target) from error
        part.unlink()
    _sync_directory(target.parent)


def _remove_blocking(part: Path) -> None:
    for suffix in ("", *SIDE_FILES):
        with contextlib.suppress(OSError):
            Path(f"{part}{suffix}").unlink()


def _umask() -> int:
    """Linux tells it without setting it (proc(5), `status`)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o077


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
