"""Prints what `mutmut run` found, a line a module, and each survivor: see docs/mutation.md.

Ends with 1 where tests kill less than KILLED_MIN of a module's mutants.
"""

import json
import sys
from pathlib import Path

from mutmut.stats import status_by_exit_code

KILLED_MIN = 0.85
MUTANTS = Path("mutants")
CAUGHT = {"killed", "timeout", "segfault", "suspicious"}


def main() -> int:
    weak = 0
    survivors: list[str] = []
    print("| module | mutants | killed | |\n|---|---:|---:|---:|")
    for meta in sorted(MUTANTS.rglob("*.py.meta")):
        found = {
            name: status_by_exit_code[code]
            for name, code in json.loads(meta.read_text())["exit_code_by_key"].items()
        }
        if not found:
            continue
        killed = sum(status in CAUGHT for status in found.values())
        survivors += [f"{name}: {status}" for name, status in found.items() if status not in CAUGHT]
        weak += killed < KILLED_MIN * len(found)
        module = meta.relative_to(MUTANTS).with_suffix("")
        rate = f"{100 * killed / len(found):.1f} %"
        print(f"| `{module}` | {len(found)} | {killed} | {rate} |")
    print(*survivors, sep="\n")
    return 1 if weak else 0


if __name__ == "__main__":
    sys.exit(main())
