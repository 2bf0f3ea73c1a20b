"""Who may change a database, and who goes first."""

from app.core.jobs.slots import DatabaseSlots
from app.core.stores.manifest.records import JobRecord


def job(job_id: str, kind="create_checkpoint", *, db_id: int = 1, **fields) -> JobRecord:
    return JobRecord(
        job_id=job_id, kind=kind, tenant="t", database="d", db_id=db_id, created_at_us=1, **fields
    )


def noted(*jobs: JobRecord) -> DatabaseSlots:
    slots = DatabaseSlots()
    for one in jobs:
        slots.note(one)
    return slots


def test_one_holder_at_a_time():
    slots, first, second = DatabaseSlots(), job("A"), job("B")
    slots.take(first)
    assert not slots.is_open(second)
    assert slots.is_open(first)
    assert slots.is_open(job("C", db_id=2))
    slots.free(second)
    assert slots.holder(1) == "A"
    slots.free(first)
    assert slots.is_open(second)


def test_a_job_that_changes_nothing_needs_no_slot():
    slots, check = DatabaseSlots(), job("V", "verify_manifest")
    slots.take(job("A"))
    assert slots.is_open(check)
    slots.take(check)
    assert slots.holder(1) == "A"


def test_a_truncation_goes_before_a_checkpoint():
    truncation = job("T", "truncate_append_only")
    slots = noted(job("A"), truncation)
    assert not slots.is_open(job("A"))
    assert slots.is_open(truncation)
    assert slots.is_open(job("A", db_id=2))
    slots.forget(truncation)
    assert slots.is_open(job("A"))


def test_truncations_do_not_wait_for_each_other():
    truncations = [job(one, "truncate_append_only") for one in "TU"]
    slots = noted(*truncations)
    assert all(slots.is_open(one) for one in truncations)


def test_what_is_published_goes_before_everything():
    published = job("A", published_generation=3)
    slots = noted(job("T", "truncate_append_only"), published)
    assert slots.is_open(published)
    assert not slots.is_open(job("T", "truncate_append_only"))
    assert not slots.is_open(job("B"))
    slots.forget(published)
    assert slots.is_open(job("T", "truncate_append_only"))


def test_forgetting_what_was_never_noted():
    slots = DatabaseSlots()
    slots.forget(job("A"))
    assert slots.is_open(job("A"))
