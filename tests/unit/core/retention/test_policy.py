from hypothesis import given
from hypothesis import strategies as st

from app.core.retention.policy import RetentionRule, judge
from app.core.stores.manifest.records import GenerationRecord, Retention

SECOND = 1_000_000


def generation(number: int, superseded_at: int | None) -> GenerationRecord:
    return GenerationRecord(
        db_id=1, generation=number, checkpoint_id="c", first_lsn=1, last_lsn=number, page_count=1,
        committed_at_us=number, base_chunks=0, delta_chunks=0, bytes_uploaded=0, document_key="k",
        superseded_at_us=superseded_at,
    )  # fmt: skip


def history(*superseded: int) -> list[GenerationRecord]:
    """One generation for each second at which one was superseded, and the newest."""
    found = [generation(one + 1, at * SECOND) for one, at in enumerate(superseded)]
    return [*found, generation(len(superseded) + 1, None)]


def kept(records: list[GenerationRecord], *, now: int, pinned=(), **retention) -> list[int]:
    rule = RetentionRule(
        retention=Retention(**retention), newest=records[-1].generation, pinned=pinned,
        now_us=now * SECOND,
    )  # fmt: skip
    judgement = judge(records, rule)
    assert sorted([*judgement.kept, *judgement.expiring], key=lambda one: one.generation) == records
    return [one.generation for one in judgement.kept]


def test_either_rule_keeps_and_the_minimum_always_does() -> None:
    records = history(10, 20, 30, 40)
    off = {"keep_generations": None, "keep_seconds": None}
    assert kept(records, now=1000, **off) == [4, 5]
    assert kept(records, now=1000, **off, minimum_generations=1) == [5]
    assert kept(records, now=1000, keep_generations=3, keep_seconds=None) == [3, 4, 5]
    assert kept(records, now=45, keep_seconds=20, minimum_generations=1) == [3, 4, 5]
    assert kept(records, now=45, keep_seconds=20, keep_generations=4) == [2, 3, 4, 5]
    assert kept(records, now=1000, **off, pinned={1}, minimum_generations=1) == [1, 5]


def test_the_window_counts_from_the_end_of_a_generation() -> None:
    records = history(100)
    rule = {"keep_seconds": 5, "minimum_generations": 1}
    assert kept(records, now=104, **rule) == [1, 2]  # made long ago, but the state until just now
    assert kept(records, now=105, **rule) == [2]


def test_one_of_which_no_end_is_known_stays() -> None:
    records = [generation(1, None), generation(2, SECOND), generation(3, None)]
    off = {"keep_generations": None, "keep_seconds": None, "minimum_generations": 1}
    assert kept(records, now=1000, **off) == [1, 3]


def test_a_fork_counts_from_its_first_generation() -> None:
    records = [generation(7, SECOND), generation(8, None)]
    assert kept(records, now=99, keep_generations=2, keep_seconds=None) == [7, 8]


@given(
    gaps=st.lists(st.integers(0, 50), max_size=12),
    now=st.integers(0, 700),
    keep_generations=st.none() | st.integers(1, 8),
    keep_seconds=st.none() | st.integers(0, 300),
    minimum=st.integers(1, 5),
    pinned=st.sets(st.integers(1, 13)),
)
def test_against_the_rule_said_plainly(gaps, now, keep_generations, keep_seconds, minimum, pinned):
    ends = [sum(gaps[: one + 1]) for one in range(len(gaps))]
    records = history(*ends)
    found = kept(
        records, now=now, pinned=pinned, keep_generations=keep_generations,
        keep_seconds=keep_seconds, minimum_generations=minimum,
    )  # fmt: skip
    newest_first = [one.generation for one in reversed(records)]
    expected = set(newest_first[:minimum]) | (pinned & set(newest_first))
    expected |= set(newest_first[: keep_generations or 0])
    if keep_seconds is not None:
        expected |= {one + 1 for one, end in enumerate(ends) if now - end < keep_seconds}
    assert set(found) == expected
    assert records[-1].generation in found
