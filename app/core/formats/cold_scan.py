"""Byte layout of a cold scan's frames, and a decoder that believes nothing.

    "BOPF" · type u8 · 3 zero bytes · chunk u32 · first u64 · count u32 · payload bytes u32 ·
    CRC-64/NVME of the payload u64 · payload

All little-endian, back to back. A stream is START, then frames of PAGES or RECORDS in ascending
order, then END; ERROR may stand anywhere behind START and is the last. One that ends in another way
is broken. Service and client share this module.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

import msgspec

from app.core.formats.crc64 import crc64
from app.core.formats.damage import Damage

MEDIA_TYPE = "application/vnd.bop.cold-scan"
MAGIC = b"BOPF"
PAYLOAD_BYTES_MAX = (1 << 32) - 1

T = TypeVar("T")

_HEADER = struct.Struct("<4sB3sIQIIQ")
FRAME_HEADER_BYTES = _HEADER.size
_ZEROS = bytes(3)

assert FRAME_HEADER_BYTES == 36


class FrameType(IntEnum):
    START = 0
    PAGES = 1
    RECORDS = 2
    END = 3
    ERROR = 4


_DATA = frozenset({FrameType.PAGES, FrameType.RECORDS})


class ScanStart(msgspec.Struct, frozen=True, kw_only=True):
    """What is going to be scanned. `chunks` that the range touches."""

    tenant: str
    database: str
    engine: str
    generation: int
    page_size: int | None
    """None for append_only."""
    chunks: int


class ScanEnd(msgspec.Struct, frozen=True, kw_only=True):
    """What was sent: frames of pages or records, the bytes of their payloads, and their chunks."""

    frames: int
    bytes: int
    chunks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """`first` is a page number or an LSN; `count` pages or records follow from there."""

    type: FrameType
    chunk_id: int
    first: int
    count: int
    payload: bytes | memoryview

    @property
    def is_data(self) -> bool:
        return self.type in _DATA

    def header(self) -> bytes:
        """Goes before the payload."""
        return _HEADER.pack(
            MAGIC, self.type, _ZEROS, self.chunk_id, self.first, self.count, len(self.payload),
            crc64(self.payload),
        )  # fmt: skip

    def start(self) -> ScanStart:
        """Raises Damage."""
        return _decoded(_START, self.payload)

    def end(self) -> ScanEnd:
        """Raises Damage."""
        return _decoded(_END, self.payload)

    def problem(self) -> dict[str, Any]:
        """Raises Damage."""
        return _decoded(_PROBLEM, self.payload)


def note_frame(kind: FrameType, members: ScanStart | ScanEnd | dict[str, Any]) -> Frame:
    """A frame of JSON."""
    return Frame(
        type=kind, chunk_id=0, first=0, count=0, payload=msgspec.json.encode(members, enc_hook=str)
    )


class FrameDecoder:
    """Takes a stream in pieces as they arrive and gives its frames, each checked: its payload's
    CRC, that frames stand in order, and that the end says what was sent. Holds one frame.
    """

    def __init__(self, *, payload_bytes_max: int = PAYLOAD_BYTES_MAX) -> None:
        self._payload_bytes_max = payload_bytes_max
        self._pending = bytearray()
        self._started: ScanStart | None = None
        self._last: Frame | None = None
        self._frames = self._bytes = self._chunks = 0
        self.ended = False

    def feed(self, piece: bytes | memoryview) -> list[Frame]:
        """The frames that are whole now. Raises Damage."""
        pending = self._pending
        pending += piece
        frames: list[Frame] = []
        at = 0
        while len(pending) - at >= FRAME_HEADER_BYTES:
            if self.ended:
                break
            magic, code, zeros, chunk_id, first, count, payload_bytes, stored = _HEADER.unpack_from(
                pending, at
            )
            if magic != MAGIC or zeros != _ZEROS:
                raise Damage("not a frame of a cold scan")
            if payload_bytes > self._payload_bytes_max:
                raise Damage(f"a frame of {payload_bytes} bytes")
            start = at + FRAME_HEADER_BYTES
            if len(pending) - start < payload_bytes:
                break
            with memoryview(pending) as view:
                payload = bytes(view[start : start + payload_bytes])
            if crc64(payload) != stored:
                raise Damage("a frame fails its checksum")
            at = start + payload_bytes
            frame = Frame(
                type=_type(code), chunk_id=chunk_id, first=first, count=count, payload=payload
            )
            self._accept(frame)
            frames.append(frame)
        del pending[:at]
        if self.ended and pending:
            raise Damage("something follows the end of a scan")
        return frames

    def finish(self) -> None:
        """The stream has ended. Raises Damage unless its last frame was the end, or an error."""
        if not self.ended:
            raise Damage("a scan breaks off before its end")

    def _accept(self, frame: Frame) -> None:
        if self._started is None:
            if frame.type is not FrameType.START:
                raise Damage("a scan does not begin with its start")
            self._started = frame.start()
            return
        match frame.type:
            case FrameType.START:
                raise Damage("a scan starts twice")
            case FrameType.END:
                sent = ScanEnd(frames=self._frames, bytes=self._bytes, chunks=self._chunks)
                if frame.end() != sent:
                    raise Damage("a scan's end does not fit what came before it")
                self.ended = True
            case FrameType.ERROR:
                self.ended = True
            case _:
                self._accept_data(frame, self._started)

    def _accept_data(self, frame: Frame, started: ScanStart) -> None:
        expected = FrameType.PAGES if started.engine == "libsql" else FrameType.RECORDS
        if frame.type is not expected or frame.count == 0:
            raise Damage(f"a frame that no scan of a {started.engine} database has")
        if frame.type is FrameType.PAGES and len(frame.payload) != frame.count * (
            started.page_size or 0
        ):
            raise Damage("a frame does not hold whole pages")
        last = self._last
        is_new_chunk = last is None or last.chunk_id != frame.chunk_id
        self._chunks += is_new_chunk
        if last is not None:
            following = last.first + last.count
            may_skip = is_new_chunk and frame.type is FrameType.RECORDS  # gaps of LSNs stay gaps
            follows = frame.first >= following if may_skip else frame.first == following
            if frame.chunk_id < last.chunk_id or not follows:
                raise Damage("frames of a scan stand out of order")
        self._last = Frame(
            type=frame.type, chunk_id=frame.chunk_id, first=frame.first, count=frame.count,
            payload=b"",
        )  # fmt: skip
        self._frames += 1
        self._bytes += len(frame.payload)


def _type(code: int) -> FrameType:
    try:
        return FrameType(code)
    except ValueError as error:
        raise Damage("a frame of an unknown type") from error


_START, _END = msgspec.json.Decoder(ScanStart), msgspec.json.Decoder(ScanEnd)
_PROBLEM = msgspec.json.Decoder(dict[str, Any])


def _decoded(decoder: msgspec.json.Decoder[T], payload: bytes | memoryview) -> T:
    try:
        return decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Damage(f"a frame does not hold what its type says: {error}") from error
