"""Every failpoint in the source is named by the rule and reached by a scenario."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.fault.scenarios import ELSEWHERE, STANDARD
from tests.helpers.registry import NAME, UnnamedFailpoint, failpoints_in, functions_in

REPOSITORY = Path(__file__).resolve().parents[2]


def test_names_follow_the_rule() -> None:
    wrong = {name: at for name, at in failpoints_in().items() if not NAME.fullmatch(name)}
    assert wrong == {}


def test_the_standard_workload_reaches_its_failpoints(standard_hits: Mapping[str, int]) -> None:
    assert set(STANDARD) - standard_hits.keys() == set()


def test_no_failpoint_is_called_that_the_source_does_not_show(
    standard_hits: Mapping[str, int],
) -> None:
    assert standard_hits.keys() - failpoints_in().keys() == set()


def test_other_scenarios_exist() -> None:
    assert ELSEWHERE.keys() - failpoints_in().keys() == set()
    for name, test in ELSEWHERE.items():
        path, _, function = test.partition("::")
        assert function in functions_in(REPOSITORY / path), test
        source = (REPOSITORY / path).read_text(encoding="utf-8")
        assert name in source, f"{test} does not speak of {name}"


def test_a_computed_name_is_refused(tmp_path: Path) -> None:
    app = tmp_path / "app"
    app.mkdir()
    (app / "good.py").write_text('failpoints.fp("wal.before_fsync")\nfp("wal.after_fsync")\n')
    assert failpoints_in(app) == {
        "wal.before_fsync": ["app/good.py:1"],
        "wal.after_fsync": ["app/good.py:2"],
    }
    (app / "bad.py").write_text('failpoints.fp(f"wal.{step}")\n')
    with pytest.raises(UnnamedFailpoint, match=r"app/bad\.py:1"):
        failpoints_in(app)
