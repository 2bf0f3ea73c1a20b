"""Starts a manifest on what a power cut left of it, and tells all that it then holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.core.base.clock import SystemClock
from app.core.base.errors import FatalError
from app.core.base.events import Events
from app.core.stores.manifest.ops import RestoreDatabase, decode_op
from app.core.stores.manifest.replay import Catalogue, replay
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.manifest.view import ManifestView
from migrations.runner import load_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    node_id: str
    names: frozenset[str]
    fillers: frozenset[str]
    by_sequence: dict[int, str]
    """The database that each change record made."""
    catalogue: Catalogue
    replayed: Catalogue


async def recover(directory: Path, notes: Sequence[dict[str, Any]]) -> Recovered:
    del notes  # what is there does not depend on them
    failures: list[FatalError] = []
    store = await ManifestStore.open(
        directory / "manifest",
        clock=SystemClock(),
        events=Events(),
        process_id="after",
        map_bytes=64 * 1024 * 1024,
        max_readers=16,
        on_fatal=failures.append,
        migrations=load_steps(),
    )
    try:
        with store.read() as view:
            return _look(view, store.node_id)
    finally:
        await store.aclose()
        assert not failures


def _look(view: ManifestView, node_id: str) -> Recovered:
    changes = view.change_log(limit=10_000)
    names = frozenset(database.name for database in view.all_databases())
    by_sequence = {}
    for change in changes:
        for raw in change.ops:
            op = decode_op(raw)
            assert isinstance(op, RestoreDatabase)
            by_sequence[change.sequence] = op.record.name
    return Recovered(
        node_id=node_id,
        names=names,
        fillers=frozenset(name for name in names if view.meta(f"filler/{name}")),
        by_sequence=by_sequence,
        catalogue=view.catalogue(),
        replayed=replay(changes),
    )
