"""Fall-through of forks, against a model that copies everything when a fork is made."""

import contextlib
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.stores.manifest import lineage, log_chunks, ops
from app.core.stores.manifest.apply_catalogue import apply_catalogue
from app.core.stores.manifest.errors import (
    GenerationGone,
    MissingRow,
    RowPinned,
    SnapshotTaken,
    WrongState,
)
from app.core.stores.manifest.records import (
    ChunkRecord,
    ForkParent,
    GenerationRecord,
    SnapshotRecord,
)
from app.core.stores.manifest.replay import replay
from app.core.stores.manifest.rows import MemoryRows
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.manifest.tables import CHUNKS, DATABASES, DELTAS, number_key
from tests.unit.core.stores.manifest.builders import (
    batch,
    chunk,
    create_database,
    delta,
    descriptor,
    publish,
)

CHUNK_IDS = (0, 1, 2)

Content = dict[int, list[str]]
"""Of each chunk that is there: its base's key, then those of its deltas, oldest first."""


class RowsBothWays(MemoryRows):
    def scan(self, table, prefix=b"", *, start=b""):
        return [(key, row) for key, row in super().scan(table, prefix) if key >= start]

    def scan_back(self, table, prefix=b"", *, before=None):
        found = reversed(self.scan(table, prefix))
        return ((key, row) for key, row in found if before is None or key < before)


def from_lsn(rows: Any, db_id: int, generation: int, lsn: int, *, page: int = 2) -> list[int]:
    """Both ways of finding the chunks from there on, which must agree."""
    whole = log_chunks.newest_chunks(rows, db_id, generation, lsn, looks_max=10_000)
    assert whole is not None
    paged: list[ChunkRecord] = []
    while found := log_chunks.chunk_page(rows, db_id, generation, lsn, limit=page):
        paged += found
        lsn = found[-1].last + 1
    assert paged == whole
    return [row.chunk_id for row in paged]


@dataclass
class Copy:
    """A database that shares nothing: its content at each generation that is retained."""

    generations: dict[int, Content]
    newest: int
    alive: bool = True
    depth: int = 0


@dataclass
class House:
    rows: RowsBothWays = field(default_factory=RowsBothWays)
    copies: dict[int, Copy] = field(default_factory=dict)
    counter: int = 0

    def apply(self, *operations: ops.CatalogueOp) -> None:
        for op in operations:
            apply_catalogue(self.rows, op)

    def create(self) -> int:
        db_id = len(self.copies) + 1
        self.apply(ops.RestoreDatabase(record=descriptor(db_id, f"d{db_id}")))
        self.copies[db_id] = Copy(generations={}, newest=0)
        return db_id

    def fork(self, parent: int, generation: int) -> int:
        db_id = len(self.copies) + 1
        came_from = ForkParent(
            tenant="acme", database=f"d{parent}", db_id=parent, generation=generation
        )
        record = descriptor(db_id, f"d{db_id}", generation=generation, forked_from=came_from)
        self.apply(
            ops.RestoreDatabase(record=record),
            ops.RestoreGeneration(row=self.generation_row(db_id, generation)),
        )
        if lineage.depth_of(self.rows, db_id) > 3:
            self.apply(ops.AdoptEveryChunk(db_id=db_id))
        content = deepcopy(self.copies[parent].generations[generation])
        self.copies[db_id] = Copy(generations={generation: content}, newest=generation)
        return db_id

    def change(self, db_id: int, chunk_id: int, action: str) -> None:
        """Publishes one generation that does `action` to the chunk."""
        copy = self.copies[db_id]
        before = copy.generations[copy.newest] if copy.newest else {}
        after, target = deepcopy(before), copy.newest + 1
        found = lineage.chunk_rows(self.rows, db_id, chunk_id)
        bases = [row for row in found.bases if lineage.is_valid_at(row, copy.newest)]
        deltas = [row for row in found.deltas if lineage.is_valid_at(row, copy.newest)]
        operations: list[ops.CatalogueOp] = []
        self.counter += 1
        if action == "delta" and chunk_id in before:
            base_key = bases[0].blob.key if bases[0].blob is not None else ""
            row = delta(db_id, chunk_id, target, base_key=base_key)
            row = msgspec.structs.replace(
                row, blob=msgspec.structs.replace(row.blob, key=f"delta-{self.counter}")
            )
            operations.append(ops.UpsertChunkDelta(row=row))
            after[chunk_id].append(row.blob.key)
        elif action == "merge" and len(deltas) > 1:
            row = delta(db_id, chunk_id, target)
            row = msgspec.structs.replace(
                row, blob=msgspec.structs.replace(row.blob, key=f"merged-{self.counter}")
            )
            operations += self.superseded(db_id, deltas, target)
            operations.append(ops.UpsertChunkDelta(row=row))
            after[chunk_id] = [after[chunk_id][0], row.blob.key]
        else:
            lsns = {"first": 10 * chunk_id + 1, "last": 10 * chunk_id + 10}
            base = chunk(db_id, chunk_id, target, **lsns)
            assert base.blob is not None
            blob = msgspec.structs.replace(base.blob, key=f"base-{self.counter}")
            base = msgspec.structs.replace(base, blob=None if action == "drop" else blob)
            operations += self.superseded(db_id, [*deltas, *bases], target)
            if action != "cut":  # as a head truncation does it
                operations.append(ops.UpsertChunk(row=base))
            after.pop(chunk_id, None)
            if action not in {"cut", "drop"}:
                after[chunk_id] = [blob.key]
        self.apply(*operations, publish(db_id, target))
        copy.generations[target] = after
        copy.newest = target

    def superseded(self, db_id: int, rows: list, target: int) -> list[ops.CatalogueOp]:
        kinds = {True: ops.SupersedeChunk, False: ops.SupersedeChunkDelta}
        return [
            kinds[isinstance(row, lineage.ChunkRecord)](
                db_id=db_id, chunk_id=row.chunk_id, generation=row.generation, superseded_at=target
            )
            for row in rows
        ]

    def expire(self, db_id: int, generation: int) -> None:
        """Takes one generation, and every row that nothing reaches any more."""
        copy = self.copies[db_id]
        if generation == copy.newest and copy.alive:
            return
        self.apply(ops.DeleteGeneration(db_id=db_id, generation=generation))
        del copy.generations[generation]
        self.collect(db_id)

    def delete(self, db_id: int) -> None:
        self.apply(ops.SetDatabaseState(db_id=db_id, state="tombstoned"))
        copy = self.copies[db_id]
        copy.alive = False
        for generation in list(copy.generations):
            self.expire(db_id, generation)
        self.collect(db_id)

    def collect(self, db_id: int) -> None:
        """As a collector would: asks for nothing and lets the ops refuse."""
        retained = self.copies[db_id].generations
        for row in [row for _, row in self.rows.scan(DELTAS, number_key(db_id))]:
            if not any(lineage.is_valid_at(row, one) for one in retained):
                self.try_to(
                    ops.DeleteChunkDelta(
                        db_id=db_id, chunk_id=row.chunk_id, generation=row.generation
                    )
                )
        needed = {row.base_key for _, row in self.rows.scan(DELTAS, number_key(db_id))}
        for base in [row for _, row in self.rows.scan(CHUNKS, number_key(db_id))]:
            if base.blob is not None and base.blob.key in needed:
                continue
            if not any(lineage.is_valid_at(base, one) for one in retained):
                self.try_to(
                    ops.DeleteChunk(db_id=db_id, chunk_id=base.chunk_id, generation=base.generation)
                )

    def try_to(self, op: ops.CatalogueOp) -> None:
        with contextlib.suppress(RowPinned):
            self.apply(op)

    def generation_row(self, db_id: int, generation: int) -> GenerationRecord:
        return msgspec.structs.replace(publish(db_id, generation).row)

    def content(self, db_id: int, generation: int) -> Content:
        bases = lineage.chunks_at(self.rows, db_id, generation)
        deltas = lineage.deltas_at(self.rows, db_id, generation)
        assert {row.db_id for row in [*bases, *deltas]} <= {db_id}
        return {
            row.chunk_id: [
                row.blob.key,
                *(one.blob.key for one in deltas if one.chunk_id == row.chunk_id),
            ]
            for row in bases
            if row.blob is not None
        }

    def check(self) -> None:
        for db_id, copy in self.copies.items():
            for generation, content in copy.generations.items():
                assert self.content(db_id, generation) == content, (db_id, generation)
                lsns = (10 * min(content) + 1, 10 * max(content) + 10) if content else None
                assert log_chunks.log_range(self.rows, db_id, generation) == lsns
                for lsn in (1, 10, 11, 15, 31):  # each chunk has ten LSNs
                    wanted = sorted(one for one in content if 10 * one + 10 >= lsn)
                    assert from_lsn(self.rows, db_id, generation, lsn) == wanted
                for chunk_id in CHUNK_IDS:  # chunk by chunk it is the same
                    found = lineage.chunk_rows(self.rows, db_id, chunk_id)
                    keys = [
                        row.blob.key
                        for row in (*found.bases, *found.deltas)
                        if row.blob is not None and lineage.is_valid_at(row, generation)
                    ]
                    assert keys == content.get(chunk_id, []), (db_id, generation, chunk_id)
                    known = {row.blob.key for row in found.bases if row.blob is not None}
                    assert {row.base_key for row in found.deltas} <= known | {""}


databases, chunk_ids = st.integers(0, 20), st.sampled_from(CHUNK_IDS)
actions = st.sampled_from(["rewrite", "rewrite", "delta", "delta", "merge", "drop", "cut"])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("change"), databases, chunk_ids, actions),
        st.tuples(st.just("change"), databases, chunk_ids, actions),
        st.tuples(st.just("fork"), databases, st.integers(0, 20)),
        st.tuples(st.just("expire"), databases, st.integers(0, 20)),
        st.tuples(st.just("delete"), databases),
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(steps=steps)
def test_forks_read_what_a_copy_would_have(steps: list[tuple]) -> None:
    house = House()
    first = house.create()
    house.change(first, 0, "rewrite")
    house.change(first, 1, "rewrite")
    for step in steps:
        alive = [db_id for db_id, copy in house.copies.items() if copy.alive]
        if not alive:
            break
        db_id = alive[step[1] % len(alive)]
        copy = house.copies[db_id]
        match step:
            case ("change", _, chunk_id, action):
                house.change(db_id, chunk_id, action)
            case ("fork", _, choice) if len(house.copies) < 8:
                retained = sorted(copy.generations)
                house.fork(db_id, retained[choice % len(retained)])
            case ("expire", _, choice):
                retained = sorted(copy.generations)
                house.expire(db_id, retained[choice % len(retained)])
            case ("delete", _):
                house.delete(db_id)
        house.check()
    # Once everything is deleted, children first, nothing is pinned for ever.
    for db_id in sorted(house.copies, reverse=True):
        if house.copies[db_id].alive:
            house.delete(db_id)
        house.collect(db_id)
        assert not house.rows.scan(CHUNKS, number_key(db_id))
        assert not house.rows.scan(DELTAS, number_key(db_id))
        house.apply(ops.RemoveDatabase(db_id=db_id))


@pytest.fixture
def family() -> House:
    """1 has chunks 0 and 1; 2 is a fork of it, 3 one of 2."""
    house = House()
    house.create()
    house.change(1, 0, "rewrite")
    house.change(1, 1, "rewrite")
    house.fork(1, 2)
    house.fork(2, 2)
    return house


def test_before_its_first_chunk_a_log_has_no_range(family: House) -> None:
    assert log_chunks.log_range(family.rows, 1, 0) is None


def test_a_database_that_is_not_there_has_nothing(family: House) -> None:
    assert lineage.depth_of(family.rows, 9) == 0
    assert lineage.chunks_at(family.rows, 9, 1) == []
    assert lineage.deltas_at(family.rows, 9, 1) == []


def test_what_a_fork_changed_takes_its_place_among_what_it_inherits() -> None:
    house = House()
    house.create()
    for chunk_id in range(6):
        house.change(1, chunk_id, "rewrite")
    house.change(1, 1, "delta")
    house.change(1, 1, "delta")
    house.fork(1, 8)
    for chunk_id, action in ((5, "drop"), (2, "delta"), (4, "rewrite"), (0, "drop")):
        house.change(2, chunk_id, action)
    found = lineage.chunks_at(house.rows, 2, 12)
    assert [row.chunk_id for row in found] == [0, 1, 2, 3, 4, 5]
    assert [row.blob is None for row in found] == [True, False, False, False, False, True]
    deltas = lineage.deltas_at(house.rows, 2, 12)
    assert [(row.chunk_id, row.generation) for row in deltas] == [(1, 7), (1, 8), (2, 10)]
    assert log_chunks.log_range(house.rows, 2, 12) == (11, 50)
    for lsn, ids in ((1, [1, 2, 3, 4]), (30, [2, 3, 4]), (31, [3, 4]), (51, [])):
        assert from_lsn(house.rows, 2, 12, lsn) == ids
    house.check()


def test_a_fork_that_inherits_nothing_has_what_it_writes(family: House) -> None:
    for chunk_id in (0, 1):
        family.change(1, chunk_id, "cut")
    child = family.fork(1, 4)
    family.check()
    family.change(child, 1, "rewrite")
    assert [row.chunk_id for row in lineage.chunks_at(family.rows, child, 5)] == [1]
    family.check()


async def test_the_end_of_a_log_is_found_without_looking_at_all_of_it(store: ManifestStore) -> None:
    await create_database(store, engine="append_only")
    chunks = [
        ops.UpsertChunk(
            row=chunk(1, number, first=10 * number + 1, last=10 * number + 10,
                      visible_last=10 * number + 10)
        )
        for number in range(500)
    ]  # fmt: skip
    await store.commit(batch(*chunks, publish(1, next_chunk_id=500, last_lsn=5000)))
    looked: list[Any] = []

    class Counting:
        def __init__(self, rows: Any) -> None:
            self.rows, self.get = rows, rows.get

        def scan_back(self, table: Any, prefix: bytes = b"") -> Iterator[Any]:
            for pair in self.rows.scan_back(table, prefix):
                looked.append(pair)
                yield pair

    with store.read() as view, view._access as rows:
        counting: Any = Counting(rows)
        found = log_chunks.newest_chunks(counting, 1, 1, 4985, looks_max=3)
        assert [row.chunk_id for row in found or ()] == [498, 499]
        assert len(looked) == 3
        assert log_chunks.newest_chunks(rows, 1, 1, 4985, looks_max=2) is None
        assert log_chunks.newest_chunks(rows, 1, 1, 1, looks_max=500) == lineage.chunks_at(
            rows, 1, 1
        )


async def test_a_page_of_a_log_costs_the_same_wherever_it_lies(store: ManifestStore) -> None:
    """Rows of other generations, merged or of a log that was begun anew, are in the way."""
    await create_database(store, engine="append_only")
    lsns = [{"first": 10 * one + 1, "last": 10 * one + 10} for one in range(500)]
    rows = [chunk(1, one, visible_last=10 * one + 10, **lsns[one]) for one in range(500)]
    await store.commit(
        batch(
            *(ops.UpsertChunk(row=row) for row in rows),
            publish(1, next_chunk_id=500, last_lsn=5000),
        )
    )
    whole = chunk(1, 200, 2, first=2001, last=2100, visible_last=2100)
    sources = [
        ops.SupersedeChunk(db_id=1, chunk_id=one, generation=1, superseded_at=2)
        for one in range(200, 210)
    ]
    await store.commit(
        batch(
            *sources,
            ops.UpsertChunk(row=whole),
            publish(1, 2, next_chunk_id=500, last_lsn=5000),
        )
    )
    looked: list[Any] = []

    class Counting:
        def __init__(self, rows: Any) -> None:
            self.rows, self.get = rows, rows.get

        def scan(self, table: Any, prefix: bytes = b"", *, start: bytes = b"") -> Iterator[Any]:
            for pair in self.rows.scan(table, prefix, start=start):
                looked.append(pair)
                yield pair

        def scan_back(self, table: Any, prefix: bytes, *, before: Any = None) -> Iterator[Any]:
            for pair in self.rows.scan_back(table, prefix, before=before):
                looked.append(pair)
                yield pair

    with store.read() as view, view._access as given:
        counting: Any = Counting(given)
        for lsn, ids in ((1, [0, 1]), (2001, [200, 210]), (2095, [200, 210]), (4995, [499])):
            looked.clear()
            found = log_chunks.chunk_page(counting, 1, 2, lsn, limit=2)
            assert [row.chunk_id for row in found] == ids
            assert len(looked) < 40
        assert log_chunks.chunk_page(counting, 1, 2, 5001, limit=2) == []
        found = log_chunks.chunk_page(counting, 1, 1, 2095, limit=2)  # while it was not merged
        assert [row.chunk_id for row in found] == [209, 210]


def test_a_fork_makes_no_row_until_it_changes(family: House) -> None:
    assert not family.rows.scan(CHUNKS, number_key(2))
    family.change(2, 0, "delta")
    assert [row.chunk_id for _, row in family.rows.scan(CHUNKS, number_key(2))] == [0]
    (adopted,) = lineage.chunk_rows(family.rows, 2, 0).bases
    assert (adopted.db_id, adopted.origin_db_id, adopted.generation) == (2, 1, 1)


def test_a_chunk_that_was_cut_off_does_not_fall_through_again(family: House) -> None:
    family.change(2, 0, "cut")
    family.expire(2, 2)  # the adopted row goes with the last generation that shows it
    family.check()
    family.delete(3)
    family.collect(2)
    family.check()
    (drop,) = lineage.chunk_rows(family.rows, 2, 0).bases
    assert drop == lineage.ChunkRecord(
        db_id=2, chunk_id=0, generation=3, blob=None, first=1, last=10, visible_last=0,
        origin_db_id=1,
    )  # fmt: skip
    family.apply(ops.DeleteChunk(db_id=2, chunk_id=0, generation=3))
    assert lineage.chunk_rows(family.rows, 2, 0).bases == (drop,), "nor when the drop goes"
    family.change(2, 0, "rewrite")
    family.check()


def test_who_needs_a_row(family: House) -> None:
    (base,) = lineage.chunk_rows(family.rows, 1, 0).bases
    assert [fork.child_db_id for fork in lineage.inheritors(family.rows, base)] == [2]
    family.change(3, 0, "delta")  # adopted: its own rows name the blob
    family.change(2, 0, "rewrite")
    assert not list(lineage.inheritors(family.rows, base))


def test_a_fork_needs_the_older_base_that_a_delta_is_encoded_against() -> None:
    """1 has a new base since generation 2, and a delta over it that names the old one."""
    house = House()
    house.create()
    house.change(1, 0, "rewrite")
    (old,) = lineage.chunk_rows(house.rows, 1, 0).bases
    assert old.blob is not None
    over_old = delta(1, 0, 2, base_key=old.blob.key)
    house.apply(
        ops.SupersedeChunk(db_id=1, chunk_id=0, generation=1, superseded_at=2),
        ops.UpsertChunk(row=chunk(1, 0, 2)),
        ops.UpsertChunkDelta(row=over_old),
        publish(1, 2),
        ops.SupersedeChunkDelta(db_id=1, chunk_id=0, generation=2, superseded_at=3),
        ops.UpsertChunkDelta(row=delta(1, 0, 3)),
        publish(1, 3),
    )
    house.copies[1].generations |= {2: {}, 3: {}}
    with_delta, without = house.fork(1, 2), house.fork(1, 3)
    old, new = lineage.chunk_rows(house.rows, 1, 0).bases
    over_old, plain = lineage.chunk_rows(house.rows, 1, 0).deltas

    def needed_by(row: lineage.ChunkRecord | lineage.ChunkDeltaRecord) -> list[int]:
        return [fork.child_db_id for fork in lineage.inheritors(house.rows, row)]

    assert needed_by(old) == [with_delta], "not valid there, yet its pages cannot be read without"
    assert needed_by(new) == [with_delta, without]
    assert (needed_by(over_old), needed_by(plain)) == ([with_delta], [without])
    drop = msgspec.structs.replace(old, blob=None)
    assert needed_by(drop) == []
    inherited = lineage.inherited_rows(house.rows, with_delta, 0)
    assert [(row.generation, row.superseded_at) for row in inherited.bases] == [(1, 2), (2, None)]
    assert [row.generation for row in lineage.inherited_rows(house.rows, without, 0).bases] == [2]


def test_a_deleted_fork_needs_rows_only_for_its_own_forks(family: House) -> None:
    (base,) = lineage.chunk_rows(family.rows, 1, 0).bases
    family.delete(2)
    assert list(lineage.inheritors(family.rows, base))
    family.delete(3)
    assert not list(lineage.inheritors(family.rows, base))
    with pytest.raises(WrongState):
        family.apply(ops.RemoveDatabase(db_id=1))


def test_a_fork_that_adopted_every_chunk_falls_through_no_more(family: House) -> None:
    (base,) = lineage.chunk_rows(family.rows, 1, 0).bases
    assert lineage.depth_of(family.rows, 3) == 2
    family.apply(ops.AdoptEveryChunk(db_id=3))
    assert lineage.depth_of(family.rows, 3) == 0
    record = family.rows.get(DATABASES, number_key(3))
    assert record is not None
    assert record.forked_from == ForkParent(
        tenant="acme", database="d2", db_id=2, generation=2, inherits=False
    )
    assert [row.chunk_id for _, row in family.rows.scan(CHUNKS, number_key(3))] == [0, 1]
    family.check()
    family.delete(2)
    assert not list(lineage.inheritors(family.rows, base)), "the rows of 3 name the blobs"


def test_adopting_leaves_what_the_fork_changed_and_any_other_database_alone(family: House) -> None:
    family.change(3, 0, "rewrite")
    own = lineage.chunk_rows(family.rows, 3, 0)
    family.apply(ops.AdoptEveryChunk(db_id=3))
    assert lineage.chunk_rows(family.rows, 3, 0) == own
    assert [row.chunk_id for row in lineage.chunks_at(family.rows, 3, 3)] == [0, 1]
    family.check()
    before = deepcopy(family.rows.tables)
    for db_id in (1, 9):
        family.apply(ops.AdoptEveryChunk(db_id=db_id))
    assert family.rows.tables == before


def test_what_a_deleted_fork_cut_off_stays_cut_off_in_its_forks(family: House) -> None:
    family.delete(3)
    family.change(2, 0, "cut")
    child = family.fork(2, family.copies[2].newest)
    family.delete(2)
    family.check()
    family.delete(child)
    family.collect(2)
    assert not family.rows.scan(CHUNKS, number_key(2)), "and nothing is pinned for ever"


async def test_refusals_inside_the_transaction(store: ManifestStore) -> None:
    db_id = await create_database(store)
    await store.commit(batch(ops.UpsertChunk(row=chunk(db_id)), publish(db_id)))
    await store.commit(
        batch(
            ops.SupersedeChunk(db_id=db_id, chunk_id=0, generation=1, superseded_at=2),
            ops.UpsertChunk(row=chunk(db_id, generation=2)),
            publish(db_id, 2),
        )
    )
    snapshot = SnapshotRecord(
        db_id=db_id, name="s", generation=1, last_lsn=10, page_count=10, created_at_us=1
    )
    await store.commit(batch(ops.CreateSnapshot(row=snapshot)))
    with pytest.raises(SnapshotTaken):
        await store.commit(batch(ops.CreateSnapshot(row=snapshot)))
    unknown = msgspec.structs.replace(snapshot, name="t", generation=3)
    with pytest.raises(GenerationGone):
        await store.commit(batch(ops.CreateSnapshot(row=unknown)))
    gone = ops.DeleteGeneration(db_id=db_id, generation=1)
    with pytest.raises(RowPinned):
        await store.commit(batch(gone))
    with pytest.raises(RowPinned):
        await store.commit(batch(ops.SetDatabaseState(db_id=db_id, state="tombstoned")))
    (child,) = (await store.commit(batch(ops.TakeDatabaseId()))).results
    parent = ForkParent(tenant="acme", database="db", db_id=db_id, generation=1)
    fork = ops.RestoreDatabase(record=descriptor(child, "f", generation=1, forked_from=parent))
    await store.commit(batch(fork, ops.RestoreGeneration(row=publish(child).row)))
    await store.commit(batch(ops.DeleteSnapshot(db_id=db_id, name="s"), gone))
    with pytest.raises(MissingRow):
        await store.commit(batch(ops.DeleteSnapshot(db_id=db_id, name="s")))
    with pytest.raises(RowPinned) as refusal:
        await store.commit(batch(ops.DeleteChunk(db_id=db_id, chunk_id=0, generation=1)))
    assert refusal.value.fields["names"] == ["acme/f"]
    late = msgspec.structs.replace(fork.record, db_id=child + 1, name="late")
    with pytest.raises(GenerationGone):
        await store.commit(batch(ops.RestoreDatabase(record=late)))
    with store.read() as view:
        assert view.chunk_view(child, 1)[0].blob == chunk(db_id).blob
        assert [row.child_db_id for row in view.forks_of(db_id)] == [child]
        assert view.snapshots(db_id) == []
        assert replay(view.change_log()) == view.catalogue()
        assert view.database(child) == fork.record
    assert DATABASES.name in replay([])
