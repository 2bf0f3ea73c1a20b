import pytest

from app.core.base.errors import GenerationExpired, NoGeneration
from app.core.reads.image import generation_at, iter_image
from app.core.stores.manifest.records import GenerationRecord
from tests.helpers.paged import made_page, paged_database


def record(generation, committed, superseded=None):
    return GenerationRecord(
        db_id=7, generation=generation, checkpoint_id="c", first_lsn=1, last_lsn=generation,
        page_count=1, committed_at_us=committed, base_chunks=1, delta_chunks=0, bytes_uploaded=0,
        document_key="g", superseded_at_us=superseded,
    )  # fmt: skip


ALL = [record(1, 100, 200), record(2, 200, 300), record(3, 300)]


@pytest.mark.parametrize(
    ("at_us", "generation"), [(100, 1), (199, 1), (200, 2), (299, 2), (300, 3), (10**18, 3)]
)
def test_the_newest_committed_by_then(at_us, generation):
    assert generation_at(ALL, at_us).generation == generation


def test_an_older_one_is_no_answer_for_one_that_is_gone():
    assert generation_at([ALL[0], ALL[2]], 150).generation == 1
    with pytest.raises(GenerationExpired):
        generation_at([ALL[0], ALL[2]], 250)
    with pytest.raises(GenerationExpired):
        generation_at(ALL[1:], 150)


def test_nothing_was_published_by_then():
    for records in ([], ALL):
        with pytest.raises(NoGeneration):
            generation_at(records, 99)


async def test_any_range_is_what_slicing_gives(tmp_path):
    async with paged_database(tmp_path, window_bytes=2048) as db:
        await db.publish(rewrites={0: {n: made_page(n, 512) for n in range(1, 41)}})
        whole = db.expected()
        with await db.store.point(db.db_id) as point:
            for first in (0, 1, 511, 512, 513, 2047, 2048, 5000, len(whole)):
                for stop in (first, first + 1, first + 512, first + 4000, len(whole)):
                    if first <= stop <= len(whole):
                        pieces = [
                            bytes(piece)
                            async for piece in iter_image(db.store, point, first=first, stop=stop)
                        ]
                        assert b"".join(pieces) == whole[first:stop]
                        assert all(0 < len(piece) <= 2048 for piece in pieces)
