"""`make bench`: every ratio, or those whose name contains the given word."""

import argparse
import asyncio
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from benchmarks import (
    appends,
    checkpoints,
    cold_scans,
    collection,
    forks,
    json_posts,
    libsql,
    manifest,
    page_reads,
    wal_verification,
)
from benchmarks.report import Result, show


async def _libsql(work: Path) -> list[Result]:
    verified = await asyncio.to_thread(wal_verification.verification)
    return [verified, *await libsql.against_litestream(work)]


async def _appends_large(work: Path) -> list[Result]:
    return [await appends.large(work)]


async def _appends_small(work: Path) -> list[Result]:
    return [await appends.small(work)]


async def _manifest(work: Path) -> list[Result]:
    return [await manifest.batches(work)]


MEASURES: Mapping[str, Callable[[Path], Awaitable[list[Result]]]] = {
    "manifest": _manifest,
    "appends-large": _appends_large,
    "appends-small": _appends_small,
    "json-posts": lambda work: json_posts.small_posts(),
    "checkpoints": checkpoints.sixteen_chunks,
    "page-reads": page_reads.page_reads,
    "cold-scan": cold_scans.cold_scans,
    "fork": forks.forks,
    "gc": collection.collection,
    "libsql": _libsql,
}


async def measure(word: str, work: Path, results: list[Result]) -> None:
    """Each in a directory of its own; what it found is in `results` though a later one fails."""
    for name, run in MEASURES.items():
        if word in name:
            directory = work / name
            directory.mkdir()
            results += await run(directory)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("only", nargs="?", default="", help=", ".join(MEASURES))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="bop-bench-", dir=Path.cwd()))  # the disk that is used
    results: list[Result] = []
    try:
        asyncio.run(measure(arguments.only, work, results))
    finally:
        shutil.rmtree(work, ignore_errors=True)
        show(results, as_json=arguments.json)
    return 0 if results and all(result.met for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
