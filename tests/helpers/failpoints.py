"""Arming failpoints in a process under test."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FAILPOINTS_PATH = Path(__file__).resolve().parents[1] / "failpoints"
"""On PYTHONPATH, it makes `bop_failpoints` importable; only tests put it there."""

Failpoints = Mapping[str, Mapping[str, Any]]


def kill_at(name: str, *, nth: int = 1) -> Failpoints:
    return {name: {"action": "kill", "nth": nth}}


def failpoint_environment(failpoints: Failpoints, *, trace: Path | None = None) -> dict[str, str]:
    """The variables that `bop_failpoints` reads; PYTHONPATH is the launcher's affair."""
    variables = {"BOP_FAILPOINTS": json.dumps(failpoints)} if failpoints else {}
    if trace is not None:
        variables["BOP_FAILPOINTS_TRACE"] = str(trace)
    return variables


def read_trace(trace: Path) -> dict[str, int]:
    """Each failpoint that was reached, with how often at least (a power of two)."""
    if not trace.exists():
        return {}
    reached: dict[str, int] = {}
    for line in trace.read_text().splitlines():
        name, count = line.split()
        reached[name] = max(reached.get(name, 0), int(count))
    return reached
