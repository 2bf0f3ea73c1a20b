"""Databases in a real manifest that publish, fork, are read and deleted; and what can be read."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from app.core.base.errors import DatabaseNotFound
from app.core.base.events import Events
from app.core.reads.read_point import GenerationPins
from app.core.retention.expiry import Expiry
from app.core.retention.policy_pass import RetentionPass
from app.core.retention.removal import DatabaseRemoval
from app.core.stores.manifest import ops
from app.core.stores.manifest.lineage import is_valid_at
from app.core.stores.manifest.records import (
    ChunkDeltaRecord,
    ChunkRecord,
    ForkParent,
    GenerationRecord,
    Retention,
)
from app.core.stores.manifest.store import ManifestStore
from tests.unit.core.stores.manifest.builders import FakeClock, batch, blob, descriptor, publish

KEEP_ALL = Retention(keep_generations=1_000_000)
Content = tuple[tuple[str, ...], ...]


class NoWal:
    def __init__(self) -> None:
        self.dropped: list[int] = []

    def log(self, db_id: int) -> Any:
        raise DatabaseNotFound(db_id=db_id)

    async def drop_log(self, db_id: int) -> None:
        self.dropped.append(db_id)


@dataclass
class World:
    store: ManifestStore
    clock: FakeClock = field(default_factory=FakeClock)
    pins: GenerationPins = field(default_factory=GenerationPins)
    held: list[tuple[int, int, Callable[[], None]]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    """Of all blobs ever published."""
    count: int = 0

    def __post_init__(self) -> None:
        self.wal = NoWal()
        self.expiry = Expiry(self.store, self.pins, events=Events())
        self.removal = DatabaseRemoval(self.store, self.wal, self.expiry, clock=self.clock)
        self.retention = RetentionPass(self.store, self.expiry, self.removal)

    # --- what happens to databases

    async def create(self, retention: Retention = KEEP_ALL) -> int:
        self.count += 1
        record = descriptor(self.count, f"d{self.count}", retention=retention)
        await self.store.commit(batch(ops.RestoreDatabase(record=record)))
        return self.count

    async def fork(self, parent: int, generation: int) -> int:
        self.count += 1
        source = ForkParent(
            tenant="acme", database=f"d{parent}", db_id=parent, generation=generation
        )
        record = descriptor(
            self.count, f"d{self.count}", generation=generation, forked_from=source,
            retention=KEEP_ALL, floor_lsn=100,
        )  # fmt: skip
        row = publish(self.count, generation).row
        await self.store.commit(
            batch(ops.RestoreDatabase(record=record), ops.RestoreGeneration(row=row))
        )
        return self.count

    async def publish(self, db_id: int, chunk_id: int, action: str) -> int:
        """One generation; its number. `base`, `delta`, `merge`, `drop`, `underlay` or `cut`."""
        with self.store.read() as view:
            database = view.database(db_id)
            assert database is not None
            found = view.chunk_history(db_id, chunk_id)
        target = database.generation + 1
        valid: list[ChunkRecord | ChunkDeltaRecord] = [
            row for row in found.bases if is_valid_at(row, database.generation)
        ]
        base = next((row.blob for row in valid if row.blob is not None), None)
        deltas = [row for row in found.deltas if is_valid_at(row, database.generation)]
        key = f"{action}-{db_id}-{chunk_id}-{target}"
        gone: list[Any] = []
        if base is None and action != "base":
            new: list[ops.Op] = []
        elif action in {"delta", "merge"}:
            gone = deltas if action == "merge" else []
            row = ChunkDeltaRecord(
                db_id=db_id, chunk_id=chunk_id, generation=target, delta_id=target,
                blob=blob(key), base_key=base.key if base and target % 2 else "", pages=b"\1",
            )  # fmt: skip
            new = [ops.UpsertChunkDelta(row=row)]
            self.keys.add(key)
        elif action == "underlay":  # a new base below deltas that were made against the old one
            made = ChunkRecord(
                db_id=db_id, chunk_id=chunk_id, generation=target, blob=blob(key),
                first=1, last=9, visible_last=9,
            )  # fmt: skip
            gone, new = valid, [ops.UpsertChunk(row=made)]
            self.keys.add(key)
        elif action == "cut":  # as a head truncation does it
            gone, new = [*deltas, *valid], []
        else:
            gone = [*deltas, *valid]
            made = ChunkRecord(
                db_id=db_id, chunk_id=chunk_id, generation=target,
                blob=None if action == "drop" else blob(key), first=1, last=9, visible_last=9,
            )  # fmt: skip
            new = [ops.UpsertChunk(row=made)]
            self.keys |= {key} if made.blob else set()
        superseded = [
            (ops.SupersedeChunk if isinstance(row, ChunkRecord) else ops.SupersedeChunkDelta)(
                db_id=db_id, chunk_id=chunk_id, generation=row.generation, superseded_at=target
            )
            for row in gone
        ]
        generation = publish(
            db_id, target, next_chunk_id=9, document_key=f"generations/{db_id}/{target}",
            document_stored=True, committed_at_us=self.now_us,
        )  # fmt: skip
        await self.store.commit(batch(*superseded, *new, generation))
        return target

    async def delete(self, db_id: int) -> None:
        await self.store.commit(batch(ops.SetDatabaseState(db_id=db_id, state="tombstoned")))

    def hold(self, db_id: int, generation: int) -> None:
        self.held.append((db_id, generation, self.pins.pin(db_id, generation)))

    def let_go(self) -> None:
        while self.held:
            self.held.pop()[2]()

    async def settle(self) -> None:
        await self.retention.run(self.now_us, everything=True)

    # --- what can be seen

    @property
    def now_us(self) -> int:
        return self.clock.wall_ns() // 1000

    def alive(self) -> list[int]:
        with self.store.read() as view:
            return [one.db_id for one in view.all_databases() if one.state != "tombstoned"]

    def generations(self, db_id: int) -> list[GenerationRecord]:
        with self.store.read() as view:
            return view.generations(db_id)

    def readable(self) -> set[tuple[int, int]]:
        """Every (database, generation) that someone can read."""
        found = {(db_id, generation) for db_id, generation, _ in self.held}
        for db_id in self.alive():
            found |= {(db_id, one.generation) for one in self.generations(db_id)}
        return found

    def content(self, db_id: int, generation: int) -> Content:
        """The keys of each chunk's blobs at a generation, and of what they are encoded against."""
        with self.store.read() as view:
            chunks = view.chunk_view(db_id, generation)
            deltas = view.delta_view(db_id, generation)
        keys = [(row.blob.key,) for row in chunks if row.blob is not None]
        return tuple(sorted([*keys, *((row.blob.key, row.base_key) for row in deltas)]))

    def named(self) -> set[str]:
        """The keys that some row names."""
        with self.store.read() as view:
            return {key for key in self.keys if view.blob_references(key)}

    def queued(self) -> dict[str, bool]:
        with self.store.read() as view:
            return {row.key: row.doomed for row in view.gc_rows(limit=100_000)}


def flattened(contents: dict[Any, Content]) -> set[str]:
    return {key for content in contents.values() for keys in content for key in keys if key}
