"""The load scenarios start: nobody runs them by the way, so a moved name would go unseen."""

import argparse

from benchmarks.load import soak
from benchmarks.load.__main__ import SCENARIOS, SMALL
from benchmarks.load.table import at_most, exactly, percentile


def test_each_scenario_takes_the_options_of_its_small_size():
    assert SCENARIOS.keys() == SMALL.keys()
    for name, module in SCENARIOS.items():
        parser = argparse.ArgumentParser(prog=name)
        module.add_options(parser)
        assert parser.parse_args(SMALL[name])
        assert module.TITLE


def test_targets():
    assert percentile([], 99) == 0
    assert percentile([4.0], 99) == 4
    assert percentile([float(n) for n in range(101)], 99) == 99
    assert (at_most("x", 2, 2).met, at_most("x", 2.1, 2).met) == (True, False)
    assert (exactly("x", 0).met, exactly("x", 1).met) == (True, False)


def test_a_soak_sees_what_grows():
    level = dict.fromkeys(soak.GROWTH, 100.0)
    assert all(figure.met for figure in soak.grown([level] * 40))
    assert all(figure.met for figure in soak.grown([dict.fromkeys(level, 0.0)] * 12 + [level] * 28))
    for what in soak.GROWTH:
        samples = [level | {what: 100.0 + 50 * number} for number in range(40)]
        missed = [figure.what for figure in soak.grown(samples) if not figure.met]
        assert missed == [what]
