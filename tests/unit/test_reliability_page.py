"""`docs/reliability.md` says nothing that the code does not have."""

import re
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.registry import functions_in
from tests.mutants.catalogue import MUTANTS

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "reliability.md").read_text(encoding="utf-8")
ROWS = 55
COLUMNS = 6
STARRED = range(1, 7)
"""The faults that the plan names."""


def rows() -> dict[str, list[str]]:
    """The fault table: each row's first cell to all of its cells."""
    found: dict[str, list[str]] = {}
    for line in PAGE.splitlines():
        if re.match(r"\| \d+★? \|", line):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert cells[0] not in found, f"row {cells[0]} is there twice"
            found[cells[0]] = cells
    return found


def named_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@cache
def functions_of(path: str) -> frozenset[str]:
    return frozenset(functions_in(REPOSITORY / path))


def assert_exists(test: str) -> None:
    path, _, name = test.partition("::")
    assert (REPOSITORY / path).is_file(), test
    assert name.startswith("test_"), test
    assert name in functions_of(path), test


def test_every_row_is_there_once_and_in_order() -> None:
    expected = [f"{row}★" if row in STARRED else str(row) for row in range(1, ROWS + 1)]
    assert list(rows()) == expected
    assert {len(cells) for cells in rows().values()} == {COLUMNS}
    assert all(all(cells) for cells in rows().values())


@pytest.mark.parametrize("row", rows())
def test_what_a_row_names_exists(row: str) -> None:
    tests, seen_to_fail_by = map(named_in, rows()[row][-2:])
    assert tests
    assert seen_to_fail_by
    for test in tests:
        assert_exists(test)
    mutants = {mutant.name for mutant in MUTANTS}
    for name in seen_to_fail_by:
        if name not in mutants:
            assert_exists(name)


def test_every_invariant_has_a_promise() -> None:
    assert re.findall(r"^\| (I\d+) \|", PAGE, re.MULTILINE) == [f"I{n}" for n in range(1, 18)]


def test_every_mutant_has_its_place() -> None:
    named = {name for cells in rows().values() for name in named_in(cells[-1])}
    assert {mutant.name for mutant in MUTANTS} - named == set()


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (REPOSITORY / "docs" / target).is_file(), target
