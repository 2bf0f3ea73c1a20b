"""One seed, from an empty disk and an empty bucket to a drained, whole and clean service."""

import asyncio
import gc
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from app.container.service import Container
from app.core.base.tasks import TaskScope
from app.settings import Settings
from tests.simulation.bucket import Bucket
from tests.simulation.content import Ledger, Picture
from tests.simulation.crowd import Crowd
from tests.simulation.drain import GRACE_SECONDS, ORPHAN_AGE_SECONDS, drain, recovered
from tests.simulation.life import Ended, Killed, Life, Time, Trace
from tests.simulation.meddlers import Meddler
from tests.simulation.painters import Painter
from tests.simulation.virtual_time import without_threads
from tests.simulation.writers import Writer

MIB = 1024 * 1024
LIVES_MAX = 5
LIFE_SECONDS = 36 * 3600.0
FAILPOINTS = (60.0, 1000.0, 6000.0)
"""How many a life passes on average before one kills it: one in its first work, or much later."""


@dataclass(kw_only=True)
class Outcome:
    seed: int
    trace: Trace
    lives: int = 0
    kills: "Counter[str]" = field(default_factory=Counter)
    ends: "Counter[str]" = field(default_factory=Counter)
    """Of lives that their disk ended."""
    steps: int = 0
    checks: int = 0
    simulated_seconds: float = 0.0
    done: "Counter[str]" = field(default_factory=Counter)
    faults: "Counter[str]" = field(default_factory=Counter)


def run_seed(seed: int, root: Path, *, log: Path | None = None) -> Outcome:
    """Raises what was violated. `root` is emptied first; what happened is written to `log`."""
    trace = Trace(str(root), log=None if log is None else [])
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
    recovers = source.random() < 0.3
    time, bucket = Time(), Bucket(source)
    outcome = Outcome(seed=seed, trace=trace)
    ledgers = [Ledger("acme", "orders"), Ledger("acme", "events"), Ledger("globex", "log")]
    pictures = [Picture("acme", "app"), Picture("globex", "site")]
    crowd = Crowd(source, bucket, ledgers, pictures, done=outcome.done)
    begun = time.now
    with pytest.MonkeyPatch.context() as patch, _collections_between_lives():
        without_threads(patch)
        for number in range(lives + 1 + recovers):
            bucket.healthy = number >= lives
            life = Life(
                data_dir=root / f"life-{number}",
                next_dir=root / f"life-{number + 1}",
                time=time,
                bucket=bucket,
                source=source,
                trace=outcome.trace,
                recovering=number > lives,
            )
            if number and source.random() < 0.1:
                time.skew_ns += int(source.choice([-3600, 3600]) * 1e9)
            _live_through(life, crowd, outcome)
            if number:
                shutil.rmtree(root / f"life-{number - 1}", ignore_errors=True)
    outcome.simulated_seconds = time.now - begun
    outcome.faults = bucket.faults
    return outcome


def _live_through(life: Life, crowd: Crowd, outcome: Outcome) -> None:
    """To its end, whichever; the next finds its directory in place."""
    crowd.life, source = life, crowd.source
    if life.recovering:
        work = partial(recovered, crowd=crowd, life=life)
    elif crowd.bucket.healthy:
        work = partial(drain, crowd=crowd, life=life)
    else:
        work = partial(_live, crowd=crowd, life=life)
        if source.random() < 0.6:
            mean = source.choice(FAILPOINTS)
            life.failpoints_left = int(source.expovariate(1 / mean)) + 1
    try:
        life.run(_settings(life.data_dir), work)
    except Killed as killed:
        outcome.kills[str(killed)] += 1
    except Ended as ended:
        outcome.ends[str(ended)] += 1
        life.data_dir.rename(life.next_dir)
        life.disk.lose(life.next_dir)
    else:
        if not crowd.bucket.healthy:
            life.data_dir.rename(life.next_dir)
    finally:
        outcome.lives += 1
        outcome.checks += life.checks
        outcome.steps += life.steps


@contextmanager
def _collections_between_lives() -> Iterator[None]:
    """Python's collector finishes generators that were left, and must not do so just anywhere."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


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
        job_history_count=40,
        change_history_count=500,
    )


async def _live(container: Container, *, crowd: Crowd, life: Life) -> None:
    """Until a seeded moment: then it is killed there, or ends in order."""
    errors: list[BaseException] = []
    failed = asyncio.Event()

    def on_error(error: BaseException) -> None:
        if not life.dead and life.disk.failed is None:
            errors.append(error)
            failed.set()

    async with TaskScope("crowd", on_error=on_error) as scope:
        for ledger in crowd.ledgers:
            scope.start(Writer(crowd, container, ledger).run(), name=ledger.name)
        for picture in crowd.pictures:
            scope.start(Painter(crowd, container, picture).run(), name=picture.name)
        for number in range(2):
            scope.start(Meddler(crowd, container).run(), name=f"meddler-{number}")
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
