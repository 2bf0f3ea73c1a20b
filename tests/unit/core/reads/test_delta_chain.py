import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap

from app.core.base.errors import InvariantViolation
from app.core.reads.delta_chain import NO_LAYER, BaseLayer, DeltaLayer, delta_chain
from app.core.stores.manifest.records import BlobRef, ChunkDeltaRecord, ChunkRecord


def blob(name):
    return BlobRef(key=name, sha256=name.encode().ljust(32), crc64=0, bytes=1)


def base(generation, *, first=1, last=100, until=None, dropped=False, visible_last=None):
    return ChunkRecord(
        db_id=7, chunk_id=0, generation=generation, first=first, last=last,
        blob=None if dropped else blob(f"base-{generation}"),
        visible_last=last if visible_last is None else visible_last, superseded_at=until,
    )  # fmt: skip


def delta(generation, pages, *, base_key="", until=None, delta_id=0):
    return ChunkDeltaRecord(
        db_id=7, chunk_id=0, generation=generation, delta_id=delta_id, base_key=base_key,
        blob=blob(f"delta-{generation}-{delta_id}"), pages=BitMap(pages).serialize(),
        superseded_at=until,
    )  # fmt: skip


def layer_name(chain, page_no):
    layer = chain.layer_of(page_no)
    return None if layer is None else layer.blob.key


def test_the_newest_page_wins():
    deltas = [delta(2, [1, 2, 3]), delta(3, [2, 3]), delta(4, [3])]
    chain = delta_chain(5, [base(1)], deltas, generation=4)
    assert chain.chunk_id == 5
    assert [layer_name(chain, page) for page in (1, 2, 3, 4, 100, 101)] == [
        "delta-2-0", "delta-3-0", "delta-4-0", "base-1", "base-1", None,
    ]  # fmt: skip


def test_rows_count_in_their_generations_only():
    """A merged delta supersedes its parts, a rewrite all of them; history reads as it was."""
    bases = [base(1, until=6), base(6, until=8), base(8, dropped=True)]
    deltas = [
        delta(2, [1], until=4), delta(3, [2], until=4), delta(4, [1, 2], until=6),
        delta(7, [5], until=8),
    ]  # fmt: skip
    at = {g: delta_chain(0, bases, deltas, generation=g) for g in range(9)}
    assert [len(at[g].layers) for g in range(9)] == [0, 1, 2, 3, 2, 2, 1, 2, 0]
    assert layer_name(at[3], 1) == "delta-2-0"
    assert layer_name(at[5], 1) == "delta-4-0"
    assert layer_name(at[7], 5) == "delta-7-0"
    assert layer_name(at[8], 1) is None


def test_a_delta_finds_the_base_it_is_encoded_against_even_if_that_is_superseded():
    bases = [base(1, until=3), base(3)]
    deltas = [delta(4, [1], base_key="base-1"), delta(5, [2])]
    chain = delta_chain(0, bases, deltas, generation=5)
    newest, older, own = chain.layers
    assert isinstance(newest, DeltaLayer)
    assert newest.encoded_against is None
    assert isinstance(older, DeltaLayer)
    assert isinstance(older.encoded_against, BaseLayer)
    assert older.encoded_against.blob.key == "base-1"
    assert older.encoded_against.row == bases[0]
    assert own.blob.key == "base-3"


def test_contradictions_are_bugs():
    with pytest.raises(InvariantViolation):
        delta_chain(0, [], [delta(1, [1], base_key="base-9")], generation=1)
    with pytest.raises(InvariantViolation):
        delta_chain(0, [base(1), base(2)], [], generation=2)


def test_of_one_generation_the_later_delta_wins():
    deltas = [delta(2, [1], delta_id=3), delta(2, [1, 2], delta_id=4), delta(2, [1], delta_id=2)]
    assert layer_name(delta_chain(0, [], deltas, generation=2), 1) == "delta-2-4"


def test_a_chain_says_what_it_takes_of_memory():
    pages = range(1, 20_000, 2)
    plain = delta_chain(0, [base(1)], [], generation=2).memory_bytes
    row = delta(2, pages)
    assert plain >= 1024
    assert delta_chain(0, [base(1)], [row], generation=2).memory_bytes - plain >= len(row.pages)


def test_a_base_shows_only_what_is_visible_of_it():
    chain = delta_chain(0, [base(1, first=11, last=20, visible_last=15)], [], generation=1)
    seen = chain.layers_of(1, 30)
    assert seen.dtype == np.int8, "a byte a page"
    assert np.flatnonzero(seen != NO_LAYER).tolist() == list(range(10, 15))


PAGES = st.sets(st.integers(1, 60))


@given(
    has_base=st.booleans(),
    last=st.integers(1, 60),
    sets=st.lists(PAGES, max_size=5),
    first=st.integers(1, 70),
    count=st.integers(0, 70),
)
def test_the_bulk_answer_is_the_single_one(has_base, last, sets, first, count):
    bases = [base(1, last=last)] if has_base else []
    deltas = [delta(number + 2, pages) for number, pages in enumerate(sets)]
    chain = delta_chain(0, bases, deltas[::-1], generation=9)
    numbers = chain.layers_of(first, count)
    assert len(numbers) == count
    for page, number in zip(range(first, first + count), numbers, strict=True):
        layer = chain.layer_of(page)
        assert layer is (None if number == NO_LAYER else chain.layers[number])
        names = [f"delta-{n + 2}-0" for n, pages in enumerate(sets) if page in pages]
        wanted = names[-1] if names else ("base-1" if has_base and page <= last else None)
        assert (layer and layer.blob.key) == wanted
