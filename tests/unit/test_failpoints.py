"""Failpoints: inert without their test-only package, exact with it."""

import errno
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers.failpoints import FAILPOINTS_PATH, Failpoints, failpoint_environment, read_trace
from tests.helpers.wait import wait_until

REPOSITORY = Path(__file__).resolve().parents[2]

HIT_TWICE = """
from app.core.base import failpoints
failpoints.fp("a.before_b"); print("once", flush=True)
failpoints.fp("a.before_b"); print("twice", flush=True)
"""


def run_hits(
    failpoints: Failpoints, *, installed: bool, trace: Path | None = None
) -> subprocess.CompletedProcess[str]:
    path = [str(REPOSITORY), *([str(FAILPOINTS_PATH)] if installed else [])]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(path)}
    return subprocess.run(
        [sys.executable, "-c", HIT_TWICE],
        env=environment | failpoint_environment(failpoints, trace=trace),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_environment_has_no_effect_without_the_test_package(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    done = run_hits({"a.before_b": {"action": "kill"}}, installed=False, trace=trace)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["once", "twice"], "")
    assert not trace.exists()


def test_kill_ends_the_process_at_the_nth_hit(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    done = run_hits({"a.before_b": {"action": "kill", "nth": 2}}, installed=True, trace=trace)
    assert (done.returncode, done.stdout.split()) == (-signal.SIGKILL, ["once"])
    assert read_trace(trace) == {"a.before_b": 2}


Arm = Callable[..., ModuleType]


@pytest.fixture
def arm(tmp_path: Path) -> Arm:
    """A private copy of the package, armed with rules, so that no test touches another."""
    spec = importlib.util.spec_from_file_location(
        "private_failpoints", FAILPOINTS_PATH / "bop_failpoints" / "__init__.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)

    def configure(rules: Failpoints, *, trace: Path | None = None) -> ModuleType:
        module.configure(failpoint_environment(rules, trace=trace))
        return module

    return configure


def fired(package: ModuleType, name: str, hits: int) -> list[int]:
    """Which of the hits raised, counted from 1."""
    found = []
    for count in range(1, hits + 1):
        try:
            package.hit(name)
        except package.FailpointRaised:
            found.append(count)
    return found


def test_errno_is_raised_as_the_kernel_would(arm: Arm) -> None:
    package = arm({"wal.before_fsync": {"action": "errno:ENOSPC"}})
    with pytest.raises(OSError, match=r"wal\.before_fsync") as caught:
        package.hit("wal.before_fsync")
    assert caught.value.errno == errno.ENOSPC
    package.hit("wal.after_fsync")


def test_nth_counts_each_name_for_itself(arm: Arm) -> None:
    package = arm({"a.before_b": {"action": "raise", "nth": 3}, "a.after_b": {"action": "raise"}})
    assert fired(package, "a.before_b", 5) == [3]
    assert fired(package, "a.after_b", 2) == [1, 2]


def test_probability_follows_the_seed(arm: Arm) -> None:
    def run(seed: int) -> list[int]:
        rule = {"action": "raise", "probability": 0.3, "seed": seed}
        return fired(arm({"a.before_b": rule}), "a.before_b", 200)

    assert run(1) == run(1) != run(2)
    assert 30 < len(run(1)) < 90


def test_trace_lists_reached_names_once_per_doubling(arm: Arm, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    package = arm({}, trace=trace)
    for _ in range(5):
        package.hit("a.before_b")
    package.hit("a.after_b")
    assert trace.read_text().splitlines() == [
        "a.before_b 1", "a.before_b 2", "a.before_b 4", "a.after_b 1",
    ]  # fmt: skip


def test_no_hit_is_lost_between_threads(arm: Arm) -> None:
    package = arm({"a.before_b": {"action": "raise", "nth": 4000}})
    raised: list[int] = []

    def hammer() -> None:
        raised.extend(fired(package, "a.before_b", 1000))

    threads = [threading.Thread(target=hammer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert package.hits("a.before_b") == 4000
    assert len(raised) == 1


async def test_pause_holds_the_caller_until_told(arm: Arm, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    package = arm({"a.before_b": {"action": f"pause:{gate}"}})
    passed = threading.Event()

    def pass_through() -> None:
        package.hit("a.before_b")
        passed.set()

    thread = threading.Thread(target=pass_through)
    thread.start()
    await wait_until((tmp_path / "gate.reached").exists, describe="the failpoint")
    assert not passed.is_set()
    gate.touch()
    thread.join(10)
    assert passed.is_set()


@pytest.mark.parametrize(
    "rule",
    [{"action": "explode"}, {"action": "kill:9"}, {"action": "raise", "nht": 1}],
    ids=["action", "argument", "key"],
)
def test_a_misspelt_rule_is_refused(arm: Arm, rule: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"a\.before_b"):
        arm({"a.before_b": rule})
