"""The lease map shows leases that live, and no others."""

import pytest

from app.core.base.events import Events
from app.core.stores.manifest.ops import AcquireLease, CreateDatabase, ManifestBatch
from app.core.stores.manifest.store import ManifestStore
from app.core.workers.lease_reaper import LeaseReaper
from migrations.runner import load_steps
from tests.helpers.fake_clock import FakeClock


def raise_fatal(error: BaseException) -> None:
    raise error


@pytest.fixture
async def clock():
    return FakeClock()


@pytest.fixture
async def manifest(tmp_path, clock):
    store = await ManifestStore.open(
        tmp_path / "manifest", clock=clock, events=Events(), process_id="p", map_bytes=1 << 26,
        max_readers=8, migrations=load_steps(), on_fatal=raise_fatal,
    )  # fmt: skip
    database = CreateDatabase(
        tenant="t", name="d", engine="append_only", page_size=0, chunk_bytes=65536,
        compression="none", created_at_us=1,
    )  # fmt: skip
    await store.commit(ManifestBatch(ops=(database,), reason="t"))
    yield store
    await store.aclose()


async def acquire(manifest, job_id: str, chunk_id: int, ttl_seconds: float):
    lease = AcquireLease(
        db_id=1, chunk_id=chunk_id, generation=1, job_id=job_id, ttl_seconds=ttl_seconds
    )
    await manifest.commit(ManifestBatch(ops=(lease,), reason="t"))


def holders(manifest) -> list[str]:
    with manifest.read() as view:
        return [lease.job_id for lease in view.leases()]


async def test_expired_leases_go_and_are_told(manifest, clock):
    told = []
    events = Events()
    events.subscribe(lambda name, level, fields: told.append((name, fields.get("job_id"))))
    reaper = LeaseReaper(manifest, clock=clock, events=events, lease_ttl_seconds=10)
    assert await reaper.run_once() == 0
    await acquire(manifest, "slow", 0, ttl_seconds=10)
    await acquire(manifest, "quick", 1, ttl_seconds=100)
    assert await reaper.run_once() == 0
    clock.advance(10)
    assert await reaper.run_once() == 1
    assert holders(manifest) == ["quick"]
    assert told == [("lease.reaped", "slow")]
