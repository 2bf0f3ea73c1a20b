"""Charges are made to agree with real files, links included."""

import os
from pathlib import Path

import pytest

from app.core.base.events import Events
from app.core.base.tasks import BlockingPool
from app.core.coordination.quota import StorageQuota
from app.core.coordination.reconciliation import QuotaReconciliation, UsageRoot, tenant_of
from app.core.coordination.usage import UsageKey, UsageKind, UsageLink
from app.core.stores.manifest.ops import CreateDatabase, EnqueueJob, ManifestBatch
from app.core.stores.manifest.records import JobRecord
from tests.helpers.fake_clock import FakeClock
from tests.unit.core.stores.manifest.builders import open_store

JOB = "01J0000000000000000000000A"
DEAD = "01J0000000000000000000000B"


def put(path: Path, size: int) -> os.stat_result:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    return path.stat()


@pytest.fixture
def pool():
    pool = BlockingPool("test", threads=2)
    yield pool
    pool.close_blocking()


@pytest.fixture
def quota():
    return StorageQuota(
        global_limit_bytes=10_000, drain_limit_bytes=0, clock=FakeClock(), events=Events()
    )


def reconciliation(quota: StorageQuota, root: Path, pool: BlockingPool) -> QuotaReconciliation:
    return QuotaReconciliation(
        quota,
        [
            UsageRoot(kind=UsageKind.WAL, path=root / "wal", has_owners=True),
            UsageRoot(kind=UsageKind.SCRATCH, path=root / "checkpoint_scratch", has_owners=True),
            UsageRoot(kind=UsageKind.HOT_CACHE, path=root / "hot_cache", has_owners=False),
        ],
        tenant_of=lambda kind, owner: {"3": "acme", DEAD: "acme"}.get(owner),
        pool=pool,
        events=Events(),
    )


async def test_a_half_removed_directory_is_its_jobs(tmp_path, pool, quota):
    put(tmp_path / f"checkpoint_scratch/{DEAD}.removing/chunk", 30)
    put(tmp_path / f"checkpoint_scratch/{JOB}.removing/chunk", 70)
    await reconciliation(quota, tmp_path, pool).run_once(live_jobs=lambda: {JOB})
    assert [(t.tenant, t.used_bytes) for t in quota.snapshot().tenants] == [("acme", 30)]
    quota.forget_scratch(DEAD)
    assert quota.snapshot().global_used_bytes == 0


async def test_start_charges_what_is_there_once(tmp_path, pool, quota):
    segment = tmp_path / "wal/3/0001.wal"
    put(segment, 500)
    (tmp_path / "hot_cache/ab/cd").mkdir(parents=True)
    os.link(segment, tmp_path / "hot_cache/ab/cd" / ("ab" * 32))
    put(tmp_path / f"checkpoint_scratch/{JOB}/chunk", 70)  # reserved, not charged
    put(tmp_path / f"checkpoint_scratch/{DEAD}/chunk", 30)
    (tmp_path / "wal/link").symlink_to(segment)

    reconcile = reconciliation(quota, tmp_path, pool)
    report = await reconcile.run_once(live_jobs=lambda: {JOB})
    assert (report.inodes, report.corrected, report.drift_bytes) == (2, 2, 530)
    seen = quota.snapshot()
    assert seen.global_used_bytes == 530
    assert [(t.tenant, t.used_bytes) for t in seen.tenants] == [("acme", 530)]
    quota.check()

    again = await reconcile.run_once(live_jobs=lambda: {JOB})
    assert (again.corrected, again.drift_bytes) == (0, 0)

    segment.unlink()
    assert (await reconcile.run_once(live_jobs=lambda: {JOB})).corrected == 1
    assert [t.used_bytes for t in quota.snapshot().tenants] == [30]  # the cache pays now
    assert quota.snapshot().global_used_bytes == 530
    quota.check()


async def test_drift_is_corrected_and_changes_meanwhile_are_not(tmp_path, pool, quota):
    grown = put(tmp_path / "wal/3/0001.wal", 100)
    account = quota.account(kind=UsageKind.WAL, owner="3", tenant="acme")
    account.charge("0001.wal", device=grown.st_dev, inode=grown.st_ino, size_bytes=40)
    account.charge("gone.wal", device=1, inode=999_999_999, size_bytes=7)
    reconcile = reconciliation(quota, tmp_path, pool)
    report = await reconcile.run_once()
    assert (report.corrected, report.drift_bytes) == (2, 53)
    assert quota.snapshot().global_used_bytes == 100

    # A store that charges, resizes or discharges while the listing runs knows better.
    late = put(tmp_path / "wal/3/0002.wal", 10)

    class MeanwhilePool:
        async def run(self, function, *args):
            found = await pool.run(function, *args)
            account.charge("0001.wal", device=grown.st_dev, inode=grown.st_ino, size_bytes=150)
            account.charge("0002.wal", device=late.st_dev, inode=late.st_ino, size_bytes=10)
            account.discharge("0002.wal", device=late.st_dev, inode=late.st_ino)
            account.charge("0003.wal", device=1, inode=5, size_bytes=1)
            return found

    racing = reconciliation(quota, tmp_path, MeanwhilePool())
    assert (await racing.run_once()).corrected == 0
    assert quota.snapshot().global_used_bytes == 151
    quota.check()


async def test_a_charge_of_another_kind_is_not_the_listings_to_judge(tmp_path, pool, quota):
    (tmp_path / "wal").mkdir()
    quota.charge(
        UsageKey(device=1, inode=1),
        UsageLink(kind=UsageKind.SCRATCH, owner=JOB, name="c", tenant=None),
        size_bytes=5,
    )
    only_wal = QuotaReconciliation(
        quota,
        [UsageRoot(kind=UsageKind.WAL, path=tmp_path / "wal", has_owners=True)],
        tenant_of=lambda kind, owner: None,
        pool=pool,
        events=Events(),
    )
    assert (await only_wal.run_once()).corrected == 0
    assert quota.snapshot().global_used_bytes == 5


async def test_who_pays_for_what_lies_in_the_data_directory(tmp_path):
    store = await open_store(tmp_path / "manifest", clock=FakeClock())
    receipt = await store.commit(
        ManifestBatch(
            ops=(
                CreateDatabase(
                    tenant="acme", name="log", engine="append_only", page_size=0,
                    chunk_bytes=65_536, compression="none", created_at_us=1,
                ),
                EnqueueJob(
                    job=JobRecord(
                        job_id=JOB, kind="create_checkpoint", tenant="zeta", database="log",
                        db_id=1, created_at_us=1,
                    )
                ),
            ),
            reason="made",
        )
    )  # fmt: skip
    db_id = str(receipt.results[0])
    for kind, owner, tenant in [
        (UsageKind.WAL, db_id, "acme"),
        (UsageKind.WAL, "999", None),
        (UsageKind.WAL, "", None),
        (UsageKind.WAL, "stray", None),
        (UsageKind.SCRATCH, JOB, "zeta"),
        (UsageKind.SCRATCH, DEAD, None),
        (UsageKind.SCRATCH, "", None),
        (UsageKind.HOT_CACHE, "", None),
    ]:
        assert tenant_of(store, kind, owner) == tenant, (kind, owner)
    await store.aclose()
