"""What pins history, and under which name: pure.

A snapshot pins a whole generation: it stays readable, whatever the retention policy says. A fork
pins rows, not the generation: as long as a chunk of it falls through to the parent, the parent's
rows of that chunk as of the fork stay (`ManifestView.inheriting_forks`); once the fork has rows of
its own, those name the blobs. The manifest's ops refuse to remove what is pinned, whatever was
decided before their transaction.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from app.core.stores.manifest.records import ForkRecord, SnapshotRecord


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Pin:
    generation: int
    kind: Literal["fork", "snapshot"]
    name: str
    """A snapshot's name, or a fork's `tenant/database`."""


def pins_of(snapshots: Iterable[SnapshotRecord], forks: Iterable[ForkRecord]) -> tuple[Pin, ...]:
    """Of one database, by generation."""
    found = [Pin(generation=one.generation, kind="snapshot", name=one.name) for one in snapshots]
    found += [
        Pin(generation=fork.generation, kind="fork", name=f"{fork.tenant}/{fork.database}")
        for fork in forks
    ]
    return tuple(sorted(found))


def pinned_generations(snapshots: Iterable[SnapshotRecord]) -> frozenset[int]:
    """The generations that stay whole."""
    return frozenset(snapshot.generation for snapshot in snapshots)


def pins_within(
    pins: Iterable[Pin], *, generation: int, superseded_at: int | None
) -> tuple[Pin, ...]:
    """The pins on generations at which a row valid in [generation, superseded_at) shows."""
    return tuple(
        pin
        for pin in pins
        if generation <= pin.generation
        and (superseded_at is None or pin.generation < superseded_at)
    )
