"""Cold scans as a client without any cleverness reads them."""

from typing import Any

import httpx

from app.core.formats.cold_scan import MEDIA_TYPE, Frame, FrameDecoder, FrameType
from app.core.formats.record_framing import unpack_records


async def scan(
    client: httpx.AsyncClient, *, tenant: str = "acme", database: str = "app", **params: Any
) -> list[Frame]:
    """All frames, checked."""
    asked = {"tenant": tenant, "database": database, **params}
    decoder, frames = FrameDecoder(), []
    async with client.stream("GET", "/cold-scan", params=asked) as answer:
        if answer.status_code != 200:
            await answer.aread()
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == MEDIA_TYPE
        async for piece in answer.aiter_raw():
            frames += decoder.feed(piece)
    decoder.finish()
    return frames


def content(frames: list[Frame]) -> bytes:
    """The payloads of pages or records."""
    assert frames[-1].type is FrameType.END, frames[-1].problem()
    return b"".join(bytes(frame.payload) for frame in frames if frame.is_data)


def records(frames: list[Frame]) -> dict[int, bytes]:
    """By LSN."""
    found: dict[int, bytes] = {}
    for frame in frames:
        if frame.is_data:
            bodies = unpack_records(frame.payload)
            assert len(bodies) == frame.count
            found.update(zip(range(frame.first, frame.first + frame.count), bodies, strict=True))
    return found
