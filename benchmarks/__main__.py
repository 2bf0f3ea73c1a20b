"""`make bench`: every ratio, or those whose name contains the given word."""

import argparse
import asyncio
import shutil
import sys
import tempfile
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


async def measure(word: str, work: Path) -> list[Result]:
    results: list[Result] = []
    if word in "manifest":
        results.append(await manifest.batches(work))
    if word in "appends-large":
        results.append(await appends.large(work))
    if word in "appends-small":
        results.append(await appends.small(work))
    if word in "json-posts":
        results += await json_posts.small_posts()
    if word in "checkpoints":
        results += await checkpoints.sixteen_chunks(work)
    if word in "page-reads":
        results += await page_reads.page_reads(work)
    if word in "cold-scan":
        results += await cold_scans.cold_scans(work)
    if word in "fork":
        results += await forks.forks(work)
    if word in "gc":
        results += await collection.collection(work)
    if word in "libsql":
        results.append(await asyncio.to_thread(wal_verification.verification))
        results += await libsql.against_litestream(work)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    known = "manifest, appends, json-posts, checkpoints, page-reads, cold-scan, fork, gc, libsql"
    parser.add_argument("only", nargs="?", default="", help=known)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="bop-bench-", dir=Path.cwd()))  # the disk that is used
    try:
        results = asyncio.run(measure(arguments.only, work))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    show(results, as_json=arguments.json)
    return 0 if results and all(result.met for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
