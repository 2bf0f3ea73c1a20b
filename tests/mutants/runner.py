"""Plants a mutant in a copy of the tree and runs the test that is aimed at it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.catalogue import Mutant

REPOSITORY = Path(__file__).resolve().parents[2]
COPIED = ("app", "migrations", "tests", "pyproject.toml")
TEST_SECONDS = 120
_TESTS_FAILED = 1
"""pytest's exit code; another one means that it could not run them."""
_SHOWN = 4000
_SKIPPED = "skipped: its test does not run here"
_WITHOUT = (
    "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:schemathesis", "-p", "no:pytest_cov",
)  # fmt: skip
"""What costs time and is not needed for one test."""


class NotPlanted(Exception):
    """The code is not as the edit expects it: the catalogue has to follow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    mutant: Mutant
    seconds: float
    problem: str | None
    """None: the test failed, as it should, and of what it should."""

    @property
    def skipped(self) -> bool:
        """The machine lacks what the test needs."""
        return self.problem == _SKIPPED

    def __str__(self) -> str:
        how = "red" if self.problem is None else self.problem
        return f"{self.mutant.name:36} {self.mutant.invariants:9} {self.seconds:5.1f} s  {how}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    code: int
    said: str


def verdict_of(mutant: Mutant) -> Verdict:
    """Leaves nothing behind."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"bop-{mutant.name}-") as directory:
        tree = Path(directory) / "tree"
        copy_tree(tree)
        try:
            plant(tree, mutant)
        except NotPlanted as error:
            problem: str | None = str(error)
        else:
            problem = _problem(mutant, _run_pytest(mutant.test, tree, base=Path(directory) / "tmp"))
    return Verdict(mutant=mutant, seconds=time.monotonic() - started, problem=problem)


def copy_tree(target: Path) -> None:
    """By hard links where the file system has them: nothing is ever written in place."""
    target.mkdir()
    for name in COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(
                source, target / name, copy_function=_link_or_copy,
                ignore=shutil.ignore_patterns("__pycache__", ".hypothesis"),
            )  # fmt: skip
        else:
            shutil.copyfile(source, target / name)


def plant(tree: Path, mutant: Mutant) -> None:
    """Raises NotPlanted."""
    for path, source in mutated(mutant).items():
        compile(source, path, "exec")
        (tree / path).unlink()  # a link to the original
        (tree / path).write_text(source, encoding="utf-8")


def mutated(mutant: Mutant) -> dict[str, str]:
    """The changed files. Raises NotPlanted where the code is not as an edit expects it."""
    changed: dict[str, str] = {}
    for edit in mutant.edits:
        source = changed.get(edit.path) or (REPOSITORY / edit.path).read_text(encoding="utf-8")
        if (count := source.count(edit.old)) != 1:
            raise NotPlanted(f"{count} times in {edit.path}, and not once:\n{edit.old}")
        changed[edit.path] = source.replace(edit.old, edit.new)
    return changed


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _run_pytest(test: str, tree: Path, *, base: Path) -> Ran:
    """In a session of its own, which a test that hangs takes along."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("COV_", "COVERAGE_", "PYTEST_"))
    }
    command = [
        sys.executable, "-m", "pytest", test, "-x", "-q", *_WITHOUT, "--basetemp", str(base),
        "--timeout", str(TEST_SECONDS),
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        cwd=tree,
        env={**environment, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=2 * TEST_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
    return Ran(code=process.returncode, said=said)


def _problem(mutant: Mutant, ran: Ran) -> str | None:
    said = ran.said
    match ran.code:
        case 0 if " skipped" in said and " passed" not in said:
            return _SKIPPED
        case 0:
            return f"alive: {mutant.test} passes without it\n{said[-_SHOWN:]}"
        case code if code != _TESTS_FAILED:
            return f"pytest ended with {code}\n{said[-_SHOWN:]}"
        case _ if not re.search(mutant.dies_of, said):
            return f"red for another reason than {mutant.dies_of!r}\n{said[-_SHOWN:]}"
        case _:
            return None
