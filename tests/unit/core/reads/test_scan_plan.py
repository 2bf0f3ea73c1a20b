import itertools

import pytest

from app.core.base.errors import LsnTruncated
from app.core.reads.scan_plan import ScanRange, plan_pages, plan_records
from app.core.stores.manifest.records import BlobRef, ChunkRecord

PER_CHUNK = 4


@pytest.mark.parametrize("page_count", [0, 1, 4, 5, 11])
def test_any_range_of_pages_is_what_filtering_gives(page_count):
    bounds = (None, 1, 4, 5, 9, 11, 12)
    chunks = (None, 0, 1, 2, 3)
    for first, last, first_chunk, last_chunk in itertools.product(bounds, bounds, chunks, chunks):
        expected = [
            page
            for page in range(1, page_count + 1)
            if (first or 1) <= page <= (last or 99)
            and (first_chunk or 0) <= (page - 1) // PER_CHUNK
            and (last_chunk is None or (page - 1) // PER_CHUNK <= last_chunk)
        ]
        wanted = ScanRange(
            first_page=first, last_page=last, first_chunk=first_chunk, last_chunk=last_chunk
        )
        found = plan_pages(wanted, page_count=page_count, pages_per_chunk=PER_CHUNK)
        if not expected:
            assert found is None
        else:
            assert found is not None
            assert (found.first_page, found.last_page) == (expected[0], expected[-1])
            assert found.chunks == len({(page - 1) // PER_CHUNK for page in expected})


def row(chunk_id, first, last, *, visible_last=None, blob=True):
    return ChunkRecord(
        db_id=1, chunk_id=chunk_id, generation=1,
        blob=BlobRef(key="k", sha256=b"", crc64=0, bytes=1) if blob else None,
        first=first, last=last, visible_last=last if visible_last is None else visible_last,
    )  # fmt: skip


ROWS = [
    row(1, 11, 20), row(2, 21, 30, visible_last=25), row(4, 41, 50), row(5, 51, 60, blob=False),
    row(6, 61, 70, visible_last=60),
]  # fmt: skip


def planned(**bounds):
    return [
        (scan.row.chunk_id, scan.first_lsn, scan.last_lsn)
        for scan in plan_records(ScanRange(**bounds), ROWS)
    ]


def test_what_was_cut_off_or_dropped_is_not_scanned():
    assert planned() == [(1, 11, 20), (2, 21, 25), (4, 41, 50)]


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({"from_lsn": 15, "to_lsn": 44}, [(1, 15, 20), (2, 21, 25), (4, 41, 44)]),
        ({"from_lsn": 26, "to_lsn": 40}, []),
        ({"from_lsn": 99}, []),
        ({"to_lsn": 10}, []),
        ({"first_chunk": 2, "last_chunk": 3}, [(2, 21, 25)]),
        ({"first_chunk": 2, "from_lsn": 11}, [(2, 21, 25), (4, 41, 50)]),
    ],
)
def test_ranges_of_records(bounds, expected):
    assert planned(**bounds) == expected


def test_what_was_truncated_is_said():
    with pytest.raises(LsnTruncated) as refused:
        planned(from_lsn=10)
    assert refused.value.fields == {"first_lsn": 11}
