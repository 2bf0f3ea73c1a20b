"""Which scenario reaches which failpoint. `test_failpoint_registry` holds this to the source."""

from tests.helpers.registry import failpoints_in

ELSEWHERE: dict[str, str] = {
    "wal.mid_link": (
        "tests/integration/test_first_image.py::test_a_crash_leaves_all_of_it_or_nothing"
    ),
    "coalesce.after_fetch": (
        "tests/integration/test_coalescing.py::test_kill_while_chunks_are_merged"
    ),
    "coalesce.mid_write": (
        "tests/integration/test_coalescing.py::test_kill_while_chunks_are_merged"
    ),
    "stage.mid_write": (
        "tests/fault/test_scratch_crash.py::test_a_file_cut_short_by_a_crash_never_takes_its_name"
    ),
    **dict.fromkeys(
        ("truncate.before_plan", "truncate.before_commit", "truncate.after_commit"),
        "tests/fault/test_truncation_faults.py::test_kill_at_each_step_of_a_truncation",
    ),
    **dict.fromkeys(
        sorted(name for name in failpoints_in() if name.startswith("collect.")),
        "tests/fault/test_collection_crash.py::test_kill_at_each_step_of_deletion_and_collection",
    ),
    **dict.fromkeys(
        ("truncate.before_wait", "truncate.after_cancel"),
        "tests/fault/test_truncation_faults.py"
        "::test_kill_at_each_step_of_a_truncation_against_a_checkpoint",
    ),
    **dict.fromkeys(
        (
            "snapshot.before_document",
            "snapshot.after_document",
            "fork.before_document",
            "fork.after_document",
        ),
        "tests/fault/test_history_crash.py::test_killed_between_the_commit_and_the_bucket",
    ),
    "verify.after_record": (
        "tests/integration/test_verification.py::test_a_verification_goes_on_after_a_crash"
    ),
    "verify.before_repair": (
        "tests/integration/test_verification.py::test_a_verification_goes_on_after_a_crash"
    ),
    "download.mid_blob": (
        "tests/integration/test_verification.py::test_a_download_goes_on_after_a_crash"
    ),
}
"""Failpoints off the standard workload's way, each with the test (`path::name`) that goes there."""

STANDARD = sorted(failpoints_in().keys() - ELSEWHERE.keys())
"""`test_crash_points` kills at each of these."""
