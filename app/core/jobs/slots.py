"""Which job may change a database now: one at a time, in an order that keeps promises.

First what is published, since its document describes the catalogue as its publication left it
(I15); then a truncation, which was accepted for what was there at its acceptance; then the rest.
A truncation is claimed without the slot and takes it once nothing is in its way, so that whoever
holds the leases it waits for can go on.
Memory only, and loop-confined: the rows decide, and are noted here as they change.
"""

from app.core.stores.manifest.records import MUTATING_KINDS, JobKind, JobRecord

WAITING_KINDS: frozenset[JobKind] = frozenset({"truncate_append_only"})
"""Claimed without the slot."""

_PUBLISHED, _TRUNCATION, _OTHER = range(3)


class DatabaseSlots:
    def __init__(self) -> None:
        self._holders: dict[int, str] = {}
        self._ahead: dict[int, dict[str, int]] = {}
        """Of a database, the unfinished jobs that go before others, and their rank."""

    def holder(self, db_id: int) -> str | None:
        return self._holders.get(db_id)

    def note(self, job: JobRecord) -> None:
        """The unfinished job is new, or its row has changed."""
        if (rank := _rank(job)) < _OTHER:
            self._ahead.setdefault(job.db_id, {})[job.job_id] = rank

    def forget(self, job: JobRecord) -> None:
        """The job has ended."""
        ahead = self._ahead.get(job.db_id)
        if ahead is not None:
            ahead.pop(job.job_id, None)
            if not ahead:
                del self._ahead[job.db_id]

    def is_open(self, job: JobRecord) -> bool:
        """Whether the job may take its database's slot now."""
        if job.kind not in MUTATING_KINDS:
            return True
        if self._holders.get(job.db_id, job.job_id) != job.job_id:
            return False
        rank, ahead = _rank(job), self._ahead.get(job.db_id, {})
        return all(other >= rank for other in ahead.values())

    def take(self, job: JobRecord) -> None:
        if job.kind in MUTATING_KINDS:
            self._holders[job.db_id] = job.job_id

    def free(self, job: JobRecord) -> None:
        """Nothing happens unless the job holds it."""
        if self._holders.get(job.db_id) == job.job_id:
            del self._holders[job.db_id]


def _rank(job: JobRecord) -> int:
    if job.kind not in MUTATING_KINDS:
        return _OTHER
    if job.published_generation is not None:
        return _PUBLISHED
    return _TRUNCATION if job.kind in WAITING_KINDS else _OTHER
