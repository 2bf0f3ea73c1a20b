import numpy as np
import pytest

from app.core.base.errors import NotLineRecords
from app.core.formats.damage import Damage
from app.core.formats.record_framing import pack_records
from app.core.formats.segment import EntryFlag, EntryHeader, EntryType, pack_entry_header
from app.core.reads.log_layout import segment_layout
from app.core.reads.record_pieces import RecordForm, render_records


def entry(first_lsn, payload, *, count, flags=EntryFlag.LINE_SAFE, kind=EntryType.RECORDS):
    header = EntryHeader(
        type=kind, flags=flags, first_lsn=first_lsn, count=count, payload_bytes=len(payload),
        durable_lsn=0, appended_at_us=0,
    )  # fmt: skip
    return pack_entry_header(header, [payload]) + payload


def render(data, *, last_lsn, form=RecordForm.FRAMED, first=1, last=None, points=((1, 64),)):
    layout = segment_layout(
        np.array(points, dtype="<u8"), first_lsn=1, last_lsn=last_lsn, entries_end=64 + len(data)
    )
    (window,) = layout.windows(1, last_lsn, target_bytes=1 << 20)
    return render_records(
        layout, window, data, first_lsn=first, last_lsn=last or last_lsn, form=form
    )


ABC = entry(1, pack_records([b"a", b"b", b"c"]), count=3)
DE = entry(4, pack_records([b"d", b"e"]), count=2)


@pytest.mark.parametrize("first", range(1, 6))
@pytest.mark.parametrize("last", range(1, 6))
def test_first_and_last_entries_are_cut(first, last):
    records = [b"a", b"b", b"c", b"d", b"e"][first - 1 : last]
    framed = render(ABC + DE, last_lsn=5, first=first, last=last)
    lines = render(ABC + DE, last_lsn=5, first=first, last=last, form=RecordForm.LINES)
    assert framed == pack_records(records)
    assert lines == b"".join(record + b"\n" for record in records)
    assert render(ABC + DE, last_lsn=5, first=first, last=last, form=RecordForm.CHECKED) == b""


def test_entries_that_are_missing_at_the_end_are_noticed():
    with pytest.raises(Damage, match="misses LSN 4"):
        render(ABC, last_lsn=5)
    with pytest.raises(Damage):
        render(ABC + DE, last_lsn=4)


def test_entries_of_another_type_are_refused():
    with pytest.raises(Damage):
        render(entry(1, pack_records([b"a"]), count=1, kind=EntryType.FRAMES), last_lsn=1)


@pytest.mark.parametrize("count", [2, 4])
def test_an_entry_that_says_another_number_of_records(count):
    wrong = entry(1, pack_records([b"a", b"b", b"c"]), count=count)
    with pytest.raises(Damage):
        render(wrong, last_lsn=count, form=RecordForm.LINES)
    if count == 4:
        with pytest.raises(Damage):
            render(wrong, last_lsn=count, first=2)


def test_only_records_that_are_asked_for_need_be_lines():
    unsafe = entry(1, pack_records([b"a", b"b\n", b"c"]), count=3, flags=EntryFlag(0))
    for form in (RecordForm.LINES, RecordForm.CHECKED):
        with pytest.raises(NotLineRecords) as caught:
            render(unsafe, last_lsn=3, form=form)
        assert caught.value.fields["lsn"] == 2
        with pytest.raises(NotLineRecords) as caught:
            render(unsafe, last_lsn=3, form=form, first=2)
        assert caught.value.fields["lsn"] == 2
    assert render(unsafe, last_lsn=3, form=RecordForm.LINES, first=3) == b"c\n"
    assert render(unsafe, last_lsn=3, form=RecordForm.LINES, last=1) == b"a\n"
    assert render(unsafe, last_lsn=3) == pack_records([b"a", b"b\n", b"c"])
