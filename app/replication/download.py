"""An image of the service into a file, in parts side by side.

Invariants: the file holds one state, the one that its ETag names.
Concurrency: a part is drained by a thread of its own, into its own place of the file.
Retries: a part that breaks off goes on where it broke, also where the service was restarted; if the
database has moved on meanwhile, all begins anew.
Cancellation: the parts' threads are stopped and joined: none of them writes when this has ended.
Crash: the file is not whole, and nobody knows it by its name.
"""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

import httpx

from app.client import ProblemError, ServiceUnreachable, StreamBroken, UnexpectedAnswer
from app.client.images import Body, ImageReader, ImageState

PART_BYTES_MIN = 16 * 1024 * 1024
PARTS_MAX = 4
ALIGNED_BYTES = 1024 * 1024
"""The service reads in windows of so many."""
BROKEN_MAX = 20
"""Breaks in a row, without a byte between them: a service that is restarted takes its time."""
CHANGED_MAX = 6
SHOW_SECONDS = 0.1

Progress = Callable[[int, int], None]
"""Takes bytes done and bytes in all."""


@dataclass(slots=True)
class _Part:
    at: int
    end: int


class _Changed(Exception):
    """The database is no longer in the state of the parts that came."""


async def download(reader: ImageReader, descriptor: int, progress: Progress) -> ImageState:
    """The file is as long as the image when this returns. Raises ClientError, OSError."""
    for _ in range(CHANGED_MAX):
        state, parts = await _opened(reader)
        await asyncio.to_thread(os.ftruncate, descriptor, state.content_bytes)
        try:
            await _filled(reader, state, parts, descriptor, progress)
        except _Changed:
            continue
        return state
    raise StreamBroken(
        "Each time the connection broke off, the database had changed; a generation or a snapshot "
        "stays as it is."
    )


async def _opened(reader: ImageReader) -> tuple[ImageState, list[tuple[_Part, Body]]]:
    """Parts of one state, or the whole in one where a writer is too quick for that: an open answer
    keeps its state.
    """
    state = await reader.look()
    if state is not None and state.content_bytes > 0:
        parts = _split(state.content_bytes)
        answers = await asyncio.gather(
            *(reader.open_part(state, first=each.at, end=each.end) for each in parts),
            return_exceptions=True,
        )
        bodies = [each for each in answers if isinstance(each, Body)]
        if len(bodies) == len(parts):
            return state, list(zip(parts, bodies, strict=True))
        for body in bodies:
            await body.aclose()
        for failure in answers:
            if isinstance(failure, BaseException) and not _is_changed(failure):
                raise failure
    state, body = await reader.open()
    return state, [(_Part(0, state.content_bytes), body)]


def _split(content_bytes: int) -> list[_Part]:
    count = max(1, min(PARTS_MAX, content_bytes // PART_BYTES_MIN))
    step = -(-content_bytes // (count * ALIGNED_BYTES)) * ALIGNED_BYTES
    return [_Part(at, min(at + step, content_bytes)) for at in range(0, content_bytes, step)]


async def _filled(
    reader: ImageReader,
    state: ImageState,
    parts: list[tuple[_Part, Body]],
    descriptor: int,
    progress: Progress,
) -> None:
    def show() -> None:
        left = sum(part.end - part.at for part, _ in parts)
        progress(state.content_bytes - left, state.content_bytes)

    try:
        async with asyncio.TaskGroup() as group:
            left = {
                group.create_task(_fill(reader, state, part, body, descriptor))
                for part, body in parts
            }
            while left:
                _, left = await asyncio.wait(left, timeout=SHOW_SECONDS)
                show()
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures


async def _fill(
    reader: ImageReader, state: ImageState, part: _Part, body: Body, descriptor: int
) -> None:
    def take(piece: bytes) -> None:
        if part.at + len(piece) > part.end:
            raise UnexpectedAnswer("More came than was said.")
        _write_blocking(descriptor, piece, part.at)
        part.at += len(piece)

    breaks = 0
    opened: Body | None = body
    while True:
        before = part.at
        failure = await _filled_on(reader, state, part, opened, take)
        opened = None
        if part.at == part.end:
            return
        if part.at > before:
            breaks = 0
            continue
        breaks += 1
        if breaks >= BROKEN_MAX:
            raise failure or StreamBroken("The answers end before their end.")
        await reader.back_off(attempt=breaks)


async def _filled_on(
    reader: ImageReader,
    state: ImageState,
    part: _Part,
    body: Body | None,
    take: Callable[[bytes], None],
) -> Exception | None:
    """What came in its way, and may not do so again."""
    try:
        body = body or await reader.open_part(state, first=part.at, end=part.end)
        await _drained(body, take)
    except httpx.TransportError as error:
        return reader.unreachable(error)
    except ServiceUnreachable as failure:
        return failure
    except ProblemError as problem:
        if _is_changed(problem):
            raise _Changed from problem
        if problem.status != HTTPStatus.SERVICE_UNAVAILABLE:
            raise
        return problem
    return None


def _is_changed(failure: BaseException) -> bool:
    return isinstance(failure, ProblemError) and failure.code == "precondition_failed"


async def _drained(body: Body, take: Callable[[bytes], None]) -> None:
    loop = asyncio.get_running_loop()
    future = loop.run_in_executor(None, body.drain_blocking, take)
    try:
        await asyncio.shield(future)
    except asyncio.CancelledError:
        body.stop()
        await asyncio.wait({future})
        if not future.cancelled():
            future.exception()  # seen here: the cancellation is what the caller is told
        raise


def _write_blocking(descriptor: int, piece: bytes, offset: int) -> None:
    while piece:
        written = os.pwrite(descriptor, piece, offset)
        piece, offset = piece[written:], offset + written
