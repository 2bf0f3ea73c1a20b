"""Which scenario reaches which failpoint. `test_failpoint_registry` holds this to the source."""

from tests.helpers.registry import failpoints_in

ELSEWHERE: dict[str, str] = {
    "stage.mid_write": (
        "tests/fault/test_scratch_crash.py::test_a_file_cut_short_by_a_crash_never_takes_its_name"
    ),
}
"""Failpoints off the standard workload's way, each with the test (`path::name`) that goes there."""

STANDARD = sorted(failpoints_in().keys() - ELSEWHERE.keys())
"""`test_crash_points` kills at each of these."""
