"""The command line with a wall clock that a test can move: `python -m tests.helpers.moved_clock`.

The file that MOVED_CLOCK names holds how many seconds the clock is ahead.
"""

import os
import time
from pathlib import Path

from app.core.base.clock import SystemClock


def moved_wall_ns(self: SystemClock) -> int:
    return time.time_ns() + int(Path(os.environ["MOVED_CLOCK"]).read_text()) * 1_000_000_000


if __name__ == "__main__":
    from app.cli.main import main

    SystemClock.wall_ns = moved_wall_ns  # type: ignore[method-assign]
    main()
