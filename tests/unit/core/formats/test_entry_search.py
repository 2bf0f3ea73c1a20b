from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.formats.damage import Damage
from app.core.formats.entry_search import possible_entries
from app.core.formats.segment import (
    ENTRY_HEADER_BYTES,
    ENTRY_MAGIC,
    ENTRY_PAYLOAD_BYTES_MAX,
    EntryFlag,
    EntryHeader,
    EntryType,
    pack_entry_header,
    parse_entry_header,
)

HEAD = pack_entry_header(
    EntryHeader(
        type=EntryType.RECORDS, flags=EntryFlag.BEGINS, first_lsn=9, count=1, payload_bytes=0,
        durable_lsn=8, appended_at_us=1,
    ),
    (),
)  # fmt: skip


def changed(at: int, value: bytes) -> bytes:
    return HEAD[:at] + value + HEAD[at + len(value) :]


PARTS = [
    HEAD,
    HEAD[:-1],
    HEAD[:8],
    ENTRY_MAGIC,
    ENTRY_MAGIC[:3],
    changed(4, b"\x02"),
    changed(4, b"\x00"),
    changed(5, b"\x0f"),
    changed(5, b"\x10"),
    changed(6, b"\x02"),
    changed(16, bytes(4)),
    changed(20, ENTRY_PAYLOAD_BYTES_MAX.to_bytes(4, "little")),
    changed(20, (ENTRY_PAYLOAD_BYTES_MAX + 1).to_bytes(4, "little")),
    changed(8, b"\xff" * 8),
]


def one_by_one(data: bytes, stop: int) -> list[tuple[int, int, int, int]]:
    found = []
    for place in range(min(stop, len(data))):
        try:
            header, _ = parse_entry_header(data, offset=place)
        except Damage:
            continue
        found.append((place, header.first_lsn, header.payload_bytes, header.durable_lsn))
    return found


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(st.one_of(st.sampled_from(PARTS), st.binary(max_size=9)), max_size=12),
    left=st.integers(-5, 5),
)
def test_it_finds_what_parsing_at_every_place_would(parts: list[bytes], left: int):
    data = b"".join(parts)
    stop = len(data) // 2 + left * ENTRY_HEADER_BYTES // 2
    for limit in (stop, len(data)):
        places, heads = possible_entries(data, stop=limit)
        found = [
            (place, *row)
            for place, *row in zip(
                places.tolist(),
                heads["first_lsn"].tolist(),
                heads["payload_bytes"].tolist(),
                heads["durable_lsn"].tolist(),
                strict=True,
            )
        ]
        assert found == one_by_one(data, limit)
