"""Small things outside the change log: what is put can be read, until it is taken away."""

import pytest

from app.core.base.errors import InvariantViolation
from app.core.stores.manifest import ops
from app.core.stores.manifest.apply_bookkeeping import count_up, leases_of
from app.core.stores.manifest.records import (
    FeatureFlags,
    LeaseRecord,
    RememberedAppend,
    TenantRecord,
    VerificationRecord,
)
from app.core.stores.manifest.rows import MemoryRows
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.manifest.tables import LEASES, LEASES_BY_JOB, chunk_prefix, job_lease_key
from tests.unit.core.stores.manifest.builders import PROCESS, batch, retire


async def test_bookkeeping_rows(store: ManifestStore) -> None:
    appends = (
        RememberedAppend(
            key_hash=b"k" * 16,
            body_hash=b"b" * 16,
            first_lsn=1,
            last_lsn=2,
            payload_bytes=3,
            appended_at_us=4,
        ),
    )
    tenant = TenantRecord(tenant="acme", flags=FeatureFlags(enable_checkpoints=False))
    receipt = await store.commit(
        batch(
            ops.RememberAppends(db_id=1, segment_id=2, appends=appends),
            ops.PutTenant(row=tenant),
            ops.PutMeta(name="note", value=b"text"),
        )
    )
    assert receipt.sequence is None
    with store.read() as view:
        assert view.remembered_appends(1) == {2: appends}
        assert view.tenant("acme") == tenant
        assert view.tenants() == [tenant]
        assert view.tenant("beta") is None
        assert view.meta("note") == b"text"
    await store.commit(batch(ops.ForgetAppends(db_id=1, segment_id=2)))
    with store.read() as view:
        assert view.remembered_appends(1) == {}


async def test_what_is_known_of_a_blob_goes_with_it(store: ManifestStore) -> None:
    def seen(key: str, at_us: int) -> VerificationRecord:
        return VerificationRecord(
            key=key, sha256=bytes(32), bytes=9, outcome="ok", verified_at_us=at_us, job_id="J1"
        )

    for record in (seen("a", 1), seen("b", 2), seen("a", 3)):
        await store.commit(batch(ops.PutVerification(record=record)))
    with store.read() as view:
        assert view.verification("a") == seen("a", 3)
        assert view.verification("b") == seen("b", 2)
    await store.commit(batch(retire("a"), ops.DoomBlob(key="a"), ops.ForgetBlob(key="a")))
    with store.read() as view:
        assert view.verification("a") is None
        assert view.verification("b") == seen("b", 2)


def test_a_counter_begins_at_one() -> None:
    rows = MemoryRows()
    assert [count_up(rows, b"counter/a") for _ in range(3)] == [1, 2, 3]
    assert count_up(rows, b"counter/b") == 1


@pytest.mark.parametrize("holder", [None, "J2"])
def test_an_index_of_leases_that_is_wrong_is_a_bug(holder: str | None) -> None:
    rows = MemoryRows()
    rows.put(LEASES_BY_JOB, job_lease_key("J1", 1, 0), b"")
    if holder is not None:
        lease = LeaseRecord(
            db_id=1, chunk_id=0, generation=1, job_id=holder, token=1, process_id=PROCESS,
            registered_at_us=0, expires_at_us=9, expires_at_monotonic=9.0,
        )  # fmt: skip
        rows.put(LEASES, chunk_prefix(1, 0), lease)
    with pytest.raises(InvariantViolation):
        leases_of(rows, "J1")
