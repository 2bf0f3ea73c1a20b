"""What to do with a WAL body, from what is stored and the body's first bytes. Pure decisions.

Bytes that are stored already are recognised before anything else is asked, by the log's salts and
the offset; but for a log that is said to start from an image without a position. What a log is
known to continue is either the stored position of that very log, or, for a log from its start, the
client's word (`after_lsn`) or an empty database.
"""

import struct
from dataclasses import dataclass

from app.core.formats.sqlite_wal import (
    FRAME_HEADER_BYTES,
    WAL_HEADER_BYTES,
    WalPosition,
    is_frame_boundary,
    parse_wal_header,
)

HEAD_BYTES = WAL_HEADER_BYTES
"""How much of a body `decide_ingestion` wants to see, where the body has as much."""

_SALTS = struct.Struct(">8x2I")


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestionState:
    """What a database holds. `position` is in the log it follows, None after an image without."""

    page_size: int
    last_lsn: int | None  # None: nothing was ever stored
    position: WalPosition | None = None
    replaced_logs: tuple[WalPosition, ...] = ()  # where recent older logs were left


@dataclass(frozen=True, slots=True, kw_only=True)
class WalRequest:
    offset: int
    head: bytes  # the body's first HEAD_BYTES, or all of it
    after_lsn: int | None = None
    body_bytes: int | None = None  # None while unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptFrom:
    """Scan the body with `WalScanner(position, skip_bytes=…, must_continue=…)`."""

    position: WalPosition
    skip_bytes: int
    must_continue: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AlreadyStored:
    """All of the body is stored, up to where `position` says that its log is."""

    position: WalPosition


@dataclass(frozen=True, slots=True, kw_only=True)
class NothingWhole:
    """The body is cut off before its first header ends: left for the next call."""

    offset: int
    position: WalPosition | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WalGap:
    """The body continues nothing that is stored; `position` is where to resume, if anywhere."""

    last_lsn: int | None
    position: WalPosition | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PageSizeMismatch:
    stored: int
    sent: int


Ingestion = AcceptFrom | AlreadyStored | NothingWhole | WalGap | PageSizeMismatch


def decide_ingestion(state: IngestionState, request: WalRequest) -> Ingestion:
    """Raises Damage where a body at offset 0 does not begin with a WAL header."""
    if request.offset == 0:
        return _decide_from_start(state, request)
    return _decide_from_frame(state, request)


def wal_gap(state: IngestionState) -> WalGap:
    """Also the answer where the scanner found a gap."""
    return WalGap(last_lsn=state.last_lsn, position=state.position)


def _decide_from_start(state: IngestionState, request: WalRequest) -> Ingestion:
    if len(request.head) < WAL_HEADER_BYTES:
        return NothingWhole(offset=0, position=state.position)
    log = parse_wal_header(request.head)
    if log.page_size != state.page_size:
        return PageSizeMismatch(stored=state.page_size, sent=log.page_size)
    if state.last_lsn is None:
        starts_here = request.after_lsn in (None, 0)
    else:
        starts_here = request.after_lsn == state.last_lsn
    # Behind an image without a position, what was stored of a log before it is no repetition: the
    # client names the image's own LSN, and only the whole log makes its content whole whichever of
    # the log's states the image was.
    if not (starts_here and state.position is None):
        known = _recognise(state, request, log.salts)
        if known is not None:
            return known
    if not starts_here:
        return wal_gap(state)
    return AcceptFrom(position=log, skip_bytes=WAL_HEADER_BYTES, must_continue=False)


def _decide_from_frame(state: IngestionState, request: WalRequest) -> Ingestion:
    at = state.position
    if len(request.head) < FRAME_HEADER_BYTES:
        if at is not None and request.offset == at.offset:
            return NothingWhole(offset=request.offset, position=at)
        return wal_gap(state)
    if not is_frame_boundary(request.offset, page_size=state.page_size):
        return wal_gap(state)
    salt1, salt2 = _SALTS.unpack_from(request.head)
    return _recognise(state, request, (salt1, salt2)) or wal_gap(state)


def _recognise(
    state: IngestionState, request: WalRequest, salts: tuple[int, int]
) -> Ingestion | None:
    """None where no stored log has these salts."""
    at = state.position
    if at is not None and at.salts == salts:
        if request.offset > at.offset:
            return wal_gap(state)
        if _ends_before(request, at.offset):
            return AlreadyStored(position=at)
        skip_bytes = at.offset - request.offset
        # what follows stored frames is judged by the last of those, which the scanner compares
        return AcceptFrom(position=at, skip_bytes=skip_bytes, must_continue=skip_bytes == 0)
    for log in state.replaced_logs:
        if log.salts == salts:
            stored = _ends_before(request, log.offset + 1)
            return AlreadyStored(position=log) if stored else wal_gap(state)
    return None


def _ends_before(request: WalRequest, offset: int) -> bool:
    return request.body_bytes is not None and request.offset + request.body_bytes < offset
