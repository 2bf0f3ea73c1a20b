"""Finds what looks like an entry's header anywhere in some bytes, without a loop over the places.

Whoever writes records chooses those bytes: they may hold a header's first bytes everywhere, and
what they cost is bounded by the bytes, not by what they are.
"""

import numpy as np
import numpy.typing as npt

from app.core.formats.segment import (
    ENTRY_HEADER_BYTES,
    ENTRY_MAGIC,
    ENTRY_PAYLOAD_BYTES_MAX,
    VERSION,
    EntryType,
)

Places = npt.NDArray[np.intp]
Heads = npt.NDArray[np.void]

_HEAD = np.dtype(
    {
        "names": ["first_lsn", "count", "payload_bytes", "durable_lsn"],
        "formats": ["<u8", "<u4", "<u4", "<u8"],
        "offsets": [8, 16, 20, 24],
        "itemsize": ENTRY_HEADER_BYTES,
    }
)
_START = np.dtype([("magic", "S4"), ("type", "u1"), ("flags", "u1"), ("version", "<u2")])
_MAGIC = np.frombuffer(ENTRY_MAGIC, dtype="<u4")[0]
_TYPES = np.array([int(one) for one in EntryType], dtype=np.uint8)
_FLAGS_MAX = 15


def possible_entries(data: bytes, *, stop: int) -> tuple[Places, Heads]:
    """Where below `stop` in `data` lies what `parse_entry_header` would take, ascending, and its
    fields that matter: `first_lsn`, `count`, `payload_bytes`, `durable_lsn`.
    """
    stop = min(stop, len(data) - ENTRY_HEADER_BYTES + 1)
    if ENTRY_MAGIC not in data or stop <= 0:
        return np.zeros(0, dtype=np.intp), np.zeros(0, dtype=_HEAD)
    raw = np.frombuffer(data, dtype=np.uint8)
    places = _magics(data, stop)
    starts = _rows(raw, places, _START)
    fits = (
        (starts["version"] == VERSION)
        & np.isin(starts["type"], _TYPES)
        & (starts["flags"] <= _FLAGS_MAX)
    )
    places = places[fits]
    heads = _rows(raw, places, _HEAD)
    fits = (heads["count"] > 0) & (heads["payload_bytes"] <= ENTRY_PAYLOAD_BYTES_MAX)
    return places[fits], heads[fits]


def _magics(data: bytes, stop: int) -> Places:
    """At any alignment."""
    found = []
    for shift in range(min(4, stop)):
        words = np.frombuffer(data, dtype="<u4", count=(len(data) - shift) // 4, offset=shift)
        found.append(4 * np.flatnonzero(words == _MAGIC) + shift)
    places = np.concatenate(found)
    places.sort()
    return places[: int(np.searchsorted(places, stop))]


def _rows(raw: npt.NDArray[np.uint8], places: Places, row: np.dtype[np.void]) -> Heads:
    """The bytes at each place as one row; copied, for a field may lie at any alignment."""
    every = np.lib.stride_tricks.sliding_window_view(raw, row.itemsize)
    rows: Heads = every[places].view(row)[:, 0]
    return rows
