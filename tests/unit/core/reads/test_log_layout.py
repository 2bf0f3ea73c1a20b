import itertools
import random

import numpy as np
import pytest

from app.core.formats.damage import Damage
from app.core.reads.log_layout import WINDOW_BYTES, segment_layout
from tests.helpers.logs import build_segment

KIB = 1024


def layout_of(*points, last_lsn=100, entries_end=10_000, first_lsn=1):
    index = np.array(points, dtype="<u8").reshape(-1, 2)
    return segment_layout(index, first_lsn=first_lsn, last_lsn=last_lsn, entries_end=entries_end)


def shown(windows):
    return [(one.first_lsn, one.last_lsn) for one in windows]


def test_a_window_is_as_many_points_as_fit_and_at_least_one():
    layout = layout_of((1, 64), (11, 164), (21, 264), (31, 5_000), (41, 9_000))
    assert shown(layout.windows(1, 100, target_bytes=200)) == [
        (1, 20), (21, 30), (31, 40), (41, 100),
    ]  # fmt: skip
    assert shown(layout.windows(1, 100, target_bytes=100_000)) == [(1, 100)]
    assert shown(layout.windows(15, 25, target_bytes=1)) == [(11, 20), (21, 30)]
    assert shown(layout.windows(15, 25, target_bytes=100_000)) == [(11, 30)]
    assert shown(layout.windows(41, 41, target_bytes=1)) == [(41, 100)]


def test_stored_ranges_meet():
    layout = layout_of((1, 64), (11, 164), (21, 264))
    windows = list(layout.windows(1, 100, target_bytes=1))
    assert [layout.stored_range(one) for one in windows] == [(64, 100), (164, 100), (264, 9_736)]


def test_lsns_beyond_what_doubles_hold():
    far = 2**62
    layout = layout_of((far, 64), (far + 1, 164), (far + 3, 264), first_lsn=far, last_lsn=far + 5)
    assert shown(layout.windows(far + 1, far + 1, target_bytes=1)) == [(far + 1, far + 2)]
    assert shown(layout.windows(far + 2, far + 3, target_bytes=1)) == [
        (far + 1, far + 2), (far + 3, far + 5),
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_windows_tile_any_range_of_a_real_segment(tmp_path, seed):
    source = random.Random(seed)
    entries = [
        [b"x" * source.choice([10, 5_000, 90_000])] * source.randint(1, 30) for _ in range(40)
    ]
    segment = build_segment(tmp_path / "s", entries, first_lsn=50)
    layout = segment_layout(
        segment.index, first_lsn=50, last_lsn=segment.durable_last_lsn,
        entries_end=segment.entries_end,
    )  # fmt: skip
    for _ in range(20):
        first = source.randint(50, segment.durable_last_lsn)
        last = source.randint(first, segment.durable_last_lsn)
        windows = list(layout.windows(first, last))
        assert windows[0].first_lsn <= first
        assert windows[-1].last_lsn >= last
        for one, following in itertools.pairwise(windows):
            assert following.first_lsn == one.last_lsn + 1
            assert following.point == one.stop
        for one in windows:
            assert layout.stored_range(one)[1] <= WINDOW_BYTES or one.stop == one.point + 1


@pytest.mark.parametrize(
    "points",
    [
        [(1, 65)],  # not behind the segment header
        [(2, 64)],  # not at the first LSN
        [(1, 64), (1, 164)],
        [(1, 64), (9, 64)],
        [(1, 64), (101, 164)],  # beyond the last LSN
        [(1, 64), (9, 10_000)],  # beyond the entries
    ],
)
def test_an_index_that_cannot_be_right(points):
    with pytest.raises(Damage):
        layout_of(*points)


def test_a_segment_without_points_is_one_window():
    assert shown(layout_of().windows(3, 4)) == [(1, 100)]
