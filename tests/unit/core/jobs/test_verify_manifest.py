"""What a verification tells of what it has seen."""

import pytest

from app.core.jobs.generation_jobs import HeldGeneration
from app.core.jobs.handlers.verify_manifest import report
from app.core.stores.manifest.records import BlobRef, DatabaseRecord, VerificationRecord

DATABASE = DatabaseRecord(
    db_id=1, tenant="acme", name="log", engine="append_only", page_size=0, chunk_bytes=65536,
    compression="none", created_at_us=1,
)  # fmt: skip


def blob(key: str) -> BlobRef:
    return BlobRef(key=key, sha256=bytes(32), crc64=1, bytes=9)


def seen(key: str, outcome: str) -> VerificationRecord:
    return VerificationRecord(
        key=key, sha256=bytes(32), bytes=9, outcome=outcome, verified_at_us=1, job_id="J"
    )


@pytest.mark.parametrize(
    ("outcomes", "told"),
    [
        ({"a": "ok", "b": "repaired"}, "verified"),
        ({"a": "ok"}, "partial"),  # it was cancelled before the second one
        ({}, "partial"),
        ({"a": "missing"}, "damaged"),
    ],
)
def test_a_verification_that_was_given_up_verified_a_part(outcomes: dict[str, str], told: str):
    held = HeldGeneration(
        database=DATABASE, generation=1, blobs=[blob("a"), blob("b")], bytes=18
    )  # fmt: skip
    result = report(held, [seen(key, outcome) for key, outcome in outcomes.items()])
    assert (result["outcome"], result["verified_blobs"], result["blobs"]) == (
        told, len(outcomes), 2,
    )  # fmt: skip
