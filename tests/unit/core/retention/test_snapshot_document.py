"""The snapshot document as it was first released, readable for ever."""

import hashlib
from pathlib import Path

from app.core.retention.snapshot_document import (
    decode_snapshot,
    encode_snapshot,
    restored_snapshot,
    with_document,
)
from app.core.stores.manifest.records import SnapshotRecord
from tests.unit.core.stores.manifest.builders import descriptor

GOLDEN = Path(__file__).parents[3] / "golden" / "snapshot-v1.json"
ROW = SnapshotRecord(
    db_id=7, name="before-migration", generation=3, last_lsn=41, page_count=12,
    created_at_us=1_763_931_900_000_000,
)  # fmt: skip


def test_the_bytes_are_those_of_version_1() -> None:
    data = GOLDEN.read_bytes()
    assert encode_snapshot(descriptor(7, "app"), ROW) == data
    row = with_document(descriptor(7, "app"), ROW)
    assert row.document is not None
    digest = hashlib.sha256(data).hexdigest()
    assert row.document.key == f"snapshots/acme/app/before-migration/meta-{digest}.json"
    document = decode_snapshot(data, key=row.document.key)
    restored = restored_snapshot(document, data=data, key=row.document.key)
    assert restored.document == row.document
    assert (restored.generation, restored.created_at_us) == (3, ROW.created_at_us)
