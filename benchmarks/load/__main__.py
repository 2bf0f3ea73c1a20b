"""`python -m benchmarks.load [SCENARIO [options]]`; without one, all of them at a small size."""

import argparse
import asyncio
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from benchmarks.load import idle, mixed, quota_pressure, scan_beside_reads, soak, steady
from benchmarks.load.table import show

SCENARIOS: dict[str, ModuleType] = {
    "steady": steady,
    "quota-pressure": quota_pressure,
    "mixed": mixed,
    "scan-beside-reads": scan_beside_reads,
    "idle": idle,
    "soak": soak,
}
SMALL: dict[str, Sequence[str]] = {
    "steady": (),
    "quota-pressure": (),
    "mixed": (),
    "scan-beside-reads": (),
    "idle": ("--databases", "200", "--interval", "5", "--seconds", "10"),
    "soak": ("--seconds", "20"),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load")
    chosen = parser.add_subparsers(dest="scenario", metavar="SCENARIO")
    for name, module in SCENARIOS.items():
        module.add_options(chosen.add_parser(name, description=module.__doc__))
    options = parser.parse_args()
    if options.scenario is not None:
        return run(options)
    return max([run(parser.parse_args([name, *small])) for name, small in SMALL.items()])


def run(options: argparse.Namespace) -> int:
    module = SCENARIOS[options.scenario]
    work = Path(tempfile.mkdtemp(prefix="bop-load-", dir=Path.cwd()))  # the disk that is used
    try:
        figures = asyncio.run(module.run(options, work))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    show(module.TITLE, figures)
    return 0 if all(one.met for one in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
