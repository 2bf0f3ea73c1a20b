"""The checker: good histories pass, each known-bad one does not."""

import itertools
import random
from math import inf

import pytest

from tests.helpers.linearizability import Attempt, NotLinearizable, Told, check_history


def ok(began, ended, first, *payloads, expected=None):
    return Attempt(
        payloads=payloads, began=began, ended=ended, expected=expected, outcome="ok",
        first_lsn=first,
    )  # fmt: skip


def log(*payloads, start=1):
    return list(enumerate(payloads, start=start))


def test_overlapping_appends_may_come_in_any_order():
    first, second = ok(1, 4, 3, b"a"), ok(2, 3, 1, b"b", b"c")
    assert check_history([first, second], [], log(b"b", b"c", b"a")) == 2


def test_an_unknown_append_is_there_or_not():
    unknown = Attempt(payloads=(b"x",), began=1)
    assert check_history([unknown, ok(2, 3, 1, b"a")], [], log(b"a")) == 1
    assert check_history([unknown, ok(2, 3, 1, b"a")], [], log(b"a", b"x")) == 2
    assert check_history([unknown, ok(2, 3, 2, b"a")], [], log(b"x", b"a")) == 2


def test_what_was_told_fits_between():
    history = [ok(1, 2, 1, b"a"), ok(5, 6, 2, b"b")]
    told = [Told(began=3, ended=4, next_lsn=2), Told(began=1, ended=7, next_lsn=3)]
    check_history(history, [*told, Told(began=0, ended=1, next_lsn=1)], log(b"a", b"b"))


KNOWN_BAD = {
    "lost": ([ok(1, 2, 1, b"a"), ok(3, 4, 2, b"b")], [], log(b"a")),
    "elsewhere": ([ok(1, 2, 1, b"a"), ok(1, 2, 2, b"b")], [], log(b"b", b"a")),
    "doubled": ([ok(1, 2, 1, b"a")], [], log(b"a", b"a")),
    "torn": ([ok(1, 2, 1, b"a", b"b")], [], log(b"a")),
    "mixed": ([ok(1, 9, 1, b"a", b"c"), ok(1, 9, 2, b"b")], [], log(b"a", b"b", b"c")),
    "foreign": ([], [], log(b"a")),
    "hole": ([ok(1, 2, 1, b"a"), ok(3, 4, 3, b"b")], [], [(1, b"a"), (3, b"b")]),
    "refused and kept": (
        [Attempt(payloads=(b"a",), began=1, ended=2, outcome="refused")], [], log(b"a"),
    ),
    "against its If-Match": (
        [ok(1, 2, 1, b"a"), ok(3, 4, 2, b"b", expected=1)], [], log(b"a", b"b"),
    ),
    "order of real time": ([ok(1, 2, 2, b"a"), ok(3, 4, 1, b"b")], [], log(b"b", b"a")),
    "unknown behind its end": (
        [Attempt(payloads=(b"x",), began=1, ended=2), ok(3, 4, 1, b"a")], [], log(b"a", b"x"),
    ),
    "told what never was": (
        [ok(1, 2, 1, b"a", b"b")], [Told(began=1, ended=2, next_lsn=2)], log(b"a", b"b"),
    ),
    "told too early": (
        [ok(5, 6, 1, b"a")], [Told(began=1, ended=2, next_lsn=2)], log(b"a"),
    ),
    "told too late": (
        [ok(1, 2, 1, b"a")], [Told(began=3, ended=4, next_lsn=1)], log(b"a"),
    ),
    "told backwards": (
        [ok(1, 20, 1, b"a")],
        [Told(began=2, ended=3, next_lsn=2), Told(began=4, ended=5, next_lsn=1)],
        log(b"a"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN_BAD)
def test_known_bad_histories(name):
    with pytest.raises(NotLinearizable):
        check_history(*KNOWN_BAD[name])


def _by_search(attempts, told, found):
    """Whether some order of all that took effect, each within its call, explains the history."""
    events = [one for one in attempts if one.payloads[0] in {data for _, data in found}]
    for order in itertools.permutations([*events, *told]):
        now, next_lsn = -inf, 1
        for one in order:
            now = max(now, one.began)
            if now > one.ended:
                break
            if isinstance(one, Told):
                if one.next_lsn != next_lsn:
                    break
                continue
            if one.expected not in {None, next_lsn} or one.first_lsn not in {None, next_lsn}:
                break
            if found[next_lsn - 1][1] != one.payloads[0]:
                break
            next_lsn += 1
        else:
            if next_lsn == len(found) + 1:
                return True
    return False


def test_agrees_with_a_search_over_all_orders():
    source, outcomes = random.Random(7), [0, 0]
    for _ in range(600):
        moments = [source.randrange(12) for _ in range(12)]
        attempts = [
            Attempt(
                payloads=(bytes([number]),), began=min(a, b), ended=max(a, b) + 0.5,
                expected=source.choice([None, None, 1, 2]), outcome="unknown",
            )
            for number, (a, b) in enumerate(zip(moments[:3], moments[3:6], strict=True))
        ]  # fmt: skip
        told = [
            Told(began=min(a, b) + 0.25, ended=max(a, b) + 0.75, next_lsn=source.randint(1, 4))
            for a, b in zip(moments[6:8], moments[8:10], strict=True)
        ]
        there = source.sample(range(3), source.randint(1, 3))
        found = log(*(bytes([number]) for number in there))
        try:
            check_history(attempts, told, found)
        except NotLinearizable:
            verdict = False
        else:
            verdict = True
        assert verdict == _by_search(attempts, told, found), (attempts, told, found)
        outcomes[verdict] += 1
    assert min(outcomes) > 50
