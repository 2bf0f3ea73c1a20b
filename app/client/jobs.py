"""Checkpoints and jobs: trigger, list, look, wait, watch, cancel."""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

import httpx
import msgspec

from app.client.calls import Calls, decoded, path_of
from app.client.failures import UnexpectedAnswer
from app.client.wire import Job, JobState

WAIT_SECONDS_MAX = 60.0
POLL_SECONDS = 1.0


class Jobs:
    """Jobs of every kind under `/jobs`."""

    root = "/jobs"
    cancel_root: str | None = None
    """Where jobs are cancelled that are not where they are listed."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def list(
        self,
        *,
        tenant: str | None = None,
        database: str | None = None,
        state: JobState | Sequence[JobState] | None = None,
        kind: str | None = None,
        limit: int | None = None,
    ) -> AsyncGenerator[Job, None]:
        """Newest first; in any of these states."""
        params = {"tenant": tenant, "database": database, "state": state, "kind": kind}
        return self._calls.pages(self.root, Job, params=params, limit=limit)

    async def get(self, job_id: str, *, wait_seconds: float = 0.0) -> Job:
        """As it is now; with `wait_seconds` (60 at most) when it has ended or the time is over."""
        return await self._calls.get(
            f"{self.root}{path_of(job_id)}", Job, wait_seconds=wait_seconds
        )

    async def wait(self, job_id: str) -> Job:
        """Returns the job once it has ended, however that was. Bound it by `asyncio.timeout`."""
        while True:
            job = await self.get(job_id, wait_seconds=WAIT_SECONDS_MAX)
            if job.ended:
                return job

    async def cancel(self, job_id: str) -> Job:
        """Asks the job to end. Raises ProblemError, with `job_already_ended`."""
        response = await self._calls.send(
            "POST",
            f"{self.cancel_root or self.root}{path_of(job_id)}/cancel",
            key=self._calls.new_key(),
        )
        return decoded(response, Job)

    async def watch(self, job_id: str) -> AsyncGenerator[Job, None]:
        """The job now and after each change that is seen; the last one has ended."""
        job = await self.get(job_id)
        yield job
        while not job.ended:
            seen = await self.get(job_id, wait_seconds=POLL_SECONDS)
            if seen != job:
                job = seen
                yield job


class Checkpoints(Jobs):
    """Jobs that make checkpoints, under `/checkpoints`."""

    root = "/checkpoints"

    async def trigger(self, tenant: str, database: str, *, reason: str | None = None) -> Job:
        """A job whose checkpoint covers all that was acknowledged before this call."""
        asked = {"tenant": tenant, "database": database, "reason": reason}
        response = await self._calls.send(
            "POST",
            self.root,
            json={name: value for name, value in asked.items() if value is not None},
            key=self._calls.new_key(),
        )
        return decoded(response, Job)

    async def events(self, job_id: str) -> AsyncGenerator[Job, None]:
        """The job at each event of its stream, which may end early: see `watch`."""
        async with (
            self._calls.stream(
                f"{self.root}{path_of(job_id)}/events", headers={"Accept": "text/event-stream"}
            ) as response,
            aclosing(event_data(response.aiter_lines())) as events,
        ):
            async for data in events:
                try:
                    job = msgspec.json.decode(data, type=Job)
                except msgspec.MsgspecError as error:
                    raise UnexpectedAnswer(f"An event holds no job: {error}") from error
                yield job

    async def watch(self, job_id: str) -> AsyncGenerator[Job, None]:
        """The job now and after each change; the last one has ended. A stream that breaks off is
        opened again; where streams do not pass at all, the job is asked for now and then.
        """
        job = await self.get(job_id)
        yield job
        broken_count = 0
        while not job.ended:
            before = job
            try:
                async with aclosing(self.events(job_id)) as events:
                    async for seen in events:
                        if seen != job:
                            job = seen
                            yield job
            except httpx.TransportError:
                pass  # the job itself goes on
            broken_count = 0 if job != before else broken_count + 1
            if not job.ended and broken_count > 0:
                seen = await self.get(job_id, wait_seconds=min(10.0, POLL_SECONDS * broken_count))
                if seen != job:
                    job = seen
                    yield job


async def event_data(lines: AsyncIterator[str]) -> AsyncGenerator[str, None]:
    """The data of each event of an event stream (WHATWG HTML, section 9.2)."""
    data: list[str] = []
    async for line in lines:
        if not line:
            if data:
                yield "\n".join(data)
            data = []
        elif line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
