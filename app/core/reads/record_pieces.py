"""From a window's bytes to what a reader is sent: pure, called in the pool.

Payloads of whole entries pass through as they were stored; only the first and the last are cut.
"""

from enum import Enum

from app.core.base.errors import NotLineRecords
from app.core.formats.damage import Damage
from app.core.formats.entry_scan import EntryPlace, scan_record_entries
from app.core.formats.record_framing import (
    LENGTH_BYTES,
    is_line_safe,
    record_spans,
    slice_records,
    to_lines,
)
from app.core.formats.segment import EntryFlag
from app.core.reads.log_layout import LogLayout, Window

_LINE_SAFE = int(EntryFlag.LINE_SAFE)  # enum arithmetic would cost more than the rest of a check


class RecordForm(Enum):
    FRAMED = "framed"  # u32 length and bytes
    LINES = "lines"  # each followed by a newline
    CHECKED = "checked"  # nothing; only whether they could be lines


def render_records(
    layout: LogLayout,
    window: Window,
    data: bytes,
    *,
    first_lsn: int,
    last_lsn: int,
    form: RecordForm,
) -> bytes:
    """The records of [first_lsn, last_lsn] that are in the window, all of whose entries are
    checked: their checksums, their LSNs, and that none is missing. Raises Damage, NotLineRecords.
    """
    parts: list[bytes | memoryview] = []
    lsn, records = window.first_lsn, 0
    for run in layout.runs(window, data):
        places = scan_record_entries(run, first_lsn=lsn)
        if not places:
            continue
        lsn = places[-1].first_lsn + places[-1].records
        if form is not RecordForm.FRAMED:
            _check_lines(run, places, first_lsn=first_lsn, last_lsn=last_lsn)
        if form is not RecordForm.CHECKED:
            if places[0].first_lsn >= first_lsn and lsn - 1 <= last_lsn:
                parts.extend([run[place.start : place.end] for place in places])
            else:
                parts.extend(
                    [_cut(run, place, first_lsn=first_lsn, last_lsn=last_lsn) for place in places]
                )
            shown = min(lsn - 1, last_lsn) - max(places[0].first_lsn, first_lsn) + 1
            records += max(shown, 0)
    if lsn != window.last_lsn + 1:
        raise Damage(f"the log misses LSN {lsn}")
    framed = b"".join(parts)
    if form is not RecordForm.LINES:
        return framed
    lines = to_lines(framed)
    if len(lines) != len(framed) - records * (LENGTH_BYTES - 1):
        raise Damage(f"the entries do not hold the {records} records they say")
    return lines


def _cut(run: memoryview, place: EntryPlace, *, first_lsn: int, last_lsn: int) -> memoryview:
    """An entry's framed records that are in the range; empty if none is."""
    payload = run[place.start : place.end]
    skip = max(first_lsn - place.first_lsn, 0)
    stop = min(last_lsn + 1 - place.first_lsn, place.records)
    if skip == 0 and stop == place.records:
        return payload
    if stop <= skip:
        return payload[:0]
    return memoryview(slice_records(payload, skip=skip, take=stop - skip))


def _check_lines(
    run: memoryview, places: list[EntryPlace], *, first_lsn: int, last_lsn: int
) -> None:
    for place in places:
        if place.flags & _LINE_SAFE:
            continue
        payload = bytes(_cut(run, place, first_lsn=first_lsn, last_lsn=last_lsn))
        if is_line_safe(payload):
            continue
        spans = record_spans(payload)
        number = next(
            index for index, (start, end) in enumerate(spans) if b"\n" in payload[start:end]
        )
        lsn = max(place.first_lsn, first_lsn) + number
        raise NotLineRecords(f"The record of LSN {lsn} holds a newline.", lsn=lsn)
