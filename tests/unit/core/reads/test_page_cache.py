from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.base.errors import InvariantViolation
from app.core.reads.page_cache import (
    ENTRY_BYTES,
    CheckpointScope,
    FetchOptions,
    PageCache,
    PageKey,
)

PAGE = 512
COST = PAGE + ENTRY_BYTES


def key(page_no, blob=b"a"):
    return PageKey(blob * 32, page_no)


def cache_of(pages):
    return PageCache(limit_bytes=pages * COST)


class Watcher:
    def __init__(self):
        self.told = []

    def on_checkpoint_start(self, scope):
        self.told.append(("start", scope))

    def on_checkpoint_end(self, scope, *, generation):
        self.told.append(("end", scope, generation))

    def on_evict(self, key, *, page_bytes):
        self.told.append(("evict", key.page_no, page_bytes))


def test_the_least_recently_used_goes_first_and_observers_are_told():
    cache, watcher = cache_of(3), Watcher()
    cache.subscribe(watcher)
    for number in (1, 2, 3):
        assert cache.put(key(number), bytes([number]) * PAGE)
    assert cache.get(key(1)) == b"\x01" * PAGE
    assert cache.put(key(4), bytes(PAGE))
    assert [number for number in range(1, 5) if key(number) in cache] == [1, 3, 4]
    assert watcher.told == [("evict", 2, PAGE)]
    cache.unsubscribe(watcher)
    cache.put(key(5), bytes(PAGE))
    assert len(watcher.told) == 1


def test_pages_of_different_blobs_are_different_pages():
    cache = cache_of(3)
    cache.put(key(1, b"a"), b"a" * PAGE)
    cache.put(key(1, b"b"), b"b" * PAGE)
    assert cache.get(key(1, b"a")) == b"a" * PAGE
    assert cache.get(key(1, b"b")) == b"b" * PAGE


def test_a_pinned_page_stays_until_its_last_pin_goes():
    cache = cache_of(2)
    cache.put(key(1), bytes(PAGE))
    assert cache.pin(key(1))
    assert cache.pin(key(1))
    assert not cache.pin(key(2))
    for number in range(2, 9):
        assert cache.put(key(number), bytes(PAGE))
    assert key(1) in cache
    cache.unpin(key(1))
    cache.put(key(9), bytes(PAGE))
    assert key(1) in cache
    cache.unpin(key(1))
    cache.put(key(10), bytes(PAGE))
    cache.put(key(11), bytes(PAGE))
    assert key(1) not in cache


def test_nothing_is_evicted_for_what_would_not_fit_beside_the_pins():
    cache = cache_of(2)
    cache.put(key(1), bytes(PAGE))
    cache.pin(key(1))
    cache.put(key(2), bytes(PAGE))
    assert not cache.put(key(3), bytes(2 * PAGE))
    assert key(2) in cache
    assert not PageCache(limit_bytes=0).put(key(1), bytes(PAGE))


def test_a_lower_limit_evicts_as_far_as_pins_allow():
    cache = cache_of(4)
    for number in range(1, 5):
        cache.put(key(number), bytes(PAGE))
    cache.pin(key(1))
    cache.pin(key(2))
    cache.set_limit(COST)
    assert len(cache) == 2
    assert cache.stats().used_bytes == 2 * COST
    assert not cache.put(key(5), bytes(PAGE))
    cache.unpin(key(1))
    assert key(1) not in cache, "what is above the limit goes as soon as it may"
    assert cache.stats().used_bytes == COST


def test_checkpoints_are_told():
    cache, watcher = cache_of(1), Watcher()
    cache.subscribe(watcher)
    scope = CheckpointScope(db_id=7, chunk_ids=(1, 2))
    cache.checkpoint_started(scope)
    cache.checkpoint_ended(scope, generation=3)
    cache.checkpoint_ended(scope, generation=None)
    assert watcher.told == [("start", scope), ("end", scope, 3), ("end", scope, None)]
    assert list(cache.observers) == [watcher]


def test_a_read_cannot_pin_in_a_cache_that_it_bypasses():
    with pytest.raises(InvariantViolation):
        FetchOptions(pin=True, bypass=True)


class Model:
    """What the cache should hold, said the slow way."""

    def __init__(self, limit):
        self.limit = limit
        self.pages = OrderedDict()
        self.pins = {}

    def used(self):
        return sum(len(data) + ENTRY_BYTES for data in self.pages.values())

    def pinned(self):
        return sum(len(self.pages[one]) + ENTRY_BYTES for one in self.pins)

    def shrink(self, size):
        for victim in [one for one in self.pages if one not in self.pins]:
            if self.used() + size <= self.limit:
                break
            del self.pages[victim]

    def touch(self, one):
        if one in self.pages and one not in self.pins:
            self.pages.move_to_end(one)

    def get(self, one):
        self.touch(one)
        return self.pages.get(one)

    def put(self, one, data):
        if one in self.pages:
            self.touch(one)
            return True
        size = len(data) + ENTRY_BYTES
        if self.pinned() + size > self.limit:
            return False
        self.shrink(size)
        self.pages[one] = data
        return True

    def pin(self, one):
        if one not in self.pages:
            return False
        self.pins[one] = self.pins.get(one, 0) + 1
        return True

    def unpin(self, one):
        self.pins[one] -= 1
        if not self.pins[one]:
            del self.pins[one]
            self.pages.move_to_end(one)
            self.shrink(0)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("get"), st.integers(1, 8)),
        st.tuples(st.just("put"), st.integers(1, 8), st.integers(1, 4)),
        st.tuples(st.just("pin"), st.integers(1, 8)),
        st.tuples(st.just("unpin"), st.integers(1, 8)),
        st.tuples(st.just("limit"), st.integers(0, 6)),
    ),
    max_size=60,
)


@given(STEPS)
def test_against_a_model(steps):
    cache, model = cache_of(4), Model(4 * COST)
    hits = misses = 0
    for step, number, *rest in steps:
        one = key(number)
        match step:
            case "get":
                found = cache.get(one)
                assert found == model.get(one)
                hits, misses = hits + (found is not None), misses + (found is None)
            case "put":
                data = bytes([number]) * (rest[0] * 256)
                assert cache.put(one, data) == model.put(one, data)
            case "pin":
                assert cache.pin(one) == model.pin(one)
            case "unpin":
                if one in model.pins:
                    cache.unpin(one)
                    model.unpin(one)
            case "limit":
                model.limit = number * COST
                model.shrink(0)
                cache.set_limit(number * COST)
        stats = cache.stats()
        assert {n for n in range(1, 9) if key(n) in cache} == {k.page_no for k in model.pages}
        assert stats.used_bytes == model.used()
        assert stats.used_bytes <= max(model.limit, model.pinned())
        assert (stats.hits, stats.misses, stats.entries) == (hits, misses, len(model.pages))
        assert stats.pinned == len(model.pins)
