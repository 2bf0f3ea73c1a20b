"""Each planted mutant dies of the test that is aimed at it; without it that test is green in its
own suite.
"""

import pytest

from tests.helpers.registry import functions_in
from tests.mutants.catalogue import MUTANTS, Mutant
from tests.mutants.runner import REPOSITORY, verdict_of


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_dies(mutant: Mutant) -> None:
    verdict = verdict_of(mutant)
    if verdict.skipped:
        pytest.skip(f"{mutant.test} is skipped here")
    assert verdict.problem is None, verdict.problem


def test_names_are_unique() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_each_is_aimed_at_one_test() -> None:
    for mutant in MUTANTS:
        path, _, name = mutant.test.partition("::")
        assert name.partition("[")[0] in functions_in(REPOSITORY / path), mutant.test
