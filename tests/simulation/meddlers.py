"""Everybody else: whatever operators and background jobs do to databases that others write to."""

import asyncio
from collections.abc import Awaitable, Callable

from app.container.service import Container
from app.core.base.errors import (
    Conflict,
    CorruptBlob,
    GenerationExpired,
    JobAlreadyEnded,
    LsnTruncated,
    NotFound,
    Unavailable,
)
from app.core.stores.manifest.errors import RowPinned
from app.core.stores.manifest.records import Retention
from app.core.workers.collector import RoundRequest
from tests.simulation.auditors import Auditor
from tests.simulation.content import Database, Ledger, read_content
from tests.simulation.crowd import REFUSED, Crowd


class Meddler:
    def __init__(self, crowd: Crowd, container: Container) -> None:
        self._crowd = crowd
        self._source = crowd.source
        self._services = container.services
        self._container = container
        self._auditor = Auditor(crowd, container)

    async def run(self) -> None:
        """For ever."""
        steps: list[tuple[Callable[[Database], Awaitable[None]], int]] = [
            (self._checkpoint, 30), (self._cancel, 10), (self._snapshot, 8), (self._unsnap, 5),
            (self._fork, 5), (self._unfork, 4), (self._collect, 8), (self._retain, 4),
            (self._look, 10), (self._tidy, 3), (self._auditor.scan, 8), (self._auditor.verify, 4),
            (self._auditor.download, 4), (self._auditor.rot, 3),
        ]  # fmt: skip
        weights = [weight for _, weight in steps]
        while True:
            await self._crowd.pause()
            database = self._source.choice(self._crowd.databases)
            step = self._source.choices(steps, weights)[0][0]
            try:
                await step(database)
                self._crowd.done[step.__name__.strip("_")] += 1
            except (
                Conflict, NotFound, GenerationExpired, LsnTruncated, Unavailable, RowPinned,
                *REFUSED,
            ):  # fmt: skip
                self._crowd.done["meddling refused"] += 1
            except CorruptBlob as error:
                self._crowd.bear(error)

    async def _checkpoint(self, database: Database) -> None:
        job = await self._services.checkpoints.trigger(
            database.tenant, database.name, reason=None, principal="someone"
        )
        if self._source.random() < 0.5:
            await self._services.jobs.wait(job.job_id, seconds=600)

    async def _cancel(self, database: Database) -> None:
        del database
        jobs = self._services.jobs.list(
            states=["pending", "in_flight"], limit=10, after=None,
            kinds=["create_checkpoint", "coalesce_chunks", "verify_manifest"],
        )  # fmt: skip
        if jobs:
            try:
                await self._services.jobs.cancel(self._source.choice(jobs).job_id)
            except JobAlreadyEnded:
                return

    async def _snapshot(self, database: Database) -> None:
        name = self._crowd.new_name("s")
        await self._services.snapshots.create(database.tenant, database.name, name)
        self._crowd.snapshots.add((database.tenant, database.name, name))

    async def _unsnap(self, database: Database) -> None:
        del database
        if self._crowd.snapshots:
            gone = self._source.choice(sorted(self._crowd.snapshots))
            self._crowd.snapshots.discard(gone)
            await self._services.snapshots.delete(*gone)

    async def _fork(self, database: Database) -> None:
        """Of a published generation: what it holds is never changed by what comes after."""
        name = self._crowd.new_name("fork")
        await self._services.forks.create(
            database.tenant, database.name, fork_tenant=database.tenant, fork_database=name
        )
        found = await read_content(self._container, database, name)
        database.check_past(found)
        self._crowd.forks[name] = database, found

    async def _unfork(self, database: Database) -> None:
        del database
        if self._crowd.forks:
            name = self._source.choice(sorted(self._crowd.forks))
            parent, _ = self._crowd.forks.pop(name)
            await self._services.deletion.delete(
                parent.tenant, name, with_snapshots=True, principal="someone"
            )

    async def _collect(self, database: Database) -> None:
        del database
        await self._services.collection.run(
            RoundRequest(
                everything=self._source.random() < 0.5,
                accept_clock=self._source.random() < 0.3,
                orphans=self._source.choice([None, "delete"]),
            )
        )

    async def _retain(self, database: Database) -> None:
        keep = Retention(
            keep_generations=self._source.choice([None, 1, 5]),
            keep_seconds=self._source.choice([None, 0, 600, 86_400]),
            minimum_generations=self._source.choice([1, 2]),
        )
        await self._services.history.set_retention(
            database.tenant, database.name, lambda before: keep
        )

    async def _look(self, database: Database) -> None:
        """A reader beside the writer: what it sees was acknowledged, and is where it belongs."""
        turns, is_settled = database.turns, _is_settled(database)
        found = await read_content(self._container, database, database.name)
        if turns == database.turns and is_settled and _is_settled(database):
            database.check(found)
        database.check_past(found)

    async def _tidy(self, database: Database) -> None:
        del database
        await self._services.upkeep.run_janitor(max_age_seconds=600)
        await asyncio.sleep(0)


def _is_settled(database: Database) -> bool:
    return isinstance(database, Ledger) and database.unanswered is None
