"""How long jobs have been there, and when those that wait for their time may begin.

Rows hold wall-clock times, for people and for the next process. Within a process the monotonic
clock decides: a wall clock that is set makes no job early, late or too old. Of the time before a
restart nothing is known but what the wall clock says, and no pause is believed to be longer than
the longest that anything is given.
Memory only, and loop-confined: a few numbers for each unfinished job.
"""

from app.core.base.clock import Clock, wall_us
from app.core.stores.manifest.records import JobRecord


class JobTimes:
    def __init__(self, clock: Clock, *, wait_seconds_max: float) -> None:
        self._clock = clock
        self._wait_us_max = int(wait_seconds_max * 1e6)
        self._accepted_at: dict[str, float] = {}
        self._ready_at: dict[str, float] = {}

    def note(self, job: JobRecord) -> None:
        """The unfinished job waits, from now on or again. One that is to be cancelled waits for
        no time.
        """
        now, wall = self._clock.monotonic(), wall_us(self._clock)
        passed_us = max(wall - job.created_at_us, 0)
        wait_us = 0 if job.cancel_requested else max(job.not_before_us - wall, 0)
        wait_us = min(wait_us, self._wait_us_max)  # the clock was set back since it was written
        self._accepted_at.setdefault(job.job_id, now - passed_us / 1e6)
        self._ready_at[job.job_id] = now + wait_us / 1e6

    def forget(self, job_id: str) -> None:
        """The job has ended."""
        self._accepted_at.pop(job_id, None)
        self._ready_at.pop(job_id, None)

    def ready_at(self, job: JobRecord) -> float:
        """When a job that waits may be claimed, by the monotonic clock."""
        return self._ready_at[job.job_id]

    def wait_seconds(self, job: JobRecord) -> float:
        """Until then; 0: it waits for no time."""
        ready_at = self._ready_at.get(job.job_id, 0.0)
        return max(ready_at - self._clock.monotonic(), 0.0)

    def age_seconds(self, job: JobRecord) -> float:
        """Since an unfinished job was accepted."""
        return self._clock.monotonic() - self._accepted_at[job.job_id]
