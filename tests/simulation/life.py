"""One life of the whole service, as `open_container` wires it, on the virtual loop: from a start on
what the life before left to an orderly end, to the end that a failing disk makes it come to, or to
a kill at any failpoint or moment.

A kill copies the data directory there and then, hard links and all, and lets the bucket hear no
more of this life; what is left of it is then taken down on a directory that nobody uses again.
"""

import asyncio
import os
import random
import shutil
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

import app.container.ground as ground
import app.core.workers.lease_reaper as lease_reaper
from app.container.offline import recover
from app.container.service import Container
from app.container.wiring import open_container
from app.core.base import failpoints
from app.core.base.clock import SeededRandomness
from app.core.base.errors import BopError, FatalError, InvariantViolation, StartRefused
from app.core.base.events import Events, Level
from app.core.coordination.quota import StorageQuota
from app.core.stores.manifest.records import DatabaseRecord
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.manifest.view import ManifestView
from app.core.stores.remote.metered import Metered
from app.core.stores.remote.requests import ConcurrencyLimit, Retrier, RetryBudget, RetryPolicy
from app.core.stores.remote.retrying import Retrying
from app.settings import Settings
from tests.simulation.bucket import Bucket, Violation, WayToBucket
from tests.simulation.disk import Disk
from tests.simulation.virtual_time import VirtualLoop

UNWANTED = frozenset(
    {"quota.leak_released", "collection.unprovable", "manifest.view_expired", "wal.corrupt"}
    | {"wal.lost", "manifest.map_full", "supervisor.worker_died"}
)
"""Events that tell of a mistake which the service has covered up."""
UNWANTED_CODES = frozenset({"internal", "corrupt_wal"})
WALL_START_NS = 1_800_000_000 * 10**9
FAILED_SECONDS_MAX = 120.0
"""A service whose disk has failed is gone by then."""


class Killed(Exception):
    """The life ended in mid-work; its owner goes on with the next."""


class Ended(Exception):
    """It ended by itself, or never began, since its disk is full or has failed."""


@dataclass
class Time:
    """Of all lives: a monotonic clock that goes on, and a wall clock that may be set."""

    now: float = 1000.0
    skew_ns: int = 0

    def wall_ns(self) -> int:
        return WALL_START_NS + int(self.now * 1e9) + self.skew_ns


class _LifeClock:
    def __init__(self, life: "Life") -> None:
        self._life = life

    def wall_ns(self) -> int:
        return self._life.tick().wall_ns()

    def monotonic(self) -> float:
        assert self._life._loop is not None
        return self._life._loop.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


@dataclass
class Trace:
    """What happened, in order, as one hash. Equal traces: equal runs."""

    root: str
    """Left out of what is written."""
    events: int = 0
    _hash: Any = field(default_factory=sha256)
    log: list[str] | None = None

    def add(self, now: float, name: str, fields: Mapping[str, object]) -> None:
        line = f"{now:.6f} {name} {sorted(fields.items())!r}".replace(self.root, "")
        self.events += 1
        self._hash.update(line.encode())
        if self.log is not None:
            self.log.append(line)

    def digest(self) -> str:
        return str(self._hash.hexdigest())


@dataclass
class Life:
    """`failpoints_left`: so many are passed before the kill; None: none kills."""

    data_dir: Path
    next_dir: Path
    time: Time
    bucket: Bucket
    source: random.Random
    trace: Trace
    failpoints_left: int | None = None
    recovering: bool = False
    """Before it begins, the empty directory is filled from the bucket."""
    dead: bool = False
    kills_after: str = ""
    checks: int = 0
    steps: int = 0
    """Turns of the loop."""
    manifest: ManifestStore | None = None
    violation: BaseException | None = None
    _loop: VirtualLoop | None = None
    _main: "asyncio.Task[None] | None" = None
    _generations: dict[int, int] = field(default_factory=dict)
    _last_sequence: int = -1
    _container: Container | None = None
    _closing: bool = False
    _quota_changed: bool = True

    def __post_init__(self) -> None:
        self.disk = Disk(
            root=self.data_dir,
            source=self.source,
            now=lambda: self.tick().now,
            faults=self.bucket.faults,
            healthy=self.bucket.healthy,
        )

    def tick(self) -> Time:
        if self._loop is not None and not self._loop.is_closed():
            self.time.now = self._loop.time()
        return self.time

    # --- running

    def run(self, settings: Settings, work: Callable[[Container], Awaitable[None]]) -> None:
        """Raises Killed, Ended, and what `work` or an invariant raises."""
        loop = VirtualLoop(now=self.time.now, source=self.source)
        self._loop = loop
        self.bucket.now = lambda: self.tick().now
        self.bucket.wall_us = lambda: self.tick().wall_ns() // 1000
        self.bucket.named = self._is_named
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(failpoints, "fp", self._failpoint)
            patch.setattr(ground, "SystemClock", lambda: _LifeClock(self))
            seed = self.source.getrandbits(64)
            patch.setattr(ground, "SystemRandomness", lambda: SeededRandomness(seed))
            patch.setattr(ground, "open_remote", self._open_remote)
            patch.setattr(lease_reaper, "INTERVAL_SECONDS_MAX", 30.0)
            for name in ("_apply", "_take", "_give_back"):
                patch.setattr(StorageQuota, name, self._noting(getattr(StorageQuota, name)))
            self.disk.patch(patch)
            self._main = loop.create_task(self._serve(settings, work))
            try:
                loop.run_until_complete(self._main)
            except (
                asyncio.CancelledError, BopError, FatalError, OSError, StartRefused,
            ) as error:  # fmt: skip
                self._judge_end(error)
            finally:
                self.tick()
                self.steps, self.manifest = loop.steps, None
                loop.run_until_complete(loop.shutdown_asyncgens())
                loop.close()
        self._judge_end(None)

    def _judge_end(self, error: BaseException | None) -> None:
        """Raises what the end means; returns after one in order."""
        if self.violation is not None:
            raise self.violation from error
        if self.dead:
            raise Killed(self.kills_after) from error
        if self.disk.failed is not None:
            if not self._closing and self.tick().now - self.disk.failed_at > FAILED_SECONDS_MAX:
                raise Violation(f"the {self.disk.failed}'s disk failed, and it went on") from error
            raise Ended(f"{self.disk.failed} failed") from error
        if error is not None:
            if self._container is None and self.disk.refusals:
                raise Ended("no room to begin") from error
            raise error

    async def _serve(
        self, settings: Settings, work: Callable[[Container], Awaitable[None]]
    ) -> None:
        if self.recovering:
            await recover(settings)
        async with open_container(
            settings, events=Events(self._hear), on_fatal=self._fatal
        ) as container:
            self._container = container
            self.manifest = container.services.debugging._manifest
            self.check()
            await work(container)
            self._closing = True

    async def _open_remote(
        self, stack: Any, url: str, options: Any, *, clock: Any, randomness: Any, events: Events
    ) -> Retrying:
        """As `stores.remote.open` does, before another store."""
        del stack, url
        retrier = Retrier(
            RetryPolicy(
                attempts_max=options.attempts,
                backoff_base_seconds=options.retry_base_seconds,
                backoff_cap_seconds=options.retry_cap_seconds,
            ),
            budget=RetryBudget(),
            clock=clock,
            randomness=randomness,
            events=events,
        )
        way = WayToBucket(self.bucket, is_dead=lambda: self.dead)
        return Retrying(
            Metered(way, clock=clock, events=events),
            retrier=retrier,
            limit=ConcurrencyLimit(ceiling=options.concurrency),
        )

    # --- the end

    def kill(self, after: str) -> None:
        if self.dead:
            return
        self.dead, self.kills_after = True, after
        self.trace.add(self.tick().now, "killed", {"after": after})
        _copy_with_links(self.data_dir, self.next_dir)
        self.disk.lose(self.next_dir)
        self.disk.healthy = True
        assert self._main is not None
        self._main.cancel()

    def _failpoint(self, name: str) -> None:
        if self.dead:
            return
        if name == "manifest.before_commit":
            self.disk.before_commit()
        elif name == "manifest.after_commit":
            self.disk.after_commit()
        if self.failpoints_left is None:
            return
        self.failpoints_left -= 1
        if self.failpoints_left <= 0:
            self.kill(name)

    def _fatal(self, error: BaseException) -> None:
        if self.dead:
            return
        if self.disk.failed is None:
            self._broken(Violation(f"the service ended by itself: {error!r}"), error)
        assert self._main is not None
        self._main.cancel()

    def _broken(self, violation: BaseException, cause: BaseException | None = None) -> None:
        """Raised by `run`: here it might be taken for a failure of the step that met it."""
        violation.__cause__ = cause
        self.violation = self.violation or violation
        assert self._main is not None
        self._main.cancel()

    # --- watching

    def _hear(self, name: str, level: Level, fields: Mapping[str, object]) -> None:
        if self.dead:
            return
        self.trace.add(self.tick().now, name, fields)
        if name == "manifest.committed" and self.manifest is not None:
            try:
                self.check()
            except (Violation, InvariantViolation) as violation:
                self._broken(violation)
        elif self.disk.failed is None and (
            name in UNWANTED or fields.get("code") in UNWANTED_CODES
        ):
            self._broken(Violation(f"{name} {dict(fields)}"))

    def _noting(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def noted(quota: StorageQuota, *arguments: Any, **options: Any) -> Any:
            self._quota_changed = True
            return change(quota, *arguments, **options)

        return noted

    def _is_named(self, key: str) -> bool:
        if self.manifest is None or self.dead:
            return False
        with self.manifest.read() as view:
            return bool(view.blob_references(key))

    def blob_keys(self, tenant: str, name: str) -> list[str]:
        """Of the newest generation, as far as there is one to be seen."""
        if self.manifest is None or self.dead:
            return []
        with self.manifest.read() as view:
            db_id = view.database_id(tenant, name)
            database = None if db_id is None else view.database(db_id)
            if database is None:
                return []
            bases = view.chunk_view(database.db_id, database.generation)
            deltas = view.delta_view(database.db_id, database.generation)
        keys = [row.blob.key for row in bases if row.blob is not None]
        return keys + [row.blob.key for row in deltas]

    def check(self) -> None:
        """After every commit: no row names a blob that is not there (I2, I8), generations count up
        one by one (I14), reservations are what they say and within their limits (I9). Rows of
        databases that the change log does not name are as they were; of what they name, nothing
        goes unseen (`Bucket.delete`).
        """
        assert self.manifest is not None
        assert self._container is not None
        self.checks += 1
        now = self.tick().now
        if self.disk.failed is not None and now - self.disk.failed_at > FAILED_SECONDS_MAX:
            raise Violation(f"the {self.disk.failed}'s disk has failed, and it commits")
        if self._quota_changed:
            self._quota_changed = False
            debugging = self._container.services.debugging
            debugging._quota.check()
            used = debugging.quota()
            if used.drain_used_bytes > used.drain_limit_bytes:
                raise Violation(f"the drain reserve is overdrawn: {used}")
        with self.manifest.read() as view:
            if (last := view.last_sequence()) == self._last_sequence:
                return
            if self._last_sequence < 0:
                changed = {database.db_id for database in view.all_databases()}
            else:
                changed = {one.db_id for one in view.change_log(self._last_sequence)}
            self._last_sequence = last
            for db_id in sorted(changed):
                if (database := view.database(db_id)) is not None:
                    self._check_rows(view, database)

    def _check_rows(self, view: ManifestView, database: DatabaseRecord) -> None:
        db_id = database.db_id
        before = self._generations.get(db_id)
        if before is not None and database.generation not in {before, before + 1}:
            raise Violation(f"generation {database.generation} of {database.name} follows {before}")
        self._generations[db_id] = database.generation
        keys = [row.blob.key for row in view.chunk_rows(db_id) if row.blob is not None]
        keys += [row.blob.key for row in view.delta_rows(db_id)]
        for key in keys:
            if key not in self.bucket.objects:
                raise Violation(f"{database.name} names {key}, which is not there")


def _copy_with_links(source: Path, target: Path) -> None:
    """One instant of the directory. Files come and go in no other thread."""
    seen: dict[int, Path] = {}
    for directory, names, files in os.walk(source):
        names.sort()
        there = target / Path(directory).relative_to(source)
        there.mkdir(parents=True)
        for name in sorted(files):
            found = Path(directory) / name
            inode = found.stat().st_ino
            if name in {"lock", "lock.mdb"}:
                continue
            if (first := seen.get(inode)) is not None:
                os.link(first, there / name)
            else:
                with suppress(FileNotFoundError):
                    shutil.copy2(found, there / name)
                    seen[inode] = there / name
