"""`python -m tests.mutants [NAME …]`: plants the mutants, two at a time, and says which died."""

import sys
from concurrent.futures import ThreadPoolExecutor

from tests.mutants.catalogue import MUTANTS
from tests.mutants.runner import verdict_of

AT_ONCE = 2


def main(names: list[str]) -> int:
    unknown = set(names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        print(f"no such mutant: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    alive = skipped = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for verdict in pool.map(verdict_of, chosen):
            print(verdict, flush=True)
            skipped += verdict.skipped
            alive += verdict.problem is not None and not verdict.skipped
    print(
        f"{len(chosen) - alive - skipped} of {len(chosen)} mutants died of the test aimed at them"
    )
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
