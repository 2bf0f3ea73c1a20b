from app.core.retention.pins import Pin, pinned_generations, pins_of, pins_within
from app.core.stores.manifest.records import ForkRecord, SnapshotRecord


def snapshot(name: str, generation: int) -> SnapshotRecord:
    return SnapshotRecord(
        db_id=1, name=name, generation=generation, last_lsn=1, page_count=1, created_at_us=1
    )


def fork(name: str, generation: int) -> ForkRecord:
    return ForkRecord(db_id=1, child_db_id=9, generation=generation, tenant="acme", database=name)


def test_pins_have_names_and_snapshots_hold_the_generation() -> None:
    snapshots = [snapshot("b", 3), snapshot("a", 3)]
    pins = pins_of(snapshots, [fork("copy", 2)])
    assert pins == (
        Pin(generation=2, kind="fork", name="acme/copy"),
        Pin(generation=3, kind="snapshot", name="a"),
        Pin(generation=3, kind="snapshot", name="b"),
    )
    assert pinned_generations(snapshots) == {3}


def test_pins_within_the_validity_of_a_row() -> None:
    pins = pins_of([snapshot("s", 3)], [fork("f", 5)])
    assert pins_within(pins, generation=1, superseded_at=3) == ()
    assert [pin.name for pin in pins_within(pins, generation=3, superseded_at=5)] == ["s"]
    assert [pin.name for pin in pins_within(pins, generation=4, superseded_at=None)] == ["acme/f"]
