"""One seed, from an empty disk and an empty bucket to a drained, whole and clean service."""

import asyncio
import random
import shutil
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from app.container.service import Container
from app.core.base.errors import Unavailable
from app.core.base.tasks import TaskScope
from app.core.stores.remote.keys import CHECKPOINTS_PREFIX, DOCUMENTS_PREFIX, SNAPSHOTS_PREFIX
from app.core.workers.collector import RoundRequest
from app.settings import Settings
from tests.simulation.actors import (
    Crowd,
    Ledger,
    Picture,
    read_all,
    read_content,
    read_image,
)
from tests.simulation.bucket import Bucket, Violation
from tests.simulation.life import Killed, Life, Time, Trace
from tests.simulation.virtual_time import without_threads

MIB = 1024 * 1024
LIVES_MAX = 4
LIFE_SECONDS = 1800.0
DRAIN_SECONDS = 6 * 3600.0
ORPHAN_AGE_SECONDS = 7200
GRACE_SECONDS = 600
PREFIXES = (CHECKPOINTS_PREFIX, DOCUMENTS_PREFIX, SNAPSHOTS_PREFIX)
"""Where nothing may be left. A probe that a kill cut short leaves its few bytes."""


@dataclass(kw_only=True)
class Outcome:
    seed: int
    trace: Trace
    lives: int = 0
    kills: "Counter[str]" = field(default_factory=Counter)
    steps: int = 0
    checks: int = 0
    simulated_seconds: float = 0.0
    done: "Counter[str]" = field(default_factory=Counter)
    faults: "Counter[str]" = field(default_factory=Counter)


def run_seed(seed: int, root: Path, *, log: Path | None = None) -> Outcome:
    """Raises what was violated. `root` is emptied first; what happened is written to `log`."""
    trace = Trace(log=None if log is None else [])
    try:
        return _run(seed, root, trace)
    finally:
        shutil.rmtree(root, ignore_errors=True)
        if log is not None and trace.log is not None:
            log.write_text("\n".join(trace.log))
            print(f"the log of seed {seed} is {log}")


def _run(seed: int, root: Path, trace: Trace) -> Outcome:
    shutil.rmtree(root, ignore_errors=True)
    source = random.Random(seed)
    lives = source.randint(1, LIVES_MAX)
    time, bucket = Time(), Bucket(source)
    outcome = Outcome(seed=seed, trace=trace)
    ledgers = [Ledger("acme", "orders"), Ledger("acme", "events"), Ledger("globex", "log")]
    crowd = Crowd(source, ledgers, Picture("acme", "app"), done=outcome.done)
    crowd.corrupt_allowed = lambda: not bucket.healthy
    begun = time.now
    with pytest.MonkeyPatch.context() as patch:
        without_threads(patch)
        for number in range(lives + 1):
            last = number == lives
            life = Life(
                data_dir=root / f"life-{number}",
                next_dir=root / f"life-{number + 1}",
                time=time,
                bucket=bucket,
                source=source,
                trace=outcome.trace,
            )
            if number and source.random() < 0.1:
                time.skew_ns += int(source.choice([-3600, 3600]) * 1e9)
            bucket.healthy = last
            work = (
                partial(_drain, crowd=crowd, bucket=bucket, life=life)
                if last
                else partial(_live, crowd=crowd, life=life)
            )
            if not last and source.random() < 0.7:
                life.failpoints_left = int(source.expovariate(1 / 150)) + 1
            try:
                outcome.steps += life.run(_settings(life.data_dir), work)
                if not last:
                    life.data_dir.rename(life.next_dir)
            except Killed as killed:
                outcome.kills[str(killed)] += 1
            finally:
                outcome.lives += 1
                outcome.checks += life.checks
            if number:
                shutil.rmtree(root / f"life-{number - 1}", ignore_errors=True)
    outcome.simulated_seconds = time.now - begun
    outcome.faults = bucket.faults
    return outcome


def _settings(data_dir: Path) -> Settings:
    """Little room, so that quota, back pressure and eviction are met."""
    return Settings(
        data_dir=data_dir,
        remote_url="file:///nowhere",
        manifest_map_bytes=64 * MIB,
        quota_global_bytes=3 * MIB,
        drain_reserve_bytes=MIB,
        wal_budget_bytes=MIB,
        hot_cache_bytes=MIB,
        page_cache_bytes=MIB,
        checkpoint_interval_seconds=120,
        gc_grace_seconds=GRACE_SECONDS,
        gc_interval_seconds=300.0,
        gc_orphan_age_seconds=ORPHAN_AGE_SECONDS,
        lease_ttl_seconds=60.0,
        job_history_count=200,
        change_history_count=500,
    )


async def _live(container: Container, *, crowd: Crowd, life: Life) -> None:
    """Until a seeded moment: then it is killed there, or ends in order."""
    errors: list[BaseException] = []
    failed = asyncio.Event()

    def on_error(error: BaseException) -> None:
        if not life.dead:
            errors.append(error)
            failed.set()

    def is_dead() -> bool:
        return life.dead

    async with TaskScope("crowd", on_error=on_error) as scope:
        for ledger in crowd.ledgers:
            scope.start(crowd.write(container, ledger, is_dead), name=ledger.name)
        scope.start(crowd.paint(container, is_dead), name="painter")
        for number in range(2):
            scope.start(crowd.meddle(container, is_dead), name=f"meddler-{number}")
        seconds = crowd.source.expovariate(1 / LIFE_SECONDS)
        try:
            async with asyncio.timeout(seconds):
                await failed.wait()
        except TimeoutError:
            if crowd.source.random() < 0.6:
                life.kill("a moment")
                await asyncio.sleep(0)
    if errors and not life.dead:
        raise errors[0]


async def _drain(container: Container, *, crowd: Crowd, bucket: Bucket, life: Life) -> None:
    """The bucket is well and nobody asks any more: all that was begun must come to its end, and
    nothing be left that nobody needs.
    """
    services = container.services
    await _no_jobs(container)
    for ledger in crowd.ledgers:
        await crowd.settle(container, ledger, lambda: False)
    await crowd.settle_picture(container)
    for ledger in (*crowd.ledgers, crowd.picture):
        job = await services.checkpoints.trigger(
            ledger.tenant, ledger.name, reason=None, principal="end"
        )
        job = await services.jobs.wait(job.job_id, seconds=DRAIN_SECONDS)
        if job.state != "completed":
            raise Violation(f"the last checkpoint of {ledger.name} is {job.state}: {job.error}")
        ledger.check(await read_content(container, ledger, ledger.name))  # type: ignore[arg-type]
    for name, (parent, before) in sorted(crowd.forks.items()):
        if await read_content(container, parent, name) != before:
            raise Violation(f"the fork {name} of {parent.name} reads otherwise than at first")
    for tenant, database, snapshot in sorted(crowd.snapshots):
        name = f"of-{database}-{snapshot}"
        await services.forks.create(
            tenant, database, fork_tenant=tenant, fork_database=name, snapshot=snapshot
        )
        read = read_image if database == crowd.picture.name else read_all
        await read(container, tenant, name)
    await _nothing_left(container, bucket, life)


async def _no_jobs(container: Container) -> None:
    for _ in range(int(DRAIN_SECONDS / 30)):
        if not (jobs := container.services.debugging.active_jobs(limit=10, after=None)):
            return
        await asyncio.sleep(30)
    raise Violation(f"jobs never end: {jobs}")


async def _nothing_left(container: Container, bucket: Bucket, life: Life) -> None:
    services = container.services
    await asyncio.sleep(ORPHAN_AGE_SECONDS + 3600)
    for orphans in ("delete", None, None):
        try:
            await services.collection.run(
                RoundRequest(everything=True, accept_clock=True, orphans=orphans)  # type: ignore[arg-type]
            )
        except Unavailable as error:
            raise Violation("collection fails though the bucket is well") from error
        await asyncio.sleep(ORPHAN_AGE_SECONDS + GRACE_SECONDS + 600)
    await _no_jobs(container)
    if leases := services.debugging.leases(limit=10, after=None):
        raise Violation(f"leases are left: {leases}")
    if (quota := services.debugging.quota()).jobs or quota.drain_used_bytes:
        raise Violation(f"reservations are left: {quota}")
    if left := sorted((life.data_dir / "checkpoint_scratch").rglob("*")):
        raise Violation(f"scratch is left: {left}")
    report = await services.debugging.fsck()
    if not report.clean:
        raise Violation(f"fsck: {report.findings[:10]}")
    assert life.manifest is not None
    with life.manifest.read() as view:
        known = {row.document_key for database in view.all_databases()
                 for row in view.generations(database.db_id)}  # fmt: skip
        known |= {row.document.key for row in view.all_snapshots() if row.document is not None}
        unknown = [
            key
            for key in bucket.objects
            if not view.blob_references(key) and key not in known and key.startswith(PREFIXES)
        ]
    if unknown:
        raise Violation(f"{len(unknown)} objects are left that nobody needs: {unknown[:5]}")
