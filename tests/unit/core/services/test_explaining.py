"""Why a job waits: every reason, and who has what is waited for."""

import msgspec
import pytest

from app.core.base.clock import wall_us
from app.core.base.errors import JobNotFound
from app.core.base.events import Events
from app.core.coordination.quota import StorageQuota
from app.core.jobs.feed import JobFeed
from app.core.jobs.queue import JobQueue
from app.core.services.explaining import Explaining, RemoteLoad
from app.core.stores.manifest.ops import AcquireLease, EnqueueJob, ManifestBatch
from app.core.stores.manifest.records import JobFailure, JobRecord
from app.core.stores.manifest.store import ManifestStore
from migrations.runner import load_steps
from tests.helpers.fake_clock import FakeClock

CALM = RemoteLoad(failing=False, in_flight=0, limit=16, waiting=0)


class Setting:
    def __init__(self, manifest: ManifestStore, clock: FakeClock) -> None:
        self.manifest, self.clock = manifest, clock
        self.quota = StorageQuota(
            global_limit_bytes=1000, drain_limit_bytes=0, clock=clock, events=Events()
        )
        self.queue = JobQueue(
            manifest,
            clock=clock,
            events=Events(),
            feed=JobFeed(),
            depth_max=100,
            retry_wait_seconds_max=60,
        )
        self.prefix: str | None = None
        self.load = CALM
        self.explaining = Explaining(
            manifest, self.queue, self.quota, clock=clock, job_concurrency=2,
            prefix_problem=lambda: self.prefix, remote_load=lambda: self.load,
        )  # fmt: skip

    async def job(self, job_id: str, **changes) -> JobRecord:
        job = JobRecord(
            job_id=job_id, kind="create_checkpoint", tenant="acme", database="db", db_id=1,
            created_at_us=wall_us(self.clock),
        )  # fmt: skip
        job = msgspec.structs.replace(job, **changes)
        if job.state == "pending" and job.not_before_us == 0 and job.stage is None:
            return await self.queue.enqueue(job, join=False)
        await self.manifest.commit(ManifestBatch(ops=(EnqueueJob(job=job),), reason="t"))
        return job

    async def lease(self, job_id: str, chunk_id: int = 0) -> None:
        lease = AcquireLease(
            db_id=1, chunk_id=chunk_id, generation=1, job_id=job_id, ttl_seconds=60.0
        )
        await self.manifest.commit(ManifestBatch(ops=(lease,), reason="t"))

    def reasons(self, job_id: str) -> list[tuple[str, str | None]]:
        found = self.explaining.explain(job_id).waits_for
        return [(reason.kind, reason.job_id) for reason in found]


@pytest.fixture
async def setting(tmp_path):
    clock = FakeClock()
    manifest = await ManifestStore.open(
        tmp_path / "manifest", clock=clock, events=Events(), process_id="p", map_bytes=1 << 26,
        max_readers=8, migrations=load_steps(), on_fatal=pytest.fail,
    )  # fmt: skip
    yield Setting(manifest, clock)
    await manifest.aclose()


async def test_a_job_that_nothing_holds_up_is_next(setting):
    await setting.job("J1")
    explanation = setting.explaining.explain("J1")
    assert (explanation.summary, explanation.waits_for) == ("It is next in turn.", ())
    with pytest.raises(JobNotFound):
        setting.explaining.explain("none")


async def test_another_job_of_the_database_is_waited_for(setting):
    await setting.job("J1")
    assert (await setting.queue.claim()).job_id == "J1"
    await setting.job("J2")
    assert setting.reasons("J2") == [("database", "J1")]
    await setting.job("J3", db_id=2)
    await setting.queue.claim()
    await setting.job("J4", db_id=3)
    assert setting.reasons("J4") == [("concurrency", None)]


async def test_an_unclaimed_prefix_holds_everything_up(setting):
    setting.prefix = "the store does not answer"
    await setting.job("J1")
    assert setting.reasons("J1") == [("prefix", None)]


async def test_backoff_says_until_when_and_after_what(setting):
    later = wall_us(setting.clock) + 5_000_000
    error = JobFailure(kind="exhausted", code="quota_exhausted", title="t", detail="used up")
    await setting.job("J1", not_before_us=later, attempts=2, error=error)
    await setting.queue.load()
    setting.clock.jump_wall(-3600)  # the pause goes by the other clock
    later -= 3_600_000_000
    backoff, quota = setting.explaining.explain("J1").waits_for
    assert (backoff.kind, backoff.until_us) == ("backoff", later)
    assert "quota_exhausted: used up" in backoff.detail
    assert (quota.kind, "of 1000 bytes" in quota.detail) == ("quota", True)


async def test_a_lease_and_its_holder(setting):
    await setting.lease("OTHER", chunk_id=3)
    await setting.lease("J1", chunk_id=4)
    await setting.job(
        "J1", kind="truncate_append_only", state="in_flight", stage="waiting_for_lease"
    )
    explanation = setting.explaining.explain("J1")
    (reason,) = explanation.waits_for
    assert (reason.kind, reason.job_id, reason.chunk_id) == ("lease", "OTHER", 3)
    assert [lease.chunk_id for lease in explanation.leases] == [4]
    assert explanation.summary == "It waits for: lease."


async def test_at_work_the_remote_store_may_be_what_it_waits_for(setting):
    await setting.job("J1", state="in_flight", stage="uploading", cancel_requested=True)
    asked = "It works (uploading). It was asked to end."
    assert setting.explaining.explain("J1").summary == asked
    setting.load = RemoteLoad(failing=True, in_flight=4, limit=4, waiting=9)
    assert setting.reasons("J1") == [("remote", None), ("limiter", None)]
    await setting.job("J2", state="in_flight", stage="reserving")
    assert setting.reasons("J2") == [("quota", None)]


async def test_what_has_ended_waits_for_nothing(setting):
    await setting.job("J1", state="failed")
    assert setting.explaining.explain("J1").summary == "It has ended: failed."
