"""A job's leases live as long as it works, and a lost one stops it."""

import asyncio

import pytest

from app.core.base.errors import BopError, DiskFull, ManifestBusy, ManifestFull
from app.core.coordination.leases import keep_leases
from app.core.stores.manifest.errors import LeaseLost
from app.core.stores.manifest.ops import ManifestBatch, RenewLeases
from tests.helpers.fake_clock import FakeClock


class Renewals:
    """The manifest, as far as renewing goes."""

    def __init__(self) -> None:
        self.asked = 0
        self.batches: list[ManifestBatch] = []
        self.refusal: BopError | None = None

    async def commit(self, batch: ManifestBatch) -> None:
        self.asked += 1
        if self.refusal is not None:
            raise self.refusal
        self.batches.append(batch)


async def test_leases_are_renewed_three_times_a_lifetime_until_one_is_lost() -> None:
    clock, manifest = FakeClock(), Renewals()
    renewal = RenewLeases(job_id="J1", ttl_seconds=30.0, count_min=2)
    with pytest.RaisesGroup(LeaseLost):
        async with asyncio.TaskGroup() as group:
            group.create_task(
                keep_leases(manifest, job_id="J1", count=2, ttl_seconds=30.0, clock=clock)
            )
            await clock.until_sleeping()
            clock.advance(9.9)
            await clock.until_sleeping()
            assert manifest.batches == []
            for count in (1, 2):
                clock.advance(10)
                await clock.until_sleeping()
                assert manifest.batches == count * [
                    ManifestBatch(ops=(renewal,), reason="lease.renewed")
                ]
            manifest.refusal = LeaseLost(job_id="J1")
            clock.advance(10)


@pytest.mark.parametrize("refusal", [ManifestBusy(), ManifestFull(), DiskFull()])
async def test_a_renewal_that_is_turned_away_is_made_again_in_time(refusal: BopError) -> None:
    clock, manifest = FakeClock(), Renewals()
    async with asyncio.TaskGroup() as group:
        keeper = group.create_task(
            keep_leases(manifest, job_id="J1", count=2, ttl_seconds=30.0, clock=clock)
        )
        await clock.until_sleeping()
        manifest.refusal = refusal
        for seconds, asked in ((10, 1), (0.98, 1), (0.02, 2), (0.98, 2), (0.02, 3)):
            clock.advance(seconds)
            await clock.until_sleeping()
            assert manifest.asked == asked
        manifest.refusal = None
        clock.advance(1)
        await clock.until_sleeping()
        assert len(manifest.batches) == 1
        clock.advance(9.9)
        await clock.until_sleeping()
        assert len(manifest.batches) == 1
        clock.advance(0.1)
        await clock.until_sleeping()
        assert len(manifest.batches) == 2
        keeper.cancel()
