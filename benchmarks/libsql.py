"""SQLite databases in S3: bytes, times and CPU against Litestream's, on the same SeaweedFS.

Each peer has its own bucket, its own copy of the same file and the same changes. Litestream runs
with `-once`, so that its later compactions, which upload everything again, are not counted.
"""

import asyncio
import os
import resource
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import Connection

from benchmarks.bucket import added_bytes, objects
from benchmarks.orders import (
    application,
    contents,
    insert_and_delete,
    make_database_blocking,
    update_in_place,
)
from benchmarks.peers import Checkpointing, Litestream, Peer, copy_blocking, started
from benchmarks.report import NO_NOTES, Result, noted
from benchmarks.service import cpu_seconds, service
from tests.helpers.seaweed import SeaweedS3

MIB = 1024 * 1024
DATABASE_BYTES = 256 * MIB
CHANGES = 10_000
ROUNDS = 3
IDLE_DATABASES = 50
IDLE_BYTES = 256 * 1024
IDLE_SECONDS = 35.0
"""Litestream looks for something to compact every 30 s."""
QUIET_SECONDS = 10.0
SETTLED_WITHIN_SECONDS = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sides:
    """The two peers and what they share."""

    seaweed: SeaweedS3
    ours: Checkpointing
    theirs: Litestream
    service: asyncio.subprocess.Process
    directory: Path


async def against_litestream(work: Path) -> list[Result]:
    async with _sides(work / "libsql") as sides:
        source = sides.directory / "source.db"
        make_database_blocking(source, size_bytes=DATABASE_BYTES)
        results = await _first_uploads(sides, source)
        results += await _changes(sides, source)
    async with _sides(work / "idle") as sides:
        results.append(await _idle(sides))
    return results


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timed:
    """CPU time of the command, and of our service for it."""

    seconds: float
    cpu_seconds: float

    def best(self, other: "_Timed | None") -> "_Timed":
        """The least of each."""
        if other is None:
            return self
        return _Timed(
            seconds=min(self.seconds, other.seconds),
            cpu_seconds=min(self.cpu_seconds, other.cpu_seconds),
        )


async def _timed(sides: _Sides, peer: Peer, step: Awaitable[float]) -> _Timed:
    def cpu() -> float:
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        served = cpu_seconds(sides.service) if peer is sides.ours else 0.0
        return ended.ru_utime + ended.ru_stime + served

    before = cpu()
    seconds = await step
    return _Timed(seconds=seconds, cpu_seconds=cpu() - before)


def _time_at_most(name: str, sides: _Sides, taken: dict[Peer, _Timed], *, target: float) -> Result:
    ours, theirs = taken[sides.ours], taken[sides.theirs]
    return _at_most(
        name, ours=ours.seconds, theirs=theirs.seconds, unit="s", target=target,
        notes=(f"{ours.cpu_seconds:.1f} s CPU", f"{theirs.cpu_seconds:.1f} s CPU"),
    )  # fmt: skip


def _at_most(
    name: str,
    *,
    ours: float,
    theirs: float,
    unit: str,
    target: float,
    notes: tuple[str, str] = NO_NOTES,
) -> Result:
    ratio = ours / theirs
    return Result(
        name=name,
        measured=noted(f"{ours:,.2f} {unit}", notes[0]),
        ceiling=noted(f"{theirs:,.2f} {unit}", notes[1]),
        ratio=ratio,
        target=f"≤ {target}",
        met=ratio <= target,
    )


@asynccontextmanager
async def _sides(directory: Path) -> AsyncIterator[_Sides]:
    directory.mkdir(parents=True)
    with SeaweedS3.running(directory / "seaweed") as seaweed:
        os.environ.update(seaweed.environment())
        bucket = seaweed.bucket()
        settings = {
            "remote_url": f"s3://{bucket}/service",
            "s3_endpoint_url": seaweed.endpoint,
            "s3_region": seaweed.region,
        }
        async with service(directory / "data", **settings) as (port, process):
            yield _Sides(
                seaweed=seaweed, ours=Checkpointing(port, bucket),
                theirs=Litestream(seaweed, directory), service=process, directory=directory,
            )  # fmt: skip


async def _first_uploads(sides: _Sides, source: Path) -> list[Result]:
    """In turn, each time another database with the same content; the best time of each counts."""
    taken: dict[Peer, _Timed] = {}
    size: dict[Peer, int] = {}
    for number in range(ROUNDS):
        for peer in (sides.theirs, sides.ours):
            copy = copy_blocking(source, _directory(sides, peer) / f"first{number}.db")
            before = await objects(sides.seaweed, peer.bucket)
            timed = await _timed(sides, peer, peer.sync(copy))
            size[peer] = added_bytes(before, await objects(sides.seaweed, peer.bucket))
            taken[peer] = timed.best(taken.get(peer))
            shutil.rmtree(copy.parent)  # with what Litestream keeps beside it
    return [
        _at_most(
            "first upload of a 256 MiB database: bytes ÷ Litestream's",
            ours=size[sides.ours] / MIB, theirs=size[sides.theirs] / MIB, unit="MiB", target=0.6,
        ),
        _time_at_most(
            "first upload of a 256 MiB database: time ÷ Litestream's", sides, taken, target=1.0
        ),
    ]  # fmt: skip


async def _changes(sides: _Sides, source: Path) -> list[Result]:
    """The application stays connected: its log is followed, not replaced by a new image."""
    peers: tuple[Peer, ...] = (sides.theirs, sides.ours)
    copies = {peer: copy_blocking(source, _directory(sides, peer) / "app.db") for peer in peers}
    added: dict[str, dict[Peer, float]] = {}
    with ExitStack() as stack:
        applications = {peer: stack.enter_context(application(copies[peer])) for peer in peers}
        for peer in peers:
            await peer.sync(copies[peer])
        kinds: dict[str, Callable[[Connection], None]] = {
            "updates": lambda connection: update_in_place(connection, count=CHANGES),
            "inserts and deletes": lambda connection: insert_and_delete(connection, count=CHANGES),
        }
        for kind, change in kinds.items():
            added[kind] = {}
            for peer in peers:
                change(applications[peer])
                before = await objects(sides.seaweed, peer.bucket)
                await peer.sync(copies[peer])
                after = await objects(sides.seaweed, peer.bucket)
                added[kind][peer] = added_bytes(before, after) / MIB
    restored = await _restores(sides, copies)
    return [
        _at_most(
            "10,000 scattered in-place row updates: bytes uploaded ÷ Litestream's",
            ours=added["updates"][sides.ours], theirs=added["updates"][sides.theirs],
            unit="MiB", target=0.15,
        ),
        _at_most(
            "5,000 inserts and 5,000 scattered deletes: bytes uploaded ÷ Litestream's",
            ours=added["inserts and deletes"][sides.ours],
            theirs=added["inserts and deletes"][sides.theirs], unit="MiB", target=0.6,
        ),
        _time_at_most(
            "restore of the changed 256 MiB database, checked: time ÷ Litestream's",
            sides, restored, target=0.5,
        ),
    ]  # fmt: skip


async def _restores(sides: _Sides, copies: dict[Peer, Path]) -> dict[Peer, _Timed]:
    """In turn; the best of each counts, and both must have brought back the same rows."""
    best: dict[Peer, _Timed] = {}
    expected = contents(copies[sides.theirs])
    for number in range(ROUNDS):
        for peer, copy in copies.items():
            target = sides.directory / f"restored{number}.db"
            timed = await _timed(sides, peer, peer.restore(copy, target))
            best[peer] = timed.best(best.get(peer))
            if contents(target) != expected:
                raise RuntimeError(f"{type(peer).__name__} brought back something else")
            target.unlink()
    return best


async def _idle(sides: _Sides) -> Result:
    """CPU time of the follower, and of our service with it, once all is uploaded."""
    small = sides.directory / "small.db"
    make_database_blocking(small, size_bytes=IDLE_BYTES, rows_per_commit=500)
    cpu: dict[Peer, float] = {}
    for peer in (sides.theirs, sides.ours):
        directory = _directory(sides, peer) / "idle"
        databases = [copy_blocking(small, directory / f"idle{n}.db") for n in range(IDLE_DATABASES)]
        await peer.sync_all(databases)
        async with started(peer.following(databases)) as follower:
            await _settled(sides, peer)
            watched = [follower, *([sides.service] if peer is sides.ours else [])]
            before, at = sum(map(cpu_seconds, watched)), time.perf_counter()
            await asyncio.sleep(IDLE_SECONDS)
            elapsed = time.perf_counter() - at
            if follower.returncode is not None:
                raise RuntimeError(f"{type(peer).__name__} ended with {follower.returncode}")
            cpu[peer] = (sum(map(cpu_seconds, watched)) - before) / elapsed * 1000
        shutil.rmtree(directory)
    return _at_most(
        "50 idle databases followed, our service included: CPU ÷ Litestream's",
        ours=cpu[sides.ours], theirs=cpu[sides.theirs], unit="ms/s", target=1.0,
    )  # fmt: skip


async def _settled(sides: _Sides, peer: Peer) -> None:
    """Every database is in the bucket, and nothing came for a while."""
    seen, quiet_since = await objects(sides.seaweed, peer.bucket), time.perf_counter()
    deadline = quiet_since + SETTLED_WITHIN_SECONDS
    while time.perf_counter() < deadline:
        await asyncio.sleep(1)
        now = await objects(sides.seaweed, peer.bucket)
        if now != seen:
            seen, quiet_since = now, time.perf_counter()
        missing = {f"idle{n}" for n in range(IDLE_DATABASES)}
        missing -= {part for key, _ in seen for part in key.split("/")}
        if not missing and time.perf_counter() - quiet_since >= QUIET_SECONDS:
            return
    raise RuntimeError(f"{type(peer).__name__} does not come to rest")


def _directory(sides: _Sides, peer: Peer) -> Path:
    return sides.directory / type(peer).__name__.lower()
