"""Which rows of a chunk nothing needs any more, with plain values."""

import pytest

from app.core.retention.reachability import Readable, removal, unneeded
from app.core.stores.manifest.lineage import ChunkRows
from app.core.stores.manifest.ops import DeleteChunk, DeleteChunkDelta
from tests.unit.core.stores.manifest.builders import chunk, delta

# Valid in [1, 4), in [2, 4), and from 4 on.
OLD = chunk(1, 5, 1, superseded_at=4)
OVER_OLD = delta(1, 5, 2, superseded_at=4)
NEW = chunk(1, 5, 4)
ROWS = ChunkRows(bases=(OLD, NEW), deltas=(OVER_OLD,))


def gone(*generations: int, newest: int | None = 4, rows: ChunkRows = ROWS, **how) -> list:
    return unneeded(rows, Readable(generations=generations, newest=newest, **how))


@pytest.mark.parametrize(
    ("generations", "expected"),
    [
        ((1, 2, 3, 4), []),
        ((2, 4), []),
        ((3, 4), []),  # nobody made it at 3, it is valid there all the same
        ((1, 4), [OVER_OLD]),
        ((4,), [OVER_OLD, OLD]),
        ((), [OVER_OLD, OLD]),  # what nothing superseded is the newest state
    ],
)
def test_a_row_stays_while_a_readable_generation_shows_it(generations, expected):
    assert gone(*generations) == expected


def test_of_a_deleted_database_everything_goes_that_nobody_reads():
    assert gone(newest=None) == [OVER_OLD, OLD, NEW], "deltas before bases"
    assert gone(3, newest=None) == [NEW]
    assert gone(9, newest=None) == [OVER_OLD, OLD], "a reader of the last state holds it"


def test_what_a_fork_falls_through_to_stays():
    assert gone(4, is_inherited=lambda row: row is OLD) == [OVER_OLD]


def test_a_base_stays_while_a_needed_delta_is_encoded_against_it():
    assert OLD.blob is not None
    over_new = delta(1, 5, 5, base_key=OLD.blob.key)
    rows = ChunkRows(bases=(OLD, NEW), deltas=(OVER_OLD, over_new))
    assert gone(5, newest=5, rows=rows) == [OVER_OLD]
    assert gone(newest=None, rows=rows) == [OVER_OLD, over_new, OLD, NEW]


def test_a_drop_that_is_over_goes():
    drop = chunk(1, 5, 2, blob=None, superseded_at=4)
    rows = ChunkRows(bases=(drop, NEW), deltas=(delta(1, 5, 4, base_key=""),))
    assert gone(4, rows=rows) == [drop]


def test_each_kind_of_row_is_removed_by_its_own_op():
    assert removal(NEW) == DeleteChunk(db_id=1, chunk_id=5, generation=4)
    assert removal(OVER_OLD) == DeleteChunkDelta(db_id=1, chunk_id=5, generation=2)
