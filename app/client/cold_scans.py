"""Cold scans: a generation as checked frames, across broken connections.

Invariants: every frame given out passed its checksum and follows the one before; the last one is
the end, or something is raised. A scan that breaks off goes on behind its last frame, in the same
generation.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Literal

import httpx

from app.client.calls import Calls
from app.client.failures import ProblemError, StreamBroken
from app.core.formats.cold_scan import (
    Frame,
    FrameDecoder,
    FrameType,
    ScanEnd,
    ScanStart,
    note_frame,
)
from app.core.formats.damage import Damage

_PASSING = frozenset({429, 503})


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanRequest:
    """What is scanned; bounds are inclusive. Without generation or snapshot: the newest."""

    tenant: str
    database: str
    generation: int | None = None
    snapshot: str | None = None
    first_chunk: int | None = None
    last_chunk: int | None = None
    first_page: int | None = None
    last_page: int | None = None
    from_lsn: int | None = None
    to_lsn: int | None = None
    max_bytes_per_second: int | None = None
    priority: Literal["low", "normal"] | None = None

    @property
    def is_partial(self) -> bool:
        bounds = (
            self.first_chunk, self.last_chunk, self.first_page, self.last_page, self.from_lsn,
            self.to_lsn,
        )  # fmt: skip
        return any(bound is not None for bound in bounds)

    def behind(self, start: ScanStart, last: Frame | None) -> "ScanRequest":
        """The rest of it, of the generation that was begun."""
        same = replace(self, generation=start.generation, snapshot=None)
        if last is None:
            return same
        following = last.first + last.count
        if start.engine == "libsql":
            return replace(same, first_page=following)
        return replace(same, from_lsn=following)

    def params(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


class ColdScans:
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def frames(self, asked: ScanRequest) -> AsyncGenerator[Frame, None]:
        """The start, pages or records, and the end, which counts all of them. Raises ProblemError
        for what the service refuses or tells in the stream, ServiceUnreachable, StreamBroken.
        """
        seen, wanted, broken_count = _Seen(), asked, 0
        while True:
            before = seen.frames
            try:
                async with aclosing(self._one_stream(wanted)) as frames:
                    async for frame in frames:
                        if (passed := seen.pass_on(frame)) is not None:
                            yield passed
            except (httpx.TransportError, Damage, _Told) as error:
                broken_count = 1 if seen.frames > before else broken_count + 1
                self._raise_unless_passing(error, broken_count)
                await self._calls.back_off(attempt=broken_count)
            else:
                return
            if seen.start is not None:
                wanted = asked.behind(seen.start, seen.last)

    def _raise_unless_passing(self, error: Exception, broken_count: int) -> None:
        if isinstance(error, _Told) and error.status not in _PASSING:
            raise error
        if broken_count < self._calls.retry.attempts_max:
            return
        match error:
            case httpx.TransportError():
                raise self._calls.unreachable(error) from error
            case _Told():
                raise error
            case _:
                raise StreamBroken(f"The scan is broken: {error}.") from error

    async def _one_stream(self, wanted: ScanRequest) -> AsyncGenerator[Frame, None]:
        decoder = FrameDecoder()
        async with self._calls.stream("/cold-scan", params=wanted.params()) as response:
            async for piece in response.aiter_raw():
                for frame in decoder.feed(piece):
                    if frame.type is FrameType.ERROR:
                        raise _told(frame)
                    yield frame
        decoder.finish()


class _Seen:
    """What came so far, over all connections."""

    def __init__(self) -> None:
        self.start: ScanStart | None = None
        self.last: Frame | None = None
        self.frames = 0
        self._bytes = 0
        self._chunks = 0

    def pass_on(self, frame: Frame) -> Frame | None:
        """What the caller gets for it: one start, and an end that counts everything."""
        match frame.type:
            case FrameType.START:
                if self.start is not None:
                    return None
                self.start = frame.start()
            case FrameType.END:
                end = ScanEnd(frames=self.frames, bytes=self._bytes, chunks=self._chunks)
                return note_frame(FrameType.END, end)
            case _:
                self._add(frame)
        return frame

    def _add(self, frame: Frame) -> None:
        self._chunks += self.last is None or self.last.chunk_id != frame.chunk_id
        self._bytes += len(frame.payload)
        self.frames += 1
        self.last = replace(frame, payload=b"")


class _Told(ProblemError):
    """A problem that came as a frame: the answer had begun."""


def _told(frame: Frame) -> _Told:
    members = frame.problem()
    fixed = {name: members.pop(name, None) for name in ("code", "title", "detail", "status")}
    members.pop("type", None)
    return _Told(
        code=str(fixed["code"] or "unexpected_answer"),
        status=int(fixed["status"] or 0),
        title=str(fixed["title"] or ""),
        detail=str(fixed["detail"] or ""),
        extras=members,
    )
